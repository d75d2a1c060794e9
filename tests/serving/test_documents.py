"""PDFs over HTTP, the confidence of fields, and code that is sent as it is written."""

from __future__ import annotations

import json
import math
from urllib.parse import urlencode

import pytest
from support.documents import pdf
from support.served import serve

from common.data.resumable import content_key
from common.models import adapters
from common.tasks.idp import calibration
from common.tasks.idp.calibration import ConfidenceCalibration

pytestmark = pytest.mark.processes
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


def send(served, content: bytes, schema: str = json.dumps(SCHEMA), **options):
    query = urlencode({"schema": schema, "run": "sft", **options})
    headers = {"Content-Type": "application/pdf"}
    status, answer, _ = served.ask("POST", f"/infer/idp/pdf?{query}", content, headers)
    return status, answer


def test_a_pdf_is_the_text_that_stands_in_it(served):
    status, answer = send(served, pdf("ACME", "Total 12.50"), evidence="true", confidence="true")
    assert status == 200 and answer["document"] == "ACME\nTotal 12.50"
    asked = {"document": answer["document"], "schema": SCHEMA, "run": "sft", "confidence": True}
    of_text = served.post("/infer/idp", asked)
    assert answer["fields"] == of_text["fields"] and answer["confidence"] == of_text["confidence"]
    assert 0 <= answer["confidence"]["ok"] <= 1
    assert set(answer["evidence"]) == {"ok"}
    assert "confidence" not in served.post("/infer/idp", asked | {"confidence": False})


def test_a_confidence_calibration_is_read_again_when_it_changes(own):
    run = own / "creditmix_sft"
    body = {"document": "Total 12.50", "schema": SCHEMA, "run": "sft", "confidence": True}
    facts = {"model_sha256": adapters.adapter_hash(run), "schema": content_key(SCHEMA)}
    with serve(own) as served:
        served.post("/infer/idp", body)
        for intercept in (-1.0, 2.0):
            ConfidenceCalibration(0.0, intercept, fitted_on=facts).save(run)
            sure = served.post("/infer/idp", body)["confidence"]["ok"]
            assert sure == pytest.approx(1 / (1 + math.exp(-intercept)), abs=1e-3)
        (run / calibration.FILE).write_text("{")
        assert calibration.FILE in served.refused(409, "/infer/idp", body)
        assert served.post("/infer/idp", body | {"confidence": False})["fields"]
        (run / calibration.FILE).unlink()
        served.post("/infer/idp", body)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the body is empty; send a PDF as it is"),
        (b"%PDF-1.4\nnothing", "the document is a broken PDF"),
        (pdf(), "the document has 1 pages and no text, as a scan has; recognise its text first"),
    ],
)
def test_what_is_no_pdf_with_text_is_refused_in_a_sentence(served, content, sentence):
    status, answer = send(served, content)
    assert status == 422 and sentence in answer["error"]["message"]


@pytest.mark.parametrize(("schema", "sentence"), [("{", "it is not JSON"), ("3", "a JSON object is needed")])
def test_a_broken_schema_is_named(served, schema, sentence):
    status, answer = send(served, pdf("x"), schema)
    assert status == 422 and sentence in answer["error"]["message"] and answer["error"]["param"] == "schema"


def test_a_pdf_has_a_size_and_a_time(runs, monkeypatch):
    with serve(runs, max_pdf_bytes=2000) as served:
        status, answer = send(served, pdf("x") + bytes(2000))
        assert status == 413 and "larger than 2,000 bytes" in answer["error"]["message"]
        monkeypatch.setattr(served.server.pdfs, "seconds", 1e-4)
        status, answer = send(served, pdf("x"))
        assert status == 422 and "takes longer than 0.0001 s; send fewer pages" in answer["error"]["message"]
        monkeypatch.setattr(served.server.pdfs, "seconds", 20.0)
        assert send(served, pdf("x"))[0] == 200


def code_events(served, body: dict) -> list[tuple[str, object]]:
    status, text, headers = served.ask("POST", "/infer/codegen", body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    lines = (event.split("\n") for event in text.strip().split("\n\n"))
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in lines]


def test_streamed_code_ends_with_the_answer(served):
    body = {"prompt": "Write add(a, b).", "run": "sft", "max_new_tokens": 24}
    whole = served.post("/infer/codegen", body)
    *parts, (kind, answer) = code_events(served, body | {"stream": True})
    assert kind == "answer" and answer == whole
    assert {kind for kind, _ in parts} <= {"text"}
    message = served.refused(422, "/infer/codegen", body | {"prompt": "7 " * 3000, "stream": True})
    assert "does not fit the model's context" in message
