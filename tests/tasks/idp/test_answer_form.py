"""How models are asked for a document's fields: a run as its rows were, an untrained model with the schema last."""

from __future__ import annotations

import json

import pytest
from support.documents import SCHEMA

from common.data import task_record
from common.models import loading as models
from common.models.source import LoadedModel, ModelSource
from common.tasks.idp import prompt
from common.tasks.idp.answer_form import AnswerForm, form_of
from common.tasks.idp.extractor import ExtractionSettings, Extractor

DOCUMENT = "Invoice 77\nTotal 12.50"
TRAINED = {"kind": task_record.IDP, "name": "idp", "typed_fields": "held", "json_spacing": "compact"}


@pytest.fixture
def run(tmp_path) -> str:
    (tmp_path / task_record.FILE).write_text(json.dumps(TRAINED))
    return str(tmp_path)


def test_a_run_keeps_the_form_of_its_rows(run, tiny_base):
    assert form_of(run) == AnswerForm("held", spaced=False, schema_last=False)
    assert form_of(tiny_base) == AnswerForm("written", spaced=True, schema_last=True)
    assert form_of(tiny_base, "held") == AnswerForm("held", spaced=True, schema_last=True)


def test_only_an_untrained_model_reads_the_schema_last(run, tiny_base):
    loaded = LoadedModel(*models.load_for_inference(ModelSource(tiny_base)), 8192)

    def asked(model_dir: str) -> str:
        extractor = Extractor(loaded, SCHEMA, None, ExtractionSettings(80), form_of(model_dir, "held"))
        return loaded.tokenizer.decode(extractor.encode(DOCUMENT))

    schema = prompt.SCHEMAS["held"] + json.dumps(SCHEMA, separators=(",", ":"))
    assert f"{prompt.INSTRUCTION}\n\n{schema}\n\nDocument:\n{DOCUMENT}" in asked(run)
    assert f"Document:\n{DOCUMENT}\n\n{prompt.INSTRUCTION}\n\n{schema}" in asked(tiny_base)
