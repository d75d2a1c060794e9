"""The inference server's routes: the page, the runs, and the three tasks; OpenAI's are in `openai_routes`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from common.cli import UserError
from common.data import task_record
from common.generation import json_schema
from common.serving import label_tasks
from common.serving.decision_routes import add_decisions
from common.serving.helpers import HelperEnded
from common.serving.model_process import QueueFull
from common.serving.openai_routes import add_chat
from common.serving.run_registry import Version
from common.serving.server import Server, estimate
from common.serving.settings import ServerSettings
from common.serving.work import ANSWER_TOKENS, Classify, Extract, WriteCode
from common.tasks.codegen.answer import compile_error
from common.tasks.idp import documents
from common.tasks.idp import prompt as idp_prompt
from common.tasks.idp.readers import OFFSET, ReadingSettings
from common.tasks.ranking.task import warned
from common.web import app as web
from common.web.app import ALWAYS, Guard, Problem, responses

if TYPE_CHECKING:
    from common.tasks.idp.extractor import Extraction

Item = TypeVar("Item")
PAGE = Path(__file__).with_name("page.html")
MAX_FEATURES, MAX_TEXT = 20_000, 1_000_000  # characters
MAX_ROWS = 1024  # of a batch
MAX_LINES = 20_000  # of a document
MAX_ANSWER_TOKENS = 4096

# What comes in and goes out.

Features = Annotated[str, Field(min_length=1, max_length=MAX_FEATURES, pattern=r"\S")]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT, pattern=r"\S")]
RunName = Annotated[str, Field(min_length=1, max_length=200, description="A run, or `name@hash` for one version of it")]
TaskName = Annotated[
    str | None,
    Query(min_length=1, max_length=200, description="A label task that a run here was trained for; for base"),
]
Tokens = Annotated[int, Field(ge=1, le=MAX_ANSWER_TOKENS)]


class ClassifyRequest(BaseModel):
    features: Features = Field(examples=["Age: 23.0, Occupation: Scientist, Annual Income: 19114.12"])


class ClassifyAnswer(BaseModel):
    """The answer of infer_creditmix.py: scores in nats, `score = raw - prior + bias`."""

    model_name: str
    prediction: str | None = Field(description="None where the calibration abstains")
    scores: dict[str, float]
    raw_scores: dict[str, float]
    prior: dict[str, float]
    probabilities: dict[str, float]
    top2_margin: float
    leaning: str | None = Field(None, description="There where it abstains: the label that it would have given")
    answered_by: str | None = Field(None, description="With a cascade: the model that gave the label, or the teacher")
    unsure: bool | None = Field(None, description="True where the teacher was to answer, and did not")
    cascade: str | None = Field(None, description="Why it did not")
    warning: str | None = Field(None, description="There where the text is not of the task: the answer says little")


class DocumentLine(BaseModel):
    """A line or a word of a document, and where it stands on its page."""

    text: str
    box: Annotated[list[float], Field(min_length=4, max_length=4, description="x0, y0, x1, y1 from the upper left")]
    page: Annotated[int, Field(ge=1)] = 1


class ExtractRequest(BaseModel):
    document: Text
    json_schema: dict[str, Any] | None = Field(
        None, alias="schema", description="JSON Schema of the fields; default: IDP_SCHEMA"
    )
    run: RunName | None = Field(None, description="default: the newest run trained for it, else the base")
    max_new_tokens: Tokens = ANSWER_TOKENS
    on_cut: Literal["retry", "flag"] = Field(
        "retry", description="An answer that `max_new_tokens` has cut: once more with twice of it, or only flag it"
    )
    thinking: bool = Field(False, description="Let a reasoning model think first, within max_new_tokens of its own")
    typed_fields: Literal["written", "held"] | None = Field(
        None, description="As `--typed_fields` of infer_idp.py; default: as the run was trained, else written"
    )
    dates: Literal["day", "month"] | None = Field(None, description="What comes first in 03/04/2019; default: as shown")
    utc_offset: Annotated[str, Field(pattern=f"^(?:{OFFSET})$")] = "Z"
    evidence: bool = Field(False, description="Say where each field stands in the document")
    lines: Annotated[list[DocumentLine], Field(max_length=MAX_LINES)] = Field(
        [], description="What the document is made of, for the boxes of the evidence"
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
    document: str | None = Field(None, description="The text in which the evidence counts characters")


class CodeRequest(BaseModel):
    prompt: Text
    plan_then_code: bool = False
    run: RunName | None = Field(None, description="default: the newest run trained for it, else the base")
    max_new_tokens: Tokens = ANSWER_TOKENS
    thinking: bool = Field(False, description="Let a reasoning model think first, within max_new_tokens")


class CodeAnswerBody(BaseModel):
    """Code is never run by the server."""

    model_name: str
    code: str
    plan: str | None
    finished: bool = Field(description="False where the token budget ended it")
    cut: bool = Field(description="The token budget ended before all that was asked for was there")
    error: str | None = Field(description="Why the code is no Python program")


class RunEntry(BaseModel):
    name: str
    address: str = Field(description="`name@hash`, which names this version alone")
    model_dir: str
    base: str
    adapter_sha256: str | None
    method: str | None
    created: str | None
    metrics: dict[str, Any] | None = Field(description="The figures of the newest evaluation, without their intervals")
    evaluations: list[dict[str, Any]] = Field(
        [], description="What evaluators kept in its folder, the newest first: data, command, date, intervals"
    )
    loaded: bool
    current: bool = Field(description="False for a version that is no longer on the disk, but still loaded")
    error: str | None = Field(None, description="Why the run cannot be used")
    kind: str | None = Field(None, description="What it was trained for: labels, idp, codegen, squad or rows")
    task: str | None = Field(None, description="The name of that task")
    labels: list[str] | None = None


class ModelsAnswer(BaseModel):
    base_model: str
    bases: list[str] = Field(description="Those in memory")
    task: str = Field(description="What /infer/{run} classifies by a run that does not say what it was trained for")
    labels: list[str]
    short_names: dict[str, str]
    models: list[RunEntry]


def create_app(settings: ServerSettings | None = None) -> FastAPI:
    """The application; nothing is loaded before a request needs it, unless PRELOAD is set.

    Args:
        settings: default: from the environment.

    Raises:
        UserError: a setting that cannot be.
    """
    server = Server(settings or ServerSettings.from_environment())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(server.watch())
        if server.settings.preload:
            server.preload()
        yield
        watch.cancel()
        await server.models.close()
        await server.schema_checks.close()
        await server.evidence.close()
        if server.cascade:
            server.cascade.close()
        if server.audit:
            server.audit.close()

    app = FastAPI(
        title="distill-slm inference",
        description="Every adapter of a folder of runs on one base model: CreditMix, IDP, CodeGen and OpenAI's API.",
        lifespan=lifespan,
        responses=ALWAYS,
        docs_url=None,
        redoc_url=None,
    )
    app.state.server = server
    web.add_error_handlers(app)
    app.add_middleware(
        Guard,
        metrics=server.web_metrics,
        max_body_bytes=server.settings.max_body_bytes,
        api_key=server.settings.api_key,
        open_paths=web.open_paths(),
        hosts=server.settings.allowed_hosts,
    )
    _add_extraction(app, server)  # routes are tried in order: these before /infer/{run}
    _add_code(app, server)
    _add_classification(app, server)
    _add_about(app, server)
    add_chat(app, server)
    add_decisions(app, server)
    return app


def _add_about(app: FastAPI, server: Server) -> None:
    web.add_about(app, server.web_metrics, PAGE)

    @app.get("/readyz", responses=responses(503))
    async def ready() -> dict[str, str]:
        """The base is loaded and its prior known: at the first request, or soon after the start with PRELOAD=1."""
        if not server.ready():
            raise Problem(503, "the base is not loaded yet; PRELOAD=1 loads it at the start", retry_after=1)
        return {"status": "ready"}

    @app.get("/models", response_model=ModelsAnswer)
    async def registry() -> Response:
        """Every run: base, method, hash, when it was made, figures if it was evaluated, and whether it is loaded."""
        return JSONResponse(await asyncio.to_thread(server.about_models))


def _add_extraction(app: FastAPI, server: Server) -> None:
    @app.post("/infer/idp", response_model=ExtractAnswer, responses=responses(404, 409, 422, 503, 504))
    async def extract(body: ExtractRequest, request: Request) -> Response:
        """A document's fields as JSON that is valid by the schema, as infer_idp.py gives them."""
        started = time.perf_counter()
        version = await server.find(body.run or server.newest("idp"))
        check_task(version, task_record.IDP, idp_prompt.INSTRUCTION, "extracting fields from documents")
        schema = body.json_schema if body.json_schema is not None else default_schema(server.settings.idp_schema)
        await server.check_schema(schema, "schema")
        reading = ReadingSettings(body.dates, body.utc_offset)
        work = Extract(json.dumps(schema), body.max_new_tokens, body.on_cut, body.thinking, reading, body.typed_fields)
        work = replace(work, confidence=bool(server.cascade and server.cascade.below))
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
            "error": error,
            "text": extraction.text if error else None,
            "pieces": extraction.pieces,
            "cut": extraction.cut is not None,
            "written": None if error else extraction.written_leaves,
            "notes": extraction.notes,
        } | who
        if body.evidence:
            answer |= await find_evidence(server, body, extraction)
        return JSONResponse(answer)


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


