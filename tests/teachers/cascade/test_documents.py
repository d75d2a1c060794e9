"""infer_idp.py --cascade and the server's /infer/idp: a teacher reads the documents that a model is not sure of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.inputs import read_rows, write_rows
from support.served import make_run, metric, serve
from support.teacher import SCHEMA, error

import infer_idp
import kd_train
from common import cli
from common.teachers.cascade.settings import CascadeSettings, RunTeacher, endpoint

pytestmark = pytest.mark.processes

DOCUMENTS = ["Acme Ltd, total USD 12.50", "Bar LLC, total USD 1,250.00", "Foo Inc, total USD 7"]
FIELDS = {"company": "Acme Ltd", "total": 12.5}


def reply_of(body: dict) -> str:
    return json.dumps(FIELDS)


def extract(student: Path, *more: object) -> tuple[int, list[dict]]:
    folder = student.parent
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    rows = write_rows(folder / "in.jsonl", [{"document": text, "id": n} for n, text in enumerate(DOCUMENTS)])
    out = folder / "out.jsonl"
    out.unlink(missing_ok=True)
    argv = ["--model_dir", student, "--schema", folder / "schema.json", "--input", rows, "--output", out,
            "--max_new_tokens", 64, *more]  # fmt: skip
    return cli.run(infer_idp.main, list(map(str, argv))), read_rows(out)


def test_unsure_documents_go_to_the_teacher(student, stub):
    stub.reply = reply_of
    argv = ("--cascade", stub.url, "--cascade_model", "big", "--cascade_below", 0.9999, "--cascade_keep")
    code, answers = extract(student, *argv)
    assert code == 0
    assert [answer["id"] for answer in answers] == [0, 1, 2]
    assert all((answer["fields"], answer["answered_by"]) == (FIELDS, "big") for answer in answers)
    assert len(stub.asked) == 3
    assert all("cut" not in answer and "error" not in answer for answer in answers)
    kept = read_rows(student / "cascade.jsonl")
    assert [DOCUMENTS[n] in row["input"] for n, row in enumerate(kept)] == [True] * 3
    kd_train.main(["--student", json.loads((student / "adapter_config.json").read_text())["base_model_name_or_path"],
                   "--data", str(student / "cascade.jsonl"), "--save_dir", str(student.parent / "kd"), "--idp_mode",
                   "--max_steps", "1"])  # fmt: skip


def test_sure_documents_stay(student, stub):
    _, alone = extract(student)
    _, answers = extract(student, "--cascade", stub.url, "--cascade_model", "big")
    for answer, own in zip(answers, alone, strict=True):
        if "cut" in own or "error" in own:
            assert answer["unsure"] is True  # "Good" is no JSON
            assert "cannot be used" in answer["cascade"]
        assert answer["answered_by"] == str(student)
        assert {key: answer[key] for key in own} == own


def test_what_the_teacher_does_not_answer_is_marked(student, stub):
    stub.reply = lambda body: error(400, "no")
    argv = ("--cascade", stub.url, "--cascade_model", "big", "--cascade_below", 0.9999, "--confidence")
    _, alone = extract(student, "--confidence")
    _, answers = extract(student, *argv)
    for answer, own in zip(answers, alone, strict=True):
        assert {key: answer[key] for key in own} == own
        assert (answer["unsure"], answer["answered_by"]) == (True, str(student))


def test_one_document(student, stub, capsys):
    stub.reply = reply_of
    (student.parent / "schema.json").write_text(json.dumps(SCHEMA))
    argv = ["--model_dir", student, "--schema", student.parent / "schema.json", "--document", DOCUMENTS[0], "--cascade",
            stub.url, "--cascade_model", "big", "--cascade_below", 0.9999, "--max_new_tokens", 64]  # fmt: skip
    assert infer_idp.main(list(map(str, argv))) is None
    assert json.loads(capsys.readouterr().out) == {"fields": FIELDS, "answered_by": "big"}


def test_the_server(student, stub):
    stub.reply = reply_of
    ask = {"document": DOCUMENTS[0], "schema": SCHEMA, "run": "student", "max_new_tokens": 64}
    cascade = CascadeSettings(endpoint(stub.url, "big", 5.0), 0.9999, per_hour=1, timeout=5.0)
    with serve(student.parent, cascade=cascade) as served:
        first, second = served.post("/infer/idp", ask), served.post("/infer/idp", ask)
        assert (first["fields"], first["answered_by"], first["error"], first["cut"]) == (FIELDS, "big", None, False)
        assert second["answered_by"] == str(student)
        assert (second["unsure"], second["cascade"]) == (True, "the budget of 1 rows an hour is used up")
        assert metric(served, 'cascade_rows_total{adapter="student",outcome="teacher"}') == 1


def test_a_larger_run_of_the_server(student, base):
    make_run(student.parent / "larger", base, seed=2)
    ask = {"document": DOCUMENTS[0], "schema": SCHEMA, "max_new_tokens": 96}
    with serve(student.parent) as plain:
        own, theirs = (plain.post("/infer/idp", ask | {"run": name}) for name in ("student", "larger"))
    with serve(student.parent, cascade=CascadeSettings(RunTeacher("larger"), 0.9999, timeout=30.0)) as served:
        answer = served.post("/infer/idp", ask | {"run": "student"})
    if theirs["error"] or theirs["cut"]:
        assert (answer["unsure"], answer["fields"]) == (True, own["fields"])
        assert answer["cascade"] == "the teacher has no whole, valid answer, either"
    else:
        assert (answer["fields"], answer["answered_by"]) == (theirs["fields"], "larger")
