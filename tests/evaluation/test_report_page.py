"""The report: self-contained, escaped, honest about contamination; the terminal table shows the same numbers."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import defaultdict

import numpy as np
import pytest
from support.pages import SIZES, new_page, violations

from common.evaluation import results
from common.tasks.ranking import report, row_table
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


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Figures are any bytes: to draw them takes a second."""
    monkeypatch.setattr(report, "images_of", lambda result: defaultdict(lambda: PNG))


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


def test_contaminated_results_show_themselves(tmp_path, undrawn):
    page = report.write_report(tmp_path, made(contamination=(None, 119))).read_text()
    assert "<b>119 of 120 rows</b> share a customer with the training rows of sft" in page
    assert "memory, not skill" in page and "Nobody recorded what base was trained on" in page
    assert "<em>base</em> is the most accurate" in page  # a model that trained on these rows cannot win
    page = report.write_report(tmp_path, made(("runs/sft",), contamination=(119,))).read_text()
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


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [
        {
            "row": i + 1,
            "text": f"</script><b>row {i}",
            "label": LABELS[i % 3],
            "group": "g",
            "answers": {"base": {"label": "Good", "probability": 0.5}, "sft": {"label": "Bad", "probability": 0.9}},
        }
        for i in range(120)
    ]


def test_the_rows_stand_beside_and_in_the_page(tmp_path, rows, undrawn):
    page = report.write_report(tmp_path, made(), rows).read_text()
    assert [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()] == rows
    (data,) = re.findall(r'<script type="application/json" id="rows-data">(.*?)</script>', page, re.S)
    assert json.loads(data)["rows"][1] == [2, "</script><b>row 1", 1, [0, 2], [0.5, 0.9]]
    assert '<button type="button" data-model="1" data-true="0" data-predicted="2"' in page
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    assert not re.search(r"fetch\(|https?://|innerHTML|import\b", script)


def test_a_large_report_holds_the_mistakes_first(rows, monkeypatch):
    monkeypatch.setattr(row_table, "MOST_ROWS", 3)
    result = made(("runs/base",), contamination=(0,))
    sure = [row | {"answers": {"base": {"label": row["label"], "probability": 1.0}}} for row in rows]
    wrong = rows[119] | {"answers": {"base": {"label": "Good", "probability": 1.0}}}
    page = row_table.section(result, [*sure[:119], wrong])
    assert [row[0] for row in json.loads(re.search(r"rows-data\">(.*)</script>", page)[1])["rows"]] == [1, 2, 120]
    assert "The page holds 3 of the 120, mistakes first." in page


def test_one_warning_once(tmp_path, undrawn):
    page = report.write_report(tmp_path, made(contamination=(119, 119))).read_text()
    assert page.count("memory, not skill") == 1
    assert "training rows of base, sft: their figures measure memory, not skill" in page


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


@pytest.fixture(scope="module")
def file(tmp_path_factory, rows):
    """The page with its rows."""
    return report.write_report(tmp_path_factory.mktemp("rows"), made(), rows)


@pytest.mark.processes
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_a_cell_opens_its_rows_and_axe_finds_nothing(browser, file, scheme, size):
    page = new_page(browser, viewport=SIZES[size], color_scheme=scheme)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(file.as_uri())
    assert page.locator("#rows-count").inner_text() == "120 of 120 rows, 80 of them labelled wrongly by base"
    page.get_by_role("button", name=re.compile("of Good called Bad")).first.click()
    texts = page.locator("#rows-table tbody tr").all_inner_texts()
    assert len(texts) == 40 and all(text.split("\t")[1:3] == ["Good", "Bad"] for text in texts)  # what sft made of them
    page.get_by_label("Search the texts").fill("ROW 9")
    assert page.locator("#rows-table tbody tr").count() == 5  # 9, 90, 93, 96, 99
    assert page.locator("mark").first.inner_text() == "row 9"
    page.get_by_label("Search the texts").fill("")
    page.get_by_label("True label").select_option("any")
    page.get_by_label("Called").select_option("any")
    page.get_by_role("button", name="Next").click()
    assert page.locator("#rows-page").inner_text() == "page 2 of 3"
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size]["width"]
    assert faults == []
    assert violations(page) == []
    page.close()