def _add_code(app: FastAPI, server: Server) -> None:
    @app.post("/infer/codegen", response_model=CodeAnswerBody, responses=responses(404, 409, 422, 503, 504))
    async def write_code(body: CodeRequest, request: Request) -> Response:
        """Code for a task, as infer_codegen.py writes it; it is not run here."""
        started = time.perf_counter()
        version = await server.find(body.run or server.newest("code"))
        check_task(version, task_record.CODEGEN, None, "writing code")
        work = WriteCode(body.plan_then_code, body.max_new_tokens, body.thinking)
        written = await server.answer(request, version, work, body.prompt, tokens=estimate(body.prompt))
        facts = {"finished": written.finished, "tokens": written.tokens}
        server.record(request, version, work.name, started, body.prompt, **facts)
        answer = {
            "model_name": version.model_dir,
            "code": written.code,
            "plan": written.plan if body.plan_then_code else None,
            "finished": written.finished,
            "cut": written.cut,
            "error": compile_error(written.code),
        }
        return JSONResponse(answer)


def _add_classification(app: FastAPI, server: Server) -> None:
    @app.post("/infer/{run}", response_model=ClassifyAnswer, responses=responses(404, 409, 422, 503, 504))
    async def classify(run: str, body: ClassifyRequest, request: Request, task: TaskName = None) -> Response:
        """One row's label by a run, `base`, `sft`, `kd` or `dpo`, as infer_creditmix.py gives it."""
        return JSONResponse((await classify_rows(request, run, [body.features], task))[0])

    @app.post("/infer/{run}/batch", response_model=list[ClassifyAnswer], responses=responses(404, 409, 422, 503, 504))
    async def classify_batch(
        run: str,
        body: Annotated[list[ClassifyRequest], Field(min_length=1, max_length=MAX_ROWS)],
        request: Request,
        task: TaskName = None,
    ) -> Response:
        """Many rows at once; the answers are in the order of the rows."""
        return JSONResponse(await classify_rows(request, run, [row.features for row in body], task))

    async def classify_rows(
        request: Request, run: str, texts: list[str], task_name: str | None
    ) -> list[dict[str, Any]]:
        started = time.perf_counter()
        version = await server.find(run)
        tokens = sum(map(estimate, texts))
        task = await server.label_task(version, task_name)
        prompts = server.encode(version, [task.prompt(task.clean(text)) async for text in in_turns(texts)])
        answers = await server.answer(request, version, Classify(task.text), prompts, rows=len(texts), tokens=tokens)
        answers = [warned(task, *row) async for row in in_turns(zip(texts, answers, strict=True))]
        if server.cascade:
            answers = await server.cascade.answers(request, version, task, texts, answers)
        metrics = server.metrics
        async for text, answer in in_turns(zip(texts, answers, strict=True)):
            metrics.child(metrics.margin, version.name).observe(answer["top2_margin"])
            metrics.child(metrics.predictions, version.name, answer["prediction"] or "none").inc()
            facts = {key: value for key, value in answer.items() if key != "model_name"}
            server.record(request, version, Classify.name, started, text, **facts)
        return answers


async def in_turns(items: Iterable[Item]) -> AsyncIterator[Item]:
    """The items; between two of them other requests have their turn."""
    for number, item in enumerate(items):
        if number:
            await asyncio.sleep(0)
        yield item


def check_task(version: Version, kind: str, instruction: str | None, asked: str) -> None:
    """Raises Problem 422 for a run that was trained for another task; see `label_tasks.check`."""
    try:
        label_tasks.check(version, kind, instruction, asked)
    except label_tasks.OtherTask as error:
        raise Problem(422, str(error), "run") from error


def default_schema(path: str) -> dict[str, Any]:
    """The schema of requests that bring none. Raises Problem 422 where there is no such file."""
    if not Path(path).is_file():
        raise Problem(422, f"send a schema: there is no {path}, where IDP_SCHEMA says the default one is", "schema")
    try:
        return json_schema.load(path)
    except UserError as error:
        raise Problem(409, f"the default schema cannot be used: {error}", "schema") from error
