"""Documents with their fields as the rows of a proof: asked as the run was in its training."""

from __future__ import annotations

import json

import pytest
from support.inputs import CORPUS, read_rows, write_rows

import export_model
import idp_prepare
from common import cli
from common.data import task_record
from common.export.proof_rows import read_proof_rows
from common.tasks.idp import synthesis
from common.tasks.ranking.creditmix import CREDITMIX


@pytest.fixture(params=["written", "held"])
def prepared(request, tmp_path):
    """(a file of documents, the folder that idp_prepare.py made of it, a run that says it was trained on that)."""
    rows = [{key: row[key] for key in ("document", "fields")} for row in synthesis.synthesize(40, 0)]
    file = write_rows(tmp_path / "documents.jsonl", rows)
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(synthesis.SCHEMA))
    data, run = tmp_path / "data", tmp_path / "run"
    idp_prepare.main(["--src", file, "--schema", str(schema), "--typed_fields", request.param, "--outdir", str(data)])
    run.mkdir()
    task_record.write(run, task_record.beside(data / "idp_sft.jsonl"))
    return file, data, run


def test_they_are_asked_and_answered_as_in_training(prepared):
    file, data, run = prepared
    proof = read_proof_rows(file, CREDITMIX, str(run), None)
    asked = set(zip(proof.prompts, proof.outputs, strict=True))
    trained = [(row["input"], row["output"]) for row in read_rows(data / "idp_sft.jsonl")]
    assert len(proof.prompts) == 40 and len(trained) > 20 and asked.issuperset(trained)
    assert proof.text_metric.name == "field_f1"
    parts = proof.text_metric.parts(proof.outputs)
    assert (parts[:, 0] == parts[:, 1]).all()  # right answers are right
    dev = read_proof_rows(str(data / "idp_dev.jsonl"), CREDITMIX, str(run), 2)
    assert len(dev.prompts) == 2 and asked.issuperset(zip(dev.prompts, dev.outputs, strict=True))


def test_a_base_is_asked_what_the_manifest_of_the_rows_says(prepared, tmp_path):
    _, data, run = prepared
    dev = str(data / "idp_dev.jsonl")
    of_run, of_base = (read_proof_rows(dev, CREDITMIX, str(model), None) for model in (run, tmp_path / "base"))
    assert (of_base.prompts, of_base.outputs) == (of_run.prompts, of_run.outputs)
    assert of_base.text_metric.name == "field_f1"


def test_a_run_that_does_not_know_its_schema_takes_rows_of_text(prepared):
    file, _, run = prepared
    task_record.write(run, task_record.of_prompts(task_record.IDP, "idp", []))
    with pytest.raises(cli.UserError, match="does not say for which JSON Schema it was trained"):
        read_proof_rows(file, CREDITMIX, str(run), None)


@pytest.mark.parametrize("kind", [task_record.IDP, task_record.CODEGEN])
def test_the_dev_rows_of_its_task_are_the_default(kind, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(task_record, "read", lambda folder: task_record.of_prompts(kind, kind, CORPUS[:2]))
    argv = ["--model_dir", tiny_base, "--format", "merged", "--save_dir", "export"]
    with pytest.raises(cli.UserError, match=f"data/{kind}_dev.jsonl does not exist"):
        export_model.main(argv)
