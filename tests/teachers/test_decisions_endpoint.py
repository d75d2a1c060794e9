"""A decisions endpoint as a teacher: the probability of each label, kept and retried like a chat API's answers."""

from __future__ import annotations

import json

import pytest
from support.served import make_run, serve
from support.teacher import error, lines, numbered, rejects_of, run_of

import teacher_generate
from common.cli import UserError
from common.data import task_record
from common.models.source import ModelSource
from common.tasks.ranking.calibration import Calibration
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.creditmix import CREDITMIX

SHARES = {"Good": 0.2, "Standard": 0.7, "Bad": 0.1}


def generate(url: str, *argv: str) -> int | None:
    given = ["--endpoint", url, "--model", "m", "--concurrency", "1", "--probabilities"]
    return teacher_generate.main([*given, *argv])


def answer(shares=SHARES, choice: str = "Standard", **more) -> tuple[int, dict, bytes]:
    given = [{"value": label, "probability": share} for label, share in shares.items()]
    one = {"type": "choice", "name": "label", "choice": choice, "confidence": 0.5, "probabilities": given} | more
    return 200, {}, json.dumps({"answers": [one], "usage": {"input_tokens": 9, "output_tokens": 0}}).encode()


def test_openais_shape(stub, files):
    rows = numbered(2, output="Standard", group="ab" * 8)
    replies = iter([error(503, "busy"), answer(), answer(), answer(type="refusal")])
    stub.reply = lambda body: next(replies)
    assert generate(f"{stub.url}/decisions", *files(rows)) is None
    assert stub.asked[1] == {
        "model": "m",
        "input": "Age: 20",
        "questions": [
            {
                "type": "choice",
                "name": "label",
                "instructions": CREDITMIX.instruction,
                "choices": [{"value": label} for label in CREDITMIX.labels],
            }
        ],
    }
    first, second = lines(files.out)
    assert first == {
        "input": rows[0]["input"],
        "teacher_output": "Standard",
        "probabilities": SHARES,
        "output": "Standard",
        "group": "ab" * 8,
    }
    assert second["probabilities"] == SHARES
    kept = lines(f"{files.out}.raw.jsonl")[0]["value"]
    assert (kept["attempts"], kept["prompt_tokens"], kept["probabilities"]) == (2, 9, SHARES)
    # what was answered is not asked again; a refusal is no row, and is named
    assert generate(f"{stub.url}/decisions", *files([*rows, *numbered(3)[2:]])) is None
    assert len(stub.asked) == 4
    assert rejects_of(files)[0]["reason"] == "the endpoint declines to answer"
    assert run_of(files)["requests"]["asked_now"] == 0


def test_an_endpoint_may_decline_any_number_of_rows(stub, files):
    declined = numbered(12)
    stub.reply = lambda body: answer() if body["input"] == "Age: 32" else answer(type="refusal")
    assert generate(f"{stub.url}/decisions", *files(numbered(13))) is None
    assert [row["input"] for row in rejects_of(files)] == [row["input"] for row in declined]


def test_system_ones_shape(stub, files):
    one = {"type": "choice", "choice": "Standard", "confidence": 0.5, "probabilities": SHARES}
    stub.reply = lambda body: (200, {}, json.dumps({"model": "m", "answers": {"label": one}}).encode())
    assert generate(f"{stub.url}/systemone", *files(numbered(1)), "--extra_body", '{"seed": 1}') is None
    criteria = dict.fromkeys(CREDITMIX.labels)
    question = {"type": "choice", "instructions": CREDITMIX.instruction, "criteria": criteria}
    assert stub.asked == [{"model": "m", "state": "Age: 20", "questions": {"label": question}, "seed": 1}]
    assert lines(files.out)[0]["probabilities"] == SHARES


@pytest.mark.parametrize(
    "reply",
    [
        answer({"Good": 0.2, "Bad": 0.8}),
        answer({**SHARES, "Other": 0.0}),
        answer({**SHARES, "Bad": 0.9}),
        answer({**SHARES, "Bad": -0.9, "Good": 1.2}),
        (200, {}, b'{"answers": []}'),
    ],
)
def test_an_answer_that_is_none_is_asked_for_again(stub, files, reply):
    stub.reply = lambda body: reply
    assert generate(f"{stub.url}/decisions", *files(numbered(1)), "--max_attempts", "2") == 1
    assert len(stub.asked) == 2
    assert "not an answer of a decisions API" in rejects_of(files)[0]["reason"]


def test_rows_of_another_instruction_are_refused(stub, files):
    with pytest.raises(UserError, match="does not begin with the instruction of creditmix"):
        generate(f"{stub.url}/decisions", *files([{"input": "Age: 3"}]))


@pytest.mark.processes
def test_our_own_server_teaches_what_its_ranker_says(base, files, tmp_path):
    """With the calibration that was fitted for the run."""
    run = make_run(tmp_path / "runs" / "creditmix_sft", base, 1)
    task_record.write(run, CREDITMIX.record())
    Calibration(CREDITMIX.labels, "fitted", bias=(0.3, 0.0, -0.3), temperature=2.0).save(run / "calibration.json")
    classifier = Classifier.load(ModelSource(str(run)), CREDITMIX)
    wanted = classifier.answers([f"Age: {20 + i}" for i in range(3)], classifier.calibration(None))
    with serve(tmp_path / "runs") as served:
        for route in ("decisions", "systemone"):
            argv = ["--endpoint", f"{served.url}/v1/{route}", "--model", "sft", "--probabilities"]
            assert teacher_generate.main([*argv, *files(numbered(3))]) is None
            for row, answered in zip(lines(files.out), wanted, strict=True):
                assert row["probabilities"] == pytest.approx(answered["probabilities"], abs=1e-4)
