"""infer_creditmix.py: a row, or a file of them, on a base that trains in seconds."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.inputs import LABELS, write_rows

import eval_creditmix
import infer_creditmix
from common import cli
from common.cli import UserError
from common.models.source import ModelSource
from common.tasks.ranking import creditmix, file_scoring
from common.tasks.ranking.calibration import Calibration
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.settings import ScoringSettings

pytestmark = pytest.mark.processes

KEYS = ["model_name", "prediction", "scores", "raw_scores", "prior", "probabilities", "top2_margin"]
LINE = (
    "Age: 23.0, Occupation: Scientist, Annual Income: 19114.12, Outstanding Debt: 809.98, "
    "Credit Utilization Ratio: 35.03, Payment Behaviour: Low_spent_Small_value_payments"
)


@pytest.fixture
def infer(capsys):
    def run(model_dir: str, *argv: str) -> dict:
        capsys.readouterr()
        infer_creditmix.main(["--model_dir", model_dir, *argv])
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("method", ["none", "prior", "fitted", "default"])
def test_one_row(method, infer, fitted):
    answer = infer(fitted, "--features", LINE, *([] if method == "default" else ["--calibration", method]))
    assert list(answer) == KEYS
    assert answer["model_name"] == fitted
    for key in KEYS[2:6]:
        assert list(answer[key]) == list(LABELS)
    stored = json.loads(Path(fitted, "calibration.json").read_text())
    bias, temperature = dict.fromkeys(LABELS, 0.0), 1.0
    if method in ("fitted", "default"):
        bias, temperature = stored["bias"], stored["temperature"]
    if method == "none":
        assert set(answer["prior"].values()) == {0.0}
    for label in LABELS:
        expected = answer["raw_scores"][label] - answer["prior"][label] + bias[label]
        assert answer["scores"][label] == pytest.approx(expected, abs=3e-6)
    best = sorted(answer["scores"].values(), reverse=True)
    assert answer["scores"][answer["prediction"]] == best[0]
    assert answer["top2_margin"] == pytest.approx(best[0] - best[1], abs=3e-6)
    total = sum(math.exp(score / temperature) for score in best)
    for label in LABELS:
        share = math.exp(answer["scores"][label] / temperature) / total
        assert answer["probabilities"][label] == pytest.approx(share, abs=1e-5)
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=3e-6)


def test_label_bias_shifts_one_row(infer, trained):
    plain = infer(trained, "--features", LINE)
    shifted = infer(trained, "--features", LINE, "--label_bias", "Standard=0.3", "Bad=-40")
    for label, offset in (("Good", 0.0), ("Standard", 0.3), ("Bad", -40.0)):
        assert shifted["scores"][label] == pytest.approx(plain["scores"][label] + offset, abs=3e-6)
    assert shifted["raw_scores"] == plain["raw_scores"]
    assert shifted["probabilities"]["Bad"] < 1e-9


def test_features_are_cleaned_as_in_training(infer, trained):
    dirty = LINE.replace("23.0", "23").replace("19114.12", "19114.12_").replace("35.03", "35.0300001")
    assert infer(trained, "--features", dirty) == infer(trained, "--features", LINE)


@pytest.fixture(scope="session")
def questions(data) -> list[str]:
    return [row["question"] for row in creditmix.read_labelled(data / "creditmix_val.jsonl")[0]][:23]


def answers(model_dir: str, rows: str, output: Path, *more: str) -> list[dict]:
    infer_creditmix.main(["--model_dir", model_dir, "--input", rows, "--output", str(output), *more])
    return [json.loads(line) for line in output.read_text().splitlines()]


def near(one: list[dict], other: list[dict], tolerance: float) -> bool:
    def flat(answer: dict) -> list[float]:
        return [value for key in KEYS[2:6] for value in answer[key].values()] + [answer["top2_margin"]]

    assert [list(answer) for answer in one] == [list(answer) for answer in other]
    return np.abs(np.array([*map(flat, one)]) - np.array([*map(flat, other)])).max() < tolerance


def test_a_file_equals_one_by_one(trained, questions, tmp_path, infer):
    rows = [{"features" if i % 2 else "question": question, "id": i} for i, question in enumerate(questions)]
    found = answers(trained, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "new" / "answers.jsonl")
    assert near(found, [infer(trained, "--features", question) for question in questions], 1e-4)
    assert len({answer["raw_scores"]["Good"] for answer in found}) > 15  # so that the order is tested
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["answers.jsonl"]


@pytest.mark.parametrize("method", ["prior", "batch"])
def test_an_interrupted_file_without_a_key_goes_on(method, trained, questions, tmp_path, monkeypatch, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": question} for question in questions])
    whole = answers(trained, rows, tmp_path / "whole.jsonl", "--calibration", method)
    output, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    partial.write_text("".join(lines[:9]) + lines[9][:40])
    scored = []
    raw_scores = Classifier.raw_scores
    monkeypatch.setattr(Classifier, "raw_scores", lambda self, t: scored.append(len(t)) or raw_scores(self, t))
    assert near(answers(trained, rows, output, "--calibration", method), whole, 1e-5)
    assert output.read_text().startswith("".join(lines[:9]))
    assert f"going on after 9 answers of {output}" in capsys.readouterr().err
    assert scored == ([23] if method == "batch" else [1, 14])
    assert not partial.exists()


def test_rows_that_batch_calibration_has_scored_are_not_scored_again(base, questions, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": question} for question in questions])
    monkeypatch.setattr(file_scoring, "HANDED_ON", 8)
    scored, raw_scores = [], Classifier.raw_scores
    monkeypatch.setattr(Classifier, "raw_scores", lambda self, t: scored.append(len(t)) or raw_scores(self, t))
    source, settings = ModelSource(base), ScoringSettings(calibration="batch")
    scoring = file_scoring.FileScoring(source, CREDITMIX, settings, rows, str(tmp_path / "answers.jsonl"))
    file_scoring.classify_file(scoring, Classifier.load(source, CREDITMIX), lambda texts, own: own)
    assert scored == [23]


def test_ctrl_c_leaves_what_was_answered(trained, questions, tmp_path, monkeypatch, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": question} for question in questions])
    whole = answers(trained, rows, tmp_path / "whole.jsonl")
    argv = ["--model_dir", trained, "--input", rows, "--output", str(tmp_path / "answers.jsonl")]
    monkeypatch.setattr(file_scoring, "WINDOW", 8)
    given = Classifier.answers

    def interrupted(self, texts, *more):
        if texts[0] == questions[16]:
            raise KeyboardInterrupt
        return given(self, texts, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "answers", interrupted)
        assert cli.run(infer_creditmix.main, argv) == cli.INTERRUPTED
    (partial,) = tmp_path.glob("answers.jsonl.*.partial")
    assert partial.read_text().count("\n") == 16
    assert not (tmp_path / "answers.jsonl").exists()
    assert cli.run(infer_creditmix.main, argv) == 0
    assert "going on after 16 answers" in capsys.readouterr().err
    assert near([json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()], whole, 1e-5)


@pytest.mark.parametrize("stale", ["another model", "another bias", "other rows", "more rows", "garbage"])
def test_answers_of_something_else_are_not_kept(stale, distinct, base, questions, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": question} for question in questions])
    whole = answers(distinct, rows, tmp_path / "whole.jsonl")
    old = tmp_path / "old.jsonl"
    if stale == "another model":
        answers(base, rows, old)
    elif stale == "another bias":
        answers(distinct, rows, old, "--label_bias", "Bad=1")
    elif stale == "other rows":
        answers(distinct, write_rows(tmp_path / "back.jsonl", [{"question": q} for q in questions[::-1]]), old)
    elif stale == "more rows":
        answers(distinct, write_rows(tmp_path / "more.jsonl", [{"question": q} for q in questions * 2]), old)
    else:
        old.write_text("{}\n" * 5)
    lines = old.read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl.partial").write_text("".join(lines if stale == "more rows" else lines[:5]))
    capsys.readouterr()
    assert near(answers(distinct, rows, tmp_path / "answers.jsonl"), whole, 1e-5)
    assert "holds answers of another model, input or settings; starting again" in capsys.readouterr().err


def test_bad_rows(trained, questions, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    good = [json.dumps({"features": question}) for question in questions[:3]]
    rows.write_text("\n".join([good[0], "{broken", good[1], '{"features": ""}', '{"answer": "Good"}', "", good[2]]))
    argv = ["--model_dir", trained, "--input", str(rows), "--output", str(tmp_path / "answers.jsonl")]
    assert cli.run(infer_creditmix.main, argv) == cli.BAD_INPUT
    told = capsys.readouterr().err
    assert f"error: {rows}, line 2: not JSON" in told
    assert told.count("\n") == 1
    assert not list(tmp_path.glob("answers*"))
    found = answers(trained, str(rows), tmp_path / "answers.jsonl", "--skip_bad_rows")
    only = write_rows(tmp_path / "only.jsonl", [json.loads(row) for row in good])
    assert near(found, answers(trained, only, tmp_path / "only_answers.jsonl"), 1e-5)
    rejects = [json.loads(line) for line in (tmp_path / "answers.jsonl.rejects.jsonl").read_text().splitlines()]
    assert [reject["line"] for reject in rejects] == [2, 4, 5]
    assert (rejects[2]["row"], rejects[2]["fault"]) == ({"answer": "Good"}, "no text under 'question'")
    assert "3 bad rows" in capsys.readouterr().err
    answers(trained, only, tmp_path / "answers.jsonl", "--skip_bad_rows")
    assert not (tmp_path / "answers.jsonl.rejects.jsonl").exists()


def test_a_row_beyond_the_context_is_a_bad_row_before_the_model_loads(
    base, questions, data, tmp_path, monkeypatch, capsys
):
    texts = [*questions[:3], "Occupation: " + "9 " * 3000, questions[3]]
    rows = write_rows(tmp_path / "rows.jsonl", [{"features": text} for text in texts])
    argv = ["--model_dir", base, "--input", rows, "--output", str(tmp_path / "answers.jsonl")]
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "load", None)
        assert cli.run(infer_creditmix.main, argv) == cli.BAD_INPUT
        told = capsys.readouterr().err
        assert f"error: {rows}, line 4: the row has " in told
        assert "does not fit the model's context of 2048; mend the row, or pass --skip_bad_rows" in told
        judged = [
            row | {"question": texts[3]} if n == 1 else row
            for n, row in enumerate(creditmix.read_labelled(data / "creditmix_val.jsonl")[0])
        ]
        held_out = write_rows(tmp_path / "val.jsonl", judged)
        for flag in ("--data", "--fit_calibration"):
            with pytest.raises(UserError, match=r"val.jsonl, line 2: the row has \d+ tokens"):
                eval_creditmix.main(["--model_dir", base, flag, held_out])
        dev = str(data / "creditmix_dev.jsonl")
        with pytest.raises(UserError, match=r"val.jsonl, line 2: the row has \d+ tokens"):  # before anything is fitted
            eval_creditmix.main(["--model_dir", base, "--fit_calibration", dev, "--data", held_out])
    found = answers(base, rows, tmp_path / "answers.jsonl", "--skip_bad_rows")
    assert len(found) == 4
    (reject,) = [json.loads(line) for line in (tmp_path / "answers.jsonl.rejects.jsonl").read_text().splitlines()]
    assert (reject["line"], reject["row"]["features"]) == (4, texts[3])
    assert "does not fit the model's context" in reject["fault"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "give either --features, or --input and --output together"),
        (["--features", "a", "--input", "b", "--output", "c"], "give either --features"),
        (["--input", "a"], "give either --features"),
        (["--features", " "], "--features is empty; give a line such as"),
        (["--input", "/none.jsonl", "--output", "x"], "/none.jsonl does not exist"),
        (["--input", "same.jsonl", "--output", "./same.jsonl"], "would replace --input; choose another name"),
        (["--features", "a", "--label_bias", "Good"], "--label_bias Good is not LABEL=NUMBER"),
        (["--features", "a", "--label_bias", "Poor=1"], "unknown label 'Poor'; the labels are Good, Standard, Bad"),
        (["--features", "a", "--calibration", "fitted"], "has no fitted calibration; fit one with eval_creditmix.py"),
        (["--features", "Occupation: " + "9 " * 3000], "does not fit the model's context of 2048; shorten the row"),
    ],
)
def test_inference_usage_errors(argv, sentence, trained):
    with pytest.raises(UserError, match=sentence):
        infer_creditmix.main(["--model_dir", trained, *argv])


def test_a_calibration_of_other_labels_is_refused(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    Calibration(("A", "B"), "fitted").save(run / "calibration.json")
    with pytest.raises(UserError, match="was fitted for the labels A, B, not Good, Standard, Bad; fit it again"):
        infer_creditmix.main(["--model_dir", str(run), "--features", LINE])
