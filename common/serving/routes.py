"""The inference server's routes: the page, the runs, labels and code; documents are in `document_routes`, OpenAI's in
`openai_routes`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field

from common.data import task_record
from common.serving.decision_routes import add_decisions
from common.serving.document_routes import PDF_PATH, add_extraction
from common.serving.fields import RunName, Text, Tokens, check_task
from common.serving.openai_routes import add_chat, chained
from common.serving.server import Server
from common.serving.settings import ServerSettings
from common.serving.sizes import estimate, estimate_row
from common.serving.work import ANSWER_TOKENS, Classify, WriteCode
from common.tasks.codegen.answer import compile_error
from common.tasks.ranking.task import hinted, warned
from common.web import app as web
from common.web.app import ALWAYS, Guard, Problem, responses

if TYPE_CHECKING:
    from common.tasks.codegen.writer import CodeAnswer

Item = TypeVar("Item")
PAGE = Path(__file__).with_name("page.html")
MAX_FEATURES = 20_000  # characters
MAX_ROWS = 1024  # of a batch

# What comes in and goes out.

Features = Annotated[str, Field(min_length=1, max_length=MAX_FEATURES, pattern=r"\S")]
TaskName = Annotated[
    str | None,
    Query(min_length=1, max_length=200, description="A label task that a run here was trained for; for base"),
]


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


class CodeRequest(BaseModel):
    prompt: Text
    plan_then_code: bool = False
    run: RunName | None = Field(None, description="default: the newest run trained for it, else the base")
    max_new_tokens: Tokens = ANSWER_TOKENS
    thinking: bool = Field(False, description="Let a reasoning model think first, within max_new_tokens")
    stream: bool = Field(False, description="Send the code as it is written, as server-sent events")


class CodeAnswerBody(BaseModel):
    """Code is never run by the server."""

    model_name: str
    code: str
    plan: str | None
    finished: bool = Field(description="False where the token budget ended it")
    cut: bool = Field(description="The token budget ended before all that was asked for was there")
    error: str | None = Field(description="Why the code is no Python program")
    answered_by: str | None = Field(None, description="With a cascade: the run, or the teacher")
    unsure: bool | None = Field(None, description="True where the teacher was to answer, and did not")
    cascade: str | None = Field(None, description="Why it did not")


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
    engine: str | None = Field(None, description="What runs it: torch, onnxruntime or llama_cpp")
    unproven: bool = Field(False, description="Exported without a proof (--no_proof)")
    loaded: bool
    current: bool = Field(description="False for a version that is no longer on the disk, but still loaded")
    error: str | None = Field(None, description="Why the run cannot be used")
    kind: str | None = Field(None, description="What it was trained for: labels, idp, codegen, squad or rows")
    task: str | None = Field(None, description="The name of that task")
    labels: list[str] | None = None
    text_fields: list[str] | None = Field(
        None, description="The column that has the text of its rows, in a file of them"
    )
    text_columns: list[str] | None = Field(
        None, description="Of rows without it: what makes their text, a line `Key: value, Key: value` in this order"
    )


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
            server.preload(server.wanted())
        yield
        watch.cancel()
        await server.models.close()
        await server.schema_checks.close()
        await server.evidence.close()
        await server.pdfs.close()
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
        body_limits={PDF_PATH: server.settings.max_pdf_bytes},
    )
    add_extraction(app, server)  # routes are tried in order: these before /infer/{run}
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
        if fault := server.unready():
            raise Problem(503, fault, retry_after=1)
        return {"status": "ready"}

    @app.get("/models", response_model=ModelsAnswer)
    async def registry() -> Response:
        """Every run: base, method, hash, when it was made, figures if it was evaluated, and whether it is loaded."""
        return JSONResponse(await asyncio.to_thread(server.about_models))


def _add_code(app: FastAPI, server: Server) -> None:
    streamed = {200: {"content": {"text/event-stream": {}}, "description": "The code, with `stream` as it is written"}}

    @app.post("/infer/codegen", response_model=CodeAnswerBody, responses=streamed | responses(404, 409, 422, 503, 504))
    async def write_code(body: CodeRequest, request: Request) -> Response:
        """Code for a task, as infer_codegen.py writes it; it is not run here.

        With `stream` server-sent events: `text` as it comes, `answer` with the whole of it, or `error`. With a cascade
        the `answer` may be the teacher's, where what has come is no whole program.
        """
        started = time.perf_counter()
        version = await server.find(body.run or server.newest("code"))
        check_task(version, task_record.CODEGEN, None, "writing code")
        work = WriteCode(body.plan_then_code, body.max_new_tokens, body.thinking, body.stream)

        async def shown(written: CodeAnswer) -> dict[str, Any]:
            who: dict[str, Any] = {}
            if server.cascade:
                answered = await server.cascade.code(request, version, work, body.prompt, written)
                written, who = answered.answer, answered.facts
            facts = {"finished": written.finished, "tokens": written.tokens}
            server.record(request, version, work.name, started, body.prompt, **facts)
            return {
                "model_name": version.model_dir,
                "code": written.code,
                "plan": written.plan if body.plan_then_code else None,
                "finished": written.finished,
                "cut": written.cut,
                "error": compile_error(written.code),
                **who,
            }

        asked = {"payload": body.prompt, "tokens": estimate(body.prompt)}
        if not body.stream:
            return JSONResponse(await shown(await server.answer(request, version, work, **asked)))
        events = code_events(server.stream(request, version, work, **asked), shown)
        first = await anext(events)  # an error before the first token has a status of its own
        return StreamingResponse(chained(first, events), media_type="text/event-stream")


async def code_events(parts: AsyncGenerator[Any], shown: Callable[[CodeAnswer], Awaitable[dict]]) -> AsyncIterator[str]:
    """Server-sent events of what `Server.stream` gives. Raises Problem before the first of them."""

    def event(kind: str, data: Any) -> str:
        return f"event: {kind}\ndata: {json.dumps(data)}\n\n"

    begun = False
    async with aclosing(parts):
        try:
            async for part in parts:
                yield event("text", part) if isinstance(part, str) else event("answer", await shown(part))
                begun = True
        except Problem as problem:
            if not begun:
                raise
            yield event("error", {"message": problem.detail})


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
        tokens = sum(map(estimate_row, texts))
        task = await server.label_task(version, task_name)
        cleaned = [task.clean(text) async for text in in_turns(texts)]
        prompts = server.encode(version, [task.prompt(text) for text in cleaned])
        answers = await server.answer(request, version, Classify(task.text), prompts, rows=len(texts), tokens=tokens)
        answers = [warned(task, *row) async for row in in_turns(zip(texts, answers, strict=True))]
        if server.cascade:
            answers = await server.cascade.answers(request, version, task, cleaned, answers)
        answers = [hinted(task, *row) async for row in in_turns(zip(texts, answers, strict=True))]
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
