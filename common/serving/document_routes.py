"""The routes of the document task: a text or a PDF to JSON of a schema."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, FiniteFloat

from common.cli import UserError
from common.data import task_record
from common.generation import json_schema
from common.serving.fields import MAX_TEXT, RunName, Text, Tokens, check_task, with_fields
from common.serving.helpers import HelperEnded
from common.serving.model_process import QueueFull
from common.serving.run_registry import Version
from common.serving.server import Server
from common.serving.sizes import estimate
from common.serving.work import ANSWER_TOKENS, Extract
from common.tasks.idp import documents
from common.tasks.idp import prompt as idp_prompt
from common.tasks.idp.confidence import DIGITS
from common.tasks.idp.readers import OFFSET, ReadingSettings
from common.web.app import Problem, responses

if TYPE_CHECKING:
    from common.tasks.idp.extractor import Extraction

MAX_LINES = 20_000  # of a document
MAX_SCHEMA = 16_000  # characters of one in an address
PDF_PATH = "/infer/idp/pdf"
PDF_BODY = {"required": True, "content": {"application/pdf": {"schema": {"type": "string", "format": "binary"}}}}


class DocumentLine(BaseModel):
    """A line or a word of a document, and where it stands on its page."""

    text: str
    box: Annotated[
        list[FiniteFloat], Field(min_length=4, max_length=4, description="x0, y0, x1, y1 from the upper left")
    ]
    page: Annotated[int, Field(ge=1)] = 1


class ExtractOptions(BaseModel):
    """How a document is read, whatever it comes as."""

    run: RunName | None = Field(None, description="default: the newest run trained for it, else the base")
    max_new_tokens: Tokens = ANSWER_TOKENS
    on_cut: Literal["retry", "flag"] = Field(
        "retry", description="An answer that `max_new_tokens` has cut: once more with twice of it, or only flag it"
    )
    thinking: bool = Field(False, description="Let a reasoning model think first, within max_new_tokens of its own")
    typed_fields: Literal["written", "held"] | None = Field(
        None, description="As `--typed_fields` of infer_idp.py; default: as the run was trained, else written"
    )
    dates: Literal["day", "month", "year"] | None = Field(
        None, description="What comes first in 03/04/2019 or 18-01-05; default: as shown"
    )
    utc_offset: Annotated[str, Field(pattern=f"^(?:{OFFSET})$")] = "Z"
    evidence: bool = Field(False, description="Say where each field stands in the document")
    confidence: bool = Field(False, description="Say how sure the model is of each field")


class ExtractRequest(ExtractOptions):
    document: Text
    json_schema: dict[str, Any] | None = Field(
        None, alias="schema", description="JSON Schema of the fields; default: the run's own, else IDP_SCHEMA"
    )
    lines: Annotated[list[DocumentLine], Field(max_length=MAX_LINES)] = Field(
        [], description="What the document is made of, for the boxes of the evidence"
    )


class PdfOptions(ExtractOptions):
    json_schema: Annotated[str, Field(max_length=MAX_SCHEMA)] | None = Field(
        None, alias="schema", description="JSON Schema of the fields, as JSON; default: the run's own, else IDP_SCHEMA"
    )


class ExtractAnswer(BaseModel):
    """`fields` is valid by the schema, or null where `error` says why there is no valid answer."""

    model_name: str
    fields: Any
    error: str | None
    text: str | None = Field(description="What the model wrote, where there is an error")
    pieces: int = Field(description="In how many pieces a long document was read")
    cut: bool = Field(description="The token budget ended the answer, also at the second try, or a value in it ran on")
    written: dict[str, Any] | None = Field(description="Each field as the model copied it, by its path")
    notes: list[str] = Field(description="What is not sure about dates, times and numbers")
    answered_by: str | None = Field(None, description="With a cascade: the run, or the teacher")
    unsure: bool | None = Field(None, description="True where the teacher was to answer, and did not")
    cascade: str | None = Field(None, description="Why it did not")
    evidence: dict[str, Any] | None = Field(None, description="As `infer_idp.py --evidence` gives it, where asked for")
    confidence: dict[str, float] | None = Field(
        None, description="Of each field by its path, where asked for: the probability of its characters, calibrated"
    )
    document: str | None = Field(None, description="The text in which the evidence counts characters")


def add_extraction(app: FastAPI, server: Server) -> None:
    """The routes; they come before /infer/{run}."""

    @app.post("/infer/idp", response_model=ExtractAnswer, responses=responses(404, 409, 422, 503, 504))
    async def extract(body: ExtractRequest, request: Request) -> Response:
        """A document's fields as JSON that is valid by the schema, as infer_idp.py gives them."""
        return JSONResponse(await extract_fields(server, request, body))

    @app.post(
        PDF_PATH,
        response_model=ExtractAnswer,
        responses=responses(404, 409, 422, 503, 504),
        openapi_extra={"requestBody": PDF_BODY},
    )
    async def extract_from_pdf(options: Annotated[PdfOptions, Query()], request: Request) -> Response:
        """The same of a PDF, which is the body; its text layer is read."""
        try:
            schema = None if options.json_schema is None else json.loads(options.json_schema)
        except (ValueError, RecursionError):
            raise Problem(422, "schema: it is not JSON", "schema") from None
        if not isinstance(schema, dict | None):
            raise Problem(422, "schema: a JSON object is needed", "schema")
        read = await read_pdf(server, await request.body())
        facts = options.model_dump(exclude={"json_schema"}) | {key: read[key] for key in ("document", "lines")}
        answer = await extract_fields(server, request, ExtractRequest(**facts, schema=schema))
        if read["empty"]:
            answer["notes"] = [*answer["notes"], f"{read['empty']} of {read['pages']} pages have no text"]
        return JSONResponse(answer)


