"""What an evaluation leaves in the folder of a run: the newest of its kind, and never at the evaluation's cost."""

from __future__ import annotations

import json
import os

import pytest

from common.evaluation import run_figures

FIGURE = {"value": 0.75, "low": 0.7, "high": 0.8}


def result(folder, **changes) -> dict:
    model = {
        "model_dir": str(folder),
        "accuracy": FIGURE,
        "nll": {"value": float("inf"), "low": 0.0, "high": 1.0},
        "decision": {"abstain_below": 0.5},
        "calibration": "fitted",
        "contamination": {"rows": 0, "of": 90},
    }
    facts = {"data": "val.jsonl", "data_sha256": "ab" * 32, "split": "validation", "n": 90, "created": "2026-01-02"}
    return {
        "evaluator": "creditmix",
        **facts,
        "command": "python eval_creditmix.py",
        "versions": {"distill-slm": "c0ffee"},
        "models": [model, {"model_dir": "gradient boosting", "accuracy": FIGURE}],
    } | changes


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "sft"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def test_all_that_it_takes_to_measure_again_is_kept(run):
    run_figures.keep(result(run))
    (kept,) = run_figures.read(run)
    assert kept["figures"] == {"accuracy": FIGURE}  # neither what is no figure nor one that is infinite
    assert (kept["command"], kept["data_sha256"], kept["created"]) == (
        "python eval_creditmix.py", "ab" * 32, "2026-01-02")  # fmt: skip
    assert (kept["calibration"], kept["contamination"]["of"], kept["commit"], kept["n"]) == ("fitted", 90, "c0ffee", 90)
    assert len(kept["model_sha256"]) == 64


def test_the_newest_on_the_same_data_takes_the_place_of_the_one_before(run):
    for created, data in (("2026-01-01", "ab"), ("2026-01-02", "cd"), ("2026-01-03", "ab")):
        run_figures.keep(result(run, created=created, data_sha256=data * 32))
    assert [record["created"] for record in run_figures.read(run)] == ["2026-01-03", "2026-01-02"]


def test_a_base_model_gets_none(run):
    (run / "run.json").unlink()
    run_figures.keep(result(run))
    assert [file.name for file in run.iterdir()] == ["adapter_model.safetensors"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_costs_a_line(run, capsys):
    run.chmod(0o500)
    run_figures.keep(result(run))
    run.chmod(0o700)
    assert "does not keep its figures" in capsys.readouterr().err


def test_a_file_in_the_way_costs_a_line(run, capsys):
    (run / run_figures.FOLDER).write_text("")
    run_figures.keep(result(run))
    assert "sft cannot be written (File exists), so it does not keep its figures" in capsys.readouterr().err
    assert run_figures.read(run) == []


def test_a_report_in_the_folder_is_read_like_one(run):
    (run / "report").mkdir()
    (run / "report" / "metrics.json").write_text(json.dumps(result("elsewhere/sft")).replace("Infinity", "0.5"))
    (old,) = run_figures.read(run)
    assert old["figures"]["accuracy"] == FIGURE and old["model_sha256"] is None
    run_figures.keep(result(run))
    assert len(run_figures.read(run)) == 1  # of the same data
    (run / "report" / "metrics.json").write_text(json.dumps(result("elsewhere/kd")).replace("Infinity", "0.5"))
    assert len(run_figures.read(run)) == 1  # of another run


@pytest.mark.parametrize("content", ["{", "[]", '{"figures": {"a": {"value": "x"}}}', '{"figures": {}, "n": "1"}'])
def test_a_broken_one_is_named(run, content):
    (run / run_figures.FOLDER).mkdir()
    (run / run_figures.FOLDER / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"evaluations/a\.json is unreadable"):
        run_figures.read(run)
