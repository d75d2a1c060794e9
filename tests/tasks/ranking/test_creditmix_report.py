"""What an evaluation leaves behind: the report's folder, the rows, a bag of words, figures in the run's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from common.evaluation import run_figures
from common.tasks.ranking.controls import TFIDF

pytestmark = pytest.mark.processes


def test_the_report_folder(evaluate, base, trained, tmp_path):
    line = evaluate(base, trained, "--val_per_class", "30", "--report_dir", str(tmp_path / "report"))
    names = {path.name for path in (tmp_path / "report").iterdir()}
    plots = {f"{kind}_{i}_{name}.png" for kind in ("confusion", "reliability", "margins")
             for i, name in ((1, Path(base).name), (2, "sft"))}  # fmt: skip
    files = {"metrics.json", "report.html", "f1_per_class.png", "risk_coverage.png", "answers.jsonl", *plots}
    assert names == {*files, "predictions.jsonl"}
    for plot in plots:
        assert (tmp_path / "report" / plot).read_bytes().startswith(b"\x89PNG")
    stored = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert len(stored["rows"]["y"]) == len(stored["models"][1]["predictions"]) == 90
    assert stored["models"][1]["accuracy"] == line["models"][1]["accuracy"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6  # the confusion matrices are tables
    assert "http://" not in page and "https://" not in page


def test_a_bag_of_words_by_default_and_figures_in_the_run(evaluate, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "sft")
    shutil.rmtree(run / "evaluations", ignore_errors=True)
    line = evaluate(run, "--val_per_class", "30", "--report_dir", str(tmp_path / "report"), controls=True)
    assert [model["model_dir"] for model in line["models"]] == [str(run), TFIDF]
    assert line["baseline"]["rows"] > 100 and line["baseline"]["data"].endswith("_sft.jsonl")
    (kept,) = run_figures.read(run)
    assert kept["figures"]["accuracy"] == line["models"][0]["accuracy"]
    assert kept["command"].startswith("python eval_creditmix.py --data") and kept["model_sha256"]
    predictions = [json.loads(text) for text in (tmp_path / "report" / "predictions.jsonl").read_text().splitlines()]
    right = [row["answers"]["sft"]["label"] == row["label"] for row in predictions]
    assert sum(right) / 90 == pytest.approx(kept["figures"]["accuracy"]["value"], abs=1e-6)
