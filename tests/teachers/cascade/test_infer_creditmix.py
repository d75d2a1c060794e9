"""infer_creditmix.py --cascade: who answered which row, and what is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.inputs import CORPUS, read_rows, write_rows
from support.served import make_run
from support.teacher import HANG

import infer_creditmix
import teacher_generate
from common.cli import UserError
from common.tasks.ranking import file_scoring
from common.tasks.ranking.calibration import Calibration
from common.tasks.ranking.creditmix import CREDITMIX, clean_features
from common.tasks.ranking.decision import Decision
from common.teachers.cascade.labels import LabelCascade

pytestmark = pytest.mark.processes

ROWS = [text.partition("\n\n")[2] for text in CORPUS[:24]]


def classify(student: Path, rows: list[str], *more: object) -> list[dict]:
    folder = student.parent
    source = write_rows(folder / "in.jsonl", [{"features": row} for row in rows])
    out = folder / "out.jsonl"
    out.unlink(missing_ok=True)
    infer_creditmix.main(["--model_dir", str(student), "--input", source, "--output", str(out), *map(str, more)])
    return read_rows(out)


def test_unsure_rows_go_to_the_teacher(student, stub, monkeypatch):
    alone = classify(student, ROWS)
    sure = [max(answer["probabilities"].values()) for answer in alone]
    below = sorted(sure)[12]
    stub.reply = lambda body: "Answer: Bad"
    argv = ("--cascade", stub.url, "--cascade_model", "big", "--cascade_below", below)
    answers = classify(student, ROWS, *argv)
    handed = [place for place, p in enumerate(sure) if p < below]
    assert 8 <= len(handed) <= 12
    for place, (answer, own) in enumerate(zip(answers, alone, strict=True)):
        if place in handed:
            assert answer == own | {"prediction": "Bad", "answered_by": "big"}
        else:
            assert answer == own | {"answered_by": str(student)}
    prompts = {body["messages"][0]["content"] for body in stub.asked}
    assert prompts == {CREDITMIX.prompt(clean_features(ROWS[place])) for place in handed}
    assert not (student / "cascade.jsonl").exists()  # nobody has consented


def test_what_is_kept_can_be_trained_on_and_asked_again(student, stub, tmp_path):
    stub.reply = lambda body: "Good"
    argv = ("--cascade", stub.url, "--cascade_model", "big", "--cascade_below", 0.999, "--cascade_keep")
    answers = classify(student, ROWS[:6], *argv)
    kept = read_rows(student / "cascade.jsonl")
    assert len(kept) == sum(answer["answered_by"] == "big" for answer in answers) > 0
    assert {row["teacher_output"] for row in kept} == {"Good"}
    assert kept[0]["group"] == CREDITMIX.group_of({"question": kept[0]["input"].partition("\n\n")[2]})
    out = tmp_path / "kd.jsonl"
    teacher_generate.main(
        ["--endpoint", stub.url, "--model", "m", "--data", str(student / "cascade.jsonl"), "--out", str(out)]
    )
    assert [row["group"] for row in read_rows(out)] == [row["group"] for row in kept]


def test_what_the_teacher_does_not_answer_is_marked(student, stub):
    stub.reply = lambda body: HANG
    argv = ("--cascade", stub.url, "--cascade_model", "big", "--cascade_below", 0.999, "--cascade_timeout", 0.2)
    alone = classify(student, ROWS[:3])
    for answer, own in zip(classify(student, ROWS[:3], *argv), alone, strict=True):
        assert answer["prediction"] == own["prediction"]
        assert answer["answered_by"] == str(student)
        assert answer["unsure"] is True
        assert "nothing within 0.2 seconds" in answer["cascade"]


def test_what_the_calibration_abstains_from_goes_to_a_larger_run(student, base):
    larger = make_run(student.parent / "larger", base, seed=2)
    theirs = classify(larger, ROWS)
    fitted, file = Calibration(CREDITMIX.labels, "fitted"), CREDITMIX.file_in(student, "calibration")
    fitted.save(file)
    median = sorted(max(answer["probabilities"].values()) for answer in classify(student, ROWS))[len(ROWS) // 2]
    replace(fitted, decision=Decision(abstain_below=median)).save(file)
    alone = classify(student, ROWS)
    abstained = [place for place, answer in enumerate(alone) if answer["prediction"] is None]
    assert 0 < len(abstained) < len(ROWS)
    assert all(alone[place]["leaning"] in CREDITMIX.labels for place in abstained)
    answers = classify(student, ROWS, "--cascade", larger)
    for place, answer in enumerate(answers):
        if place in abstained:
            assert (answer["prediction"], answer["answered_by"]) == (theirs[place]["prediction"], str(larger))
            assert "leaning" not in answer
        else:
            assert answer == alone[place] | {"answered_by": str(student)}


def test_one_row(student, stub, capsys):
    stub.reply = lambda body: "Standard"
    infer_creditmix.main(
        ["--model_dir", str(student), "--features", ROWS[0], "--cascade", stub.url, "--cascade_model", "big",
         "--cascade_below", "0.999"]
    )  # fmt: skip
    assert json.loads(capsys.readouterr().out)["answered_by"] == "big"


def test_an_interrupted_file_keeps_what_was_paid_for(student, stub, monkeypatch):
    monkeypatch.setattr(file_scoring, "HANDED_ON", 2)
    joined, calls = LabelCascade.joined, []

    def stop_at_the_third(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return joined(self, *args)

    monkeypatch.setattr(LabelCascade, "joined", stop_at_the_third)
    argv = ("--cascade", stub.url, "--cascade_model", "big", "--cascade_below", 0.9999)
    with pytest.raises(KeyboardInterrupt):
        classify(student, ROWS[:8], *argv)
    asked = len(stub.asked)
    assert asked == 6
    answers = classify(student, ROWS[:8], *argv)
    assert [answer["answered_by"] for answer in answers] == ["big"] * 8
    assert len(stub.asked) == asked + 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--cascade_below", 0.5), "--cascade_below goes with --cascade"),
        (("--cascade_keep",), "--cascade_keep goes with --cascade"),
        (("--cascade", "http://localhost:1/v1"), "needs the model's name there"),
        (("--cascade", "http://localhost:1/v1", "--cascade_model", "m", "--cascade_timeout", 0), "must be above 0"),
        (("--cascade", "http://localhost:1/v1", "--cascade_model", "m"), "abstains from nothing, so nothing would be"),
        (("--cascade", "./nowhere", "--cascade_below", 0.5), "nowhere does not exist"),
        (("--cascade", "./nowhere", "--cascade_model", "m"), "are of a URL; leave them out"),
        (("--cascade", "http://localhost:1/v1", "--engine", "ray"), "--cascade is for one machine"),
    ],
)
def test_what_cannot_work_is_refused(more, words, student):
    with pytest.raises(UserError, match=words):
        classify(student, ROWS[:1], *more)
