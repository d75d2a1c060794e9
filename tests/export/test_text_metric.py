"""The metric of text tasks in a proof: of fields, words and programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.exported import export_run
from support.inputs import write_rows

from common.cli import UserError
from common.data import task_record
from common.export import parity, proof_table, text_metric
from common.export.parity import RuntimeResult, Speed
from common.export.proof_rows import read_proof_rows
from common.tasks.ranking.creditmix import CREDITMIX

FIELDS = {"company": "Anna", "total": 3}
PROBLEM = {"task_id": 1, "text": "Write a function add(a, b).", "code": "def add(a, b):\n    return a + b"}
TESTS = {"test_list": ["assert add(1, 2) == 3"], "test_imports": []}


def of_task(folder: Path, kind: str) -> str:
    """A folder of a model that was trained for a task."""
    folder.mkdir()
    task_record.write(folder, task_record.of_prompts(kind, kind, []))
    return str(folder)


def test_fields():
    metric = text_metric.of_outputs(task_record.IDP, [json.dumps(FIELDS)] * 3)
    answers = ['{"company": "Anna", "total": 3}', '<think>x</think>{"company": "Anna", "total": 4}', '{"company": "An']
    assert metric.name == "field_f1"
    assert metric.parts(answers).tolist() == [[4, 4], [2, 4], [0, 2]]
    with pytest.raises(UserError, match="the output of row 2 is no JSON"):
        text_metric.of_outputs(task_record.IDP, ["{}", "Anna"])


def test_words():
    metric = text_metric.of_outputs(task_record.SQUAD, ["the red ball", "a dog"])
    assert metric.name == "f1" and metric.parts(["red ball", "cat"]).tolist() == [[1.0, 1.0], [0.0, 1.0]]


@pytest.mark.processes
def test_programs(tmp_path):
    path = write_rows(tmp_path / "problems.jsonl", [PROBLEM | TESTS] * 3)
    coder = of_task(tmp_path / "run", task_record.CODEGEN)
    with pytest.raises(UserError, match="pass --confirm_run_unsafe_code, or give rows of input and output"):
        read_proof_rows(path, CREDITMIX, coder, None)
    rows = read_proof_rows(path, CREDITMIX, coder, None, runs_code=True)
    assert rows.text_metric.name == "pass_at_1" and rows.outputs[0] == f"<CODE>\n{PROBLEM['code']}\n</CODE>"
    of_base = read_proof_rows(path, CREDITMIX, str(tmp_path), None, runs_code=True)  # which has no task
    assert (of_base.prompts, of_base.text_metric.name) == (rows.prompts, "pass_at_1")
    right, wrong = rows.outputs[0], "<CODE>\ndef add(a, b):\n    return a - b\n</CODE>"
    assert rows.text_metric.parts([right, wrong, "I do not know."]).tolist() == [[1, 1], [0, 1], [0, 1]]


@pytest.mark.parametrize(("kind", "name"), [("idp", "field_f1"), ("squad", "f1"), ("rows", None)])
def test_a_run_knows_its_metric(kind, name, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"input": "Anna, 3", "output": json.dumps(FIELDS)}] * 2)
    rows = read_proof_rows(path, CREDITMIX, of_task(tmp_path / "run", kind), None)
    assert (rows.text_metric and rows.text_metric.name) == name


def test_the_difference_is_paired(tmp_path):
    """Four documents of two fields; the export loses one field of the eight."""
    path = write_rows(tmp_path / "rows.jsonl", [{"input": "Anna, 3", "output": json.dumps(FIELDS)}] * 4)
    rows = read_proof_rows(path, CREDITMIX, of_task(tmp_path / "run", task_record.IDP), None)

    def measured(answers: list[dict], nll: float) -> RuntimeResult:
        texts = [json.dumps(answer) for answer in answers]
        parts = rows.text_metric.parts(texts)
        logits, tokens = np.zeros((4, 2), dtype=np.float32), [[1]] * 4
        return RuntimeResult(
            logits, tokens, texts, Speed(1, 1.0, 1.0), nll=np.array([[nll, 1]] * 4), metric_parts=parts
        )

    before = measured([FIELDS] * 4, 1.0)
    after = measured([*[FIELDS] * 3, FIELDS | {"total": 9}], 1.1)
    proof = parity.compare(before, after, rows)
    assert proof["metric"]["name"] == "field_f1" and proof["metric"]["reference"]["value"] == 1.0
    assert proof["metric"]["export"]["value"] == pytest.approx(7 / 8)
    assert proof["metric"]["difference"]["value"] == pytest.approx(-1 / 8)
    assert proof["metric"]["difference"]["low"] < -1 / 8 < proof["metric"]["difference"]["high"] <= 0
    assert proof["likelihood"]["difference"]["value"] == pytest.approx(np.exp(-0.1) - 1)


def judged(reference: float, export: float, likelihood: float, most: float) -> tuple[str, bool]:
    def metric(name: str, before: float, change: float) -> dict:
        return {"name": name, "reference": {"value": before}, "difference": {"value": change}}

    proof = {"metric": metric("field_f1", reference, export - reference)}
    proof["likelihood"] = metric(proof_table.LIKELIHOOD, 0.5, likelihood)
    said = proof_table.verdict({"proof": proof}, most)
    return said["judged_by"], said["passed"]


@pytest.mark.parametrize("reference", [0.0, 0.001, 0.01, 0.0101, 0.5, 1.0])
def test_an_export_that_has_lost_everything_fails_whatever_the_metric_was(reference):
    assert judged(reference, 0.0, -0.9, 0.01)[1] is False
    assert judged(reference, reference, 0.0, 0.01)[1] is True


def test_what_is_judged():
    """One right answer of 125 is no more than the fall that is allowed."""
    assert judged(0.008, 0.0, -0.005, 0.01) == (proof_table.LIKELIHOOD, True)
    assert judged(0.008, 0.0, -0.02, 0.01) == (proof_table.LIKELIHOOD, False)
    assert judged(0.008, 0.0, -0.02, 0.001) == ("field_f1", False)
    assert judged(0.5, 0.495, -0.2, 0.01) == ("field_f1", True)
    assert judged(0.5, 0.0, -0.9, 1.0) == ("field_f1", True)  # which lets all pass


@pytest.mark.exports
def test_a_run_that_gets_nothing_right_is_judged_by_likelihood(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    task_record.write(copy, task_record.of_prompts(task_record.IDP, "idp", []))
    path = write_rows(tmp_path / "rows.jsonl", [{"input": "Anna, 3", "output": json.dumps(FIELDS)}] * 3)
    record = export_run(str(copy), "merged", tmp_path / "merged", path)
    assert record["judged_by"] == proof_table.LIKELIHOOD and record["proof"]["generated"]["prompts"] == 3
    assert "field_f1 of the run is 0.0000 on these rows, which cannot fall by more than" in capsys.readouterr().out