async def read_pdf(server: Server, content: bytes) -> dict[str, Any]:
    """What `pdf_worker` reads in a PDF. Raises Problem 422 for one that cannot be read, 503 where too many wait."""
    if not content:
        raise Problem(422, "the body is empty; send a PDF as it is, with the header Content-Type: application/pdf")
    try:
        read = await server.pdfs.ask({"pdf": base64.b64encode(content).decode()})
    except QueueFull:
        raise Problem(503, "too many PDFs wait to be read; try again", retry_after=1) from None
    except TimeoutError:
        raise Problem(422, f"reading the PDF takes longer than {server.pdfs.seconds:g} s; send fewer pages") from None
    except HelperEnded:
        raise Problem(422, "the PDF ends the process that reads it; send its text instead") from None
    if "error" in read:
        raise Problem(422, read["error"])
    if len(read["document"]) > MAX_TEXT or len(read.get("lines", ())) > MAX_LINES:
        raise Problem(422, f"the PDF has more than {MAX_TEXT:,} characters or {MAX_LINES:,} words; send fewer pages")
    return {"lines": []} | read


async def extract_fields(server: Server, request: Request, body: ExtractRequest) -> dict[str, Any]:
    """What /infer/idp answers. Raises Problem."""
    started = time.perf_counter()
    version = await server.find(body.run or server.newest("idp"))
    check_task(version, task_record.IDP, idp_prompt.INSTRUCTION, "extracting fields from documents")
    schema = body.json_schema
    if schema is None:
        schema = schema_of(version, server.settings.idp_schema)
    await server.check_schema(schema, "schema")
    reading = ReadingSettings(body.dates, body.utc_offset)
    work = Extract(json.dumps(schema), body.max_new_tokens, body.on_cut, body.thinking, reading, body.typed_fields)
    work = replace(work, confidence=body.confidence or bool(server.cascade and server.cascade.below))
    extraction, who = await server.answer(request, version, work, body.document, tokens=estimate(body.document)), {}
    if server.cascade:
        answered = await server.cascade.extraction(request, version, work, body.document, extraction)
        extraction, who = answered.extraction, answered.facts
    error = extraction.error
    facts = {"valid": error is None, "cut": extraction.cut is not None, "tokens": extraction.tokens}
    server.record(request, version, work.name, started, body.document, **facts)
    answer = {
        "model_name": version.model_dir,
        "fields": None if error else extraction.value,
        "error": error and with_fields(error),
        "text": extraction.text if error else None,
        "pieces": extraction.pieces,
        "cut": extraction.cut is not None,
        "written": None if error else extraction.written_leaves,
        "notes": list(map(with_fields, extraction.notes)),
    } | who
    if body.confidence:
        sure = {} if error else extraction.confidence or {}
        answer["confidence"] = {name: round(value, DIGITS) for name, value in sure.items()}
    if body.evidence:
        answer |= await find_evidence(server, body, extraction)
    return answer


async def find_evidence(server: Server, body: ExtractRequest, extraction: Extraction) -> dict[str, Any]:
    """Where the fields stand, and the text that it counts in; a note where that takes too long.

    Raises:
        Problem: 503, too many wait for theirs.
    """
    text = await asyncio.to_thread(documents.clean, body.document)
    answer = {"evidence": None, "document": text}
    if extraction.error:
        return answer
    try:
        asked = body.model_dump(include={"document", "lines"}) | {"value": extraction.as_written}
        return answer | await server.evidence.ask(asked)
    except QueueFull:
        raise Problem(503, "too many requests wait for their evidence; try again", retry_after=1) from None
    except (TimeoutError, HelperEnded):
        late = "where the fields stand could not be found in time; send a shorter document, or ask for fewer fields"
        return answer | {"notes": [*extraction.notes, late]}


def schema_of(version: Version, path: str) -> dict[str, Any]:
    """The schema of requests that bring none: what the run was trained for; of one that does not say the default.

    Args:
        path: of the default.

    Raises:
        Problem: 422, there is no such file; 409, it holds no schema.
    """
    trained = json.loads(version.task).get("schema") if version.task else None
    if trained is not None:
        return trained
    if not Path(path).is_file():
        raise Problem(422, f"send a schema: there is no {path}, where IDP_SCHEMA says the default one is", "schema")
    try:
        return json_schema.load(path)
    except UserError as error:
        raise Problem(409, f"the default schema cannot be used: {error}", "schema") from error
