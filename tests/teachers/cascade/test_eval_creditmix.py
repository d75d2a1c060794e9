"""eval_creditmix.py --cascade: an endpoint or a model as the teacher, asked once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.inputs import CORPUS, write_rows
from support.served import make_run
from support.teacher import question_of

import eval_creditmix
from common.cli import UserError
from common.tasks.ranking.creditmix import CREDITMIX

pytestmark = pytest.mark.processes

ROWS = [text.partition("\n\n")[2] for text in CORPUS[:24]]


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    return str(make_run(folder / "student", base, seed=1)), str(make_run(folder / "teacher", base, seed=2))


@pytest.fixture
def data(tmp_path) -> str:
    rows = [{"question": row, "answer": CREDITMIX.labels[place % 3]} for place, row in enumerate(ROWS)]
    return write_rows(tmp_path / "val.jsonl", rows)


def judged(data: str, *more: object) -> dict:
    argv = ["--data", data, "--split", "all", "--model_dir", *map(str, more)]
    assert eval_creditmix.main(argv) is None
    report = Path(data).parent / "report"
    return json.loads((report / "metrics.json").read_text())


def test_an_endpoint(runs, data, stub, tmp_path, capsys):
    gold = {CREDITMIX.prompt(CREDITMIX.clean(row)): CREDITMIX.labels[place % 3] for place, row in enumerate(ROWS)}
    stub.reply = lambda body: gold[question_of(body)]
    argv = (runs[0], "--cascade", stub.url, "--cascade_model", "big", "--cascade_price", 0.01)
    result = judged(data, *argv, "--report_dir", tmp_path / "report")
    cascade, (model,) = result["cascade"], result["cascade"]["models"]
    assert (cascade["teacher"], cascade["answered"], cascade["of"]) == ("big", result["n"], result["n"])
    assert cascade["teacher_accuracy"]["value"] == 1
    assert cascade["tokens"] == {"prompt": 100.0, "completion": 10.0}
    assert model["curve"][0]["accuracy"]["value"] == result["models"][0]["accuracy"]["value"]
    assert model["curve"][-1]["accuracy"]["value"] == 1
    assert model["curve"][-1]["price_per_1000"] == 10
    printed = capsys.readouterr().out
    assert "cascade to big alone: 1.000" in printed
    assert json.loads(printed.splitlines()[-1])["cascade"]["teacher"] == "big"
    assert "Cascade: what a teacher" in (tmp_path / "report" / "report.html").read_text()
    assert (tmp_path / "report" / "cascade.png").is_file()
    asked = len(stub.asked)
    assert asked == result["n"]
    judged(data, *argv, "--report_dir", tmp_path / "report")
    assert len(stub.asked) == asked


def test_a_model(runs, data, tmp_path):
    result = judged(data, runs[0], "--cascade", runs[1], "--report_dir", tmp_path / "report")
    assert [model["model_dir"] for model in result["models"]] == list(runs)  # the teacher is judged beside it
    (model,) = result["cascade"]["models"]
    assert model["model_dir"] == runs[0]
    accuracy = [entry["accuracy"]["value"] for entry in result["models"]]
    assert [model["curve"][place]["accuracy"]["value"] for place in (0, -1)] == accuracy
    assert result["cascade"]["teacher_accuracy"]["value"] == accuracy[1]
    assert model["curve"][-1]["price_per_1000"] is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--cascade_price", 1), "--cascade_price goes with --cascade"),
        (("--cascade", "http://localhost:1/v1"), "needs the model's name there"),
        (("--cascade", "STUDENT"), "names the model that is judged"),
        (("--cascade", "./nowhere"), "nowhere does not exist"),
        (("--cascade", "./nowhere", "--cascade_model", "m"), "--cascade_model is of a URL"),
        (("--cascade", "http://localhost:1/v1", "--cascade_model", "m", "--cascade_price", -1), "must be 0 or above"),
    ],
)
def test_what_cannot_work_is_refused(more, words, runs, data):
    with pytest.raises(UserError, match=words):
        judged(data, runs[0], *(runs[0] if word == "STUDENT" else word for word in more))
