"""The report: self-contained, escaped, honest about contamination; the terminal table shows the same numbers."""

from __future__ import annotations

import json
import re
from collections import defaultdict

import numpy as np
import pytest

from common.evaluation import results
from common.tasks.ranking import report
from common.tasks.ranking.calibration import Calibration
from common.tasks.ranking.decision import Decision
from common.tasks.ranking.drift import drift
from common.tasks.ranking.metrics import compare, evaluate

LABELS = ("Good", "Standard", "Bad")
PNG = b"\x89PNG\r\n\x1a\n"


def made(names=("runs/base", "runs/sft"), contamination=(0, 0), labels=LABELS, rows=120) -> dict:
    rng = np.random.default_rng(0)
    y = np.arange(rows) % len(labels)
    groups = [f"g{i // 2}" for i in range(rows)]
    models, scores = [], []
    for i, name in enumerate(names):
        raw = rng.normal(size=(rows, len(labels))) + 1.2 * i * np.eye(len(labels))[y]
        before = Calibration(labels)
        after = Calibration(labels, "fitted", temperature=0.8, decision=Decision(abstain_below=0.5 if i else None))
        scores.append(after.apply(raw))
        parts = [evaluate(s, y, labels, groups=groups, replicates=100) for s in (before.apply(raw), scores[-1])]
        seen = contamination[i]
        models.append(
            {
                "model_dir": name,
                "calibration": "fitted",
                "contamination": None if seen is None else {"rows": seen, "of": rows},
                **parts[1],
                "uncalibrated": {"calibration": "none", **parts[0]},
                "decision": {"abstain_below": 0.5},
                "rows_per_s": 321.0,
            }
        )
    result = {
        "evaluator": "creditmix",
        "version": 1,
        "data": "data/creditmix_dataset.json",
        "data_sha256": "ab" * 32,
        "split": "validation",
        "n": rows,
        "labels": list(labels),
        "group_name": "customer",
        "models": models,
        "differences": [{"a": names[1], "b": names[0], **compare(scores[1], scores[0], y, groups, replicates=100)}]
        if len(names) > 1
        else [],
        "command": "python eval_creditmix.py --model_dir runs/base runs/sft",
        "versions": {"python": "3.11"},
    }
    result["drift"] = drift(result, result)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    report.write_report(path, made())
    return path


def test_files(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {"metrics.json", "report.html", "f1_per_class.png", "risk_coverage.png"} | {
        f"{kind}_{model}.png" for kind in ("confusion", "reliability", "margins") for model in ("1_base", "2_sft")
    }
    assert all(path.read_bytes().startswith(PNG) for path in folder.glob("*.png"))
    assert json.loads((folder / "metrics.json").read_text()) == made()


def test_page_needs_nothing_from_outside(folder):
    page = (folder / "report.html").read_text()
    assert "http://" not in page and "https://" not in page
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(sources) == 8 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in page and "@import" not in page and "url(" not in page


def test_page_says_what_was_measured(folder):
    page, result = (folder / "report.html").read_text(), made()
    sft = result["models"][1]
    headline = re.search("<h1>(.*?)</h1>", page)[1]
    assert headline == (
        f"<em>sft</em> is the most accurate of 2 models: {100 * sft['accuracy']['value']:.1f}&nbsp;% "
        "of 120 validation rows labelled correctly"
    )
    assert '<p class="banner good"><b>0 of 120 rows</b> share a customer with training.</p>' in page
    for text in ("ab" * 32, "bootstrap replicates of 60 customers", "No significant drop", "error rate among answers"):
        assert text in page


def test_everything_from_outside_is_escaped(tmp_path):
    labels = ("<b>Good</b>", "A&B", "$x^2$")
    result = made(("<script>alert(1)</script>", 'run"s'), labels=labels)
    result.update(data="<img src=x>", command="a <script> & b", split="<i>", group_name="<u>customer")
    result["versions"] = {"<p>": "<q>"}
    page = report.write_report(tmp_path, result).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    for raw in ("<b>Good", "<img src=x", "<i>", "<q>", "<u>", "A&B"):
        assert raw not in page
    assert all("/" not in path.name and "<" not in path.name for path in tmp_path.iterdir())


def test_contaminated_results_show_themselves(tmp_path):
    undrawn = defaultdict(lambda: PNG)
    page = report.render_html(made(contamination=(None, 119)), undrawn)
    assert "<b>119 of 120 rows</b> share a customer with the training rows of sft" in page
    assert "memory, not skill" in page and "Nobody recorded what base was trained on" in page
    assert "<em>base</em> is the most accurate" in page  # a model that trained on these rows cannot win
    alone = made(("runs/sft",), contamination=(119,))
    page = report.render_html(alone, undrawn)
    assert "119 of them of customers that it was trained on</h1>" in page


def test_table_shows_the_numbers():
    result = made()
    table = report.format_table(result)
    accuracy = result["models"][1]["accuracy"]
    assert f"{accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]*" in table
    assert "0 of 120" in table and "120 rows of data/creditmix_dataset.json" in table
    difference = result["differences"][0]["accuracy"]
    assert f"{difference['value']:+.3f}" in table and "sft - base" in table
    assert "true \\ predicted" in table and "Standard" in table
    head, rule, first, second = table.split("\n\n")[1].split("\n")
    assert len(rule) >= max(map(len, (head, first, second)))
    assert head.index("accuracy") + len("accuracy") == first.index("]") + 2  # right aligned, room for the star


def test_json_line_is_one_line_without_plot_data():
    result = made()
    result["rows"] = {"ids": ["a"], "y": [0]}
    line = report.json_line(result)
    assert "\n" not in line and "curves" not in line and "ids" not in line
    parsed = json.loads(line)
    assert parsed["models"][0]["accuracy"] == result["models"][0]["accuracy"]
    assert parsed["models"][0]["uncalibrated"]["ece"] == result["models"][0]["uncalibrated"]["ece"]
    assert "curves" in result["models"][0]  # the result itself is left whole


def test_many_labels_and_a_bare_result(tmp_path):
    labels = tuple(f"label {i}" for i in range(20))
    result = made(("model",), contamination=(0,), labels=labels, rows=400)
    for key in ("drift", "data_sha256", "command", "versions", "group_name", "differences"):
        del result[key]
    for key in ("uncalibrated", "rows_per_s", "decision"):
        del result["models"][0][key]
    page = report.write_report(tmp_path, result).read_text()
    assert "and 14 more" in page and "Before and after" not in page
    assert "label 19" in report.format_table(result)


def test_names_that_end_alike_are_told_apart():
    assert results.model_names(made(("a/sft", "b/sft"))) == ["a/sft", "b/sft"]
