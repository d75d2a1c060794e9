"""What a run was trained for: kept, found again, and compared with what it is asked for."""

from __future__ import annotations

import json

import pytest

from common.cli import UserError
from common.data import task_record
from common.files import sha256_file
from common.tasks.ranking.creditmix import CREDITMIX

SQUAD = {"kind": "squad", "name": "squad", "beginnings": ["Answer the question."], "prompt_endings": []}


def test_it_is_read_from_the_folder_and_else_from_the_run(tmp_path):
    assert task_record.read(tmp_path) is None
    (tmp_path / "run.json").write_text(json.dumps({"state": "done"}))
    assert task_record.read(tmp_path) is None  # a run from before
    (tmp_path / "run.json").write_text(json.dumps({"state": "done", "task": SQUAD}))
    assert task_record.read(tmp_path) == SQUAD
    task_record.write(tmp_path, CREDITMIX.record())
    assert task_record.read(tmp_path) == CREDITMIX.record()
    assert task_record.read("owner/name-on-the-hub") is None


@pytest.mark.parametrize("content", ["null", "3", "NaN", "[]", '"' + "x" * 300 + '"', "{", "[" * 100_000, "{}",
                                     '{"kind": "other", "name": "x"}', '{"kind": "labels", "name": "x"}',
                                     '{"kind": "rows", "name": "x", "beginnings": 3}'])  # fmt: skip
def test_a_broken_one_is_named(content, tmp_path):
    (tmp_path / "task.json").write_text(content)
    with pytest.raises(UserError, match=r"task\.json is broken"):
        task_record.read(tmp_path)
    (tmp_path / "task.json").unlink()
    (tmp_path / "run.json").write_text(content)
    assert task_record.read(tmp_path) is None  # whose faults are told elsewhere


def test_what_prompts_share():
    prompts = [f"Rate it.\n\nRow {i}" for i in range(60)] + [f"Sum it up.\n\nText {i}" for i in range(30)]
    assert task_record.beginnings([*prompts, "Once.\n\nx", "no blank line", "no blank line"]) == [
        "Rate it.",
        "Sum it up.",
    ]
    assert task_record.beginnings(["Rate it.\n\nx"]) == []


@pytest.mark.parametrize(
    ("record", "kind", "instruction", "admitted"),
    [
        (None, "labels", "Rate it.", True),
        (SQUAD, "squad", None, True),
        (SQUAD, "labels", "Rate it.", False),
        (SQUAD, "codegen", None, False),
        ({"kind": "rows", "beginnings": ["Rate it.", "Sum it up."]}, "labels", "Rate it.\n\nWith care.", True),
        ({"kind": "rows", "beginnings": ["Rate it.", "Sum it up."]}, "labels", "Guess it.", False),
        ({"kind": "rows", "beginnings": []}, "labels", "Rate it.", True),
        ({"kind": "rows", "beginnings": ["Rate it."]}, "codegen", None, True),
    ],
)
def test_what_it_admits(record, kind, instruction, admitted):
    assert task_record.admits(record, kind, instruction) is admitted


def test_a_manifest_vouches_for_its_own_file_alone(tmp_path):
    rows = tmp_path / "tickets_sft.jsonl"
    rows.write_text('{"input": "x", "output": "y"}\n')
    assert task_record.beside(rows) is None
    manifest = tmp_path / "tickets_manifest.json"
    content = {"files": {rows.name: {"sha256": sha256_file(rows)}}, "task_record": SQUAD}
    (tmp_path / "a_manifest.json").write_text("[")  # somebody else's
    manifest.write_text(json.dumps(content))
    assert task_record.beside(rows) == SQUAD
    rows.write_text('{"input": "other", "output": "y"}\n')
    assert task_record.beside(rows) is None
    manifest.write_text(json.dumps({"files": {rows.name: {"sha256": sha256_file(rows)}}}))  # from before
    assert task_record.beside(rows) is None


def test_rows_of_another_task_prove_nothing(tmp_path):
    task_record.write(tmp_path, SQUAD)
    task_record.check_prompts(str(tmp_path), ["Answer the question.\n\nWhen?"], "rows.jsonl")
    with pytest.raises(
        UserError, match=r"trained for answering questions .*no row of rows\.jsonl asks for that.*--task"
    ):
        task_record.check_prompts(str(tmp_path), [CREDITMIX.prompt("Age: 23")], "rows.jsonl")
