"""infer_codegen.py --cascade and the server's /infer/codegen: a teacher writes what a model has no program for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.inputs import read_rows, write_rows
from support.served import make_run, metric, serve

import infer_codegen
from common import cli
from common.tasks.codegen.writer import CodeAnswer
from common.teachers.cascade.handing import cascade_of
from common.teachers.cascade.programs import CodeCascade
from common.teachers.cascade.settings import CascadeSettings, RunTeacher, endpoint

pytestmark = pytest.mark.processes

TASKS = [
    "Write a function add(a, b) that adds two numbers.",
    "Write a function twice(x).",
    "Write a function third(x).",
]
ADD = "def add(a, b):\n    return a + b"
WRONG = "def add(a, b):\n    return a - b"
TEST = ("--test", "assert add(1, 2) == 3", "--max_tries", 1, "--confirm_run_unsafe_code")


def write(student: Path, *more: object) -> int:
    return cli.run(infer_codegen.main, [*map(str, ("--model_dir", student, "--max_new_tokens", 8, *more))])


def write_file(student: Path, *more: object) -> tuple[int, list[dict]]:
    rows = write_rows(student.parent / "in.jsonl", [{"prompt": task} for task in TASKS])
    out = student.parent / "out.jsonl"
    out.unlink(missing_ok=True)
    return write(student, "--input", rows, "--output", out, *more), read_rows(out)


def test_what_is_no_program_goes_to_the_teacher(student, stub):
    stub.reply = lambda body: f"Here it is:\n```python\n{ADD}\n```"
    code, answers = write_file(student, "--cascade", stub.url, "--cascade_model", "big", "--cascade_keep")
    assert code == 0
    assert [answer["prompt"] for answer in answers] == TASKS
    for answer in answers:
        assert answer["answered_by"] == "big"
        assert answer["answers"] == [{"plan": "", "code": ADD, "error": None}]
    kept = read_rows(student / "cascade.jsonl")
    assert [task in row["input"] for task, row in zip(TASKS, kept, strict=True)] == [True] * 3
    assert len({row["group"] for row in kept}) == 3


def test_what_the_teacher_cannot_write_either_is_marked(student, stub):
    stub.reply = lambda body: "def add(a, b:"
    _, alone = write_file(student)
    code, answers = write_file(student, "--cascade", stub.url, "--cascade_model", "big", "--cascade_per_hour", 2)
    assert code == 1
    for answer, own in zip(answers, alone, strict=True):
        assert {key: answer[key] for key in own} == own
        assert (answer["unsure"], answer["answered_by"]) == (True, str(student))
    reasons = [answer["cascade"] for answer in answers]
    assert sum("the teacher's answer cannot be used: the code does not compile" in reason for reason in reasons) == 2
    assert reasons.count("the budget of 2 rows an hour is used up") == 1


def test_a_program_stays(student, stub):
    settings = CascadeSettings(endpoint(stub.url, "big", 5.0))
    cascade = CodeCascade(cascade_of(settings, None), str(student))
    own = [CodeAnswer(ADD, "", True, 9), CodeAnswer(WRONG, "", True, 9)]
    answered = dict(cascade.in_turn(TASKS, enumerate(own)))
    assert [answered[index].answer for index in range(2)] == own
    assert all(answered[index].facts == {"answered_by": str(student)} for index in range(2))
    assert stub.asked == []


@pytest.mark.parametrize(("reply", "code", "by"), [(ADD, 0, "big"), (WRONG, 1, "student")], ids=["passes", "fails"])
def test_the_teacher_s_code_has_to_pass_the_tests(reply, code, by, student, stub, capsys):
    stub.reply = lambda body: reply
    argv = ("--prompt", TASKS[0], *TEST, "--cascade", stub.url, "--cascade_model", "big", "--cascade_keep")
    assert write(student, *argv) == code
    said = capsys.readouterr()
    assert (said.out == ADD + "\n") == (by == "big")
    assert "assert add(1, 2) == 3" in stub.asked[0]["messages"][-1]["content"]
    assert ("answered by big" in said.err) == (by == "big")
    assert ("the code fails its tests" in said.err) == (by == "student")
    assert (student / "cascade.jsonl").exists() == (by == "big")


def test_one_task(student, stub, capsys):
    stub.reply = lambda body: ADD
    assert write(student, "--prompt", TASKS[0], "--cascade", stub.url, "--cascade_model", "big") == 0
    assert capsys.readouterr().out == ADD + "\n"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--cascade_below", 0.5), "--cascade_below is of a probability, which code has none of"),
        (("--num_samples", 2), "--cascade goes with one answer to a task"),
    ],
)
def test_what_cannot_work_is_refused(more, words, student, stub, capsys):
    argv = ("--prompt", TASKS[0], "--cascade", stub.url, "--cascade_model", "big", *more)
    assert write(student, *argv) == 2
    assert words in capsys.readouterr().err


def events_of(text: str) -> list[tuple[str, dict]]:
    parts = [part.splitlines() for part in text.strip().split("\n\n")]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in parts]


def test_the_server(student, stub):
    stub.reply = lambda body: ADD
    ask = {"prompt": TASKS[0], "run": "student", "max_new_tokens": 8}
    cascade = CascadeSettings(endpoint(stub.url, "big", 5.0), per_hour=2, timeout=5.0)
    with serve(student.parent, cascade=cascade) as served:
        first = served.post("/infer/codegen", ask)
        assert (first["code"], first["answered_by"], first["error"], first["cut"]) == (ADD, "big", None, False)
        _, text, _ = served.ask("POST", "/infer/codegen", ask | {"stream": True})
        kind, streamed = events_of(text)[-1]
        assert (kind, streamed["code"], streamed["answered_by"]) == ("answer", ADD, "big")
        second = served.post("/infer/codegen", ask)
        assert second["answered_by"] == str(student)
        assert (second["unsure"], second["cascade"]) == (True, "the budget of 2 rows an hour is used up")
        assert metric(served, 'cascade_rows_total{adapter="student",outcome="teacher"}') == 2


def test_a_larger_run_of_the_server(student, base):
    make_run(student.parent / "larger", base, seed=2)
    ask = {"prompt": TASKS[0], "max_new_tokens": 8}
    with serve(student.parent, cascade=CascadeSettings(RunTeacher("larger"), timeout=30.0)) as served:
        own, theirs = (served.post("/infer/codegen", ask | {"run": name}) for name in ("student", "larger"))
    assert theirs["answered_by"].endswith("larger")
    assert "unsure" not in theirs  # it does not ask itself
    assert (own["unsure"], own["cascade"]) == (True, "the teacher has no whole program, either")
