"""The distillation service's routes."""

from __future__ import annotations

import asyncio
import re
import signal
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Body, FastAPI, Header, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field

from common.jobs import artifacts, file_routes, fine_tuning_routes, progress
from common.jobs.checks import import_libraries
from common.jobs.service import JobServiceSettings, Service
from common.web import app as web
from common.web.app import ALWAYS, Guard, Problem

PAGE = Path(__file__).with_name("page.html")
EXAMPLE = {
    "teacher_model": "gpt2",
    "student_model": "distilgpt2",
    "dataset": "wikitext",
    "subset": "wikitext-2-raw-v1",
    "max_steps": 30,
    "per_device_batch_size": 2,
    "grad_accum_steps": 4,
    "logging_steps": 5,
    "save_every": 30,
    "temperature": 2.0,
}
SENTENCES = {
    404: "No such job, or no such file of it",
    409: "The job's state does not allow it; the message says why",
    503: "Too many jobs wait, or the disk is full; try again after `Retry-After` seconds",
}
State = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]

# What goes out.


class Progress(BaseModel):
    step: int
    total: int = Field(description="Steps of the whole training")
    percent: float
    seconds_left: float | None = Field(description="At the speed since it started or went on; None before it is known")


class Command(BaseModel):
    number: int
    of: int
    name: str


class Error(BaseModel):
    reason: str
    exit_code: int | None = Field(description="Of the command that failed; negative: the signal that killed it")
    log: list[str] = Field(description="The last lines that it wrote")


class JobStatus(BaseModel):
    job_id: str
    name: str | None = Field(description="As the request calls it; its model is then served under that name")
    served_as: str | None = Field(description="The run of the inference server that it has become")
    method: Literal["distill", "sft", "kd", "dpo"]
    state: State
    cancelling: bool = Field(description="Asked to stop, but not stopped yet")
    pausing: bool = Field(description="Asked to pause, but not stopped yet")
    ahead: int | None = Field(description="Of one that waits: how many come before it")
    attempt: int = Field(description="How often it was started; not counted: going on after a restart of the server")
    created: str
    started: str | None
    ended: str | None
    command: Command | None = Field(description="Of one that runs: the training, or an export after it")
    progress: Progress | None = Field(description="None before the first step")
    losses: dict[str, float | None] = Field(description="The latest value of the loss and of each of its terms")
    evaluations: list[dict[str, Any]] = Field(
        description="What evaluators kept in its artifacts, the newest first: data, command, date, intervals"
    )
    error: Error | None
    resumable: bool
    request: dict[str, Any]


class Submitted(BaseModel):
    job_id: str
    state: State
    status_url: str


class JobPage(BaseModel):
    jobs: list[JobStatus] = Field(description="The newest first")
    next: int | None = Field(description="`before` of the next page; None on the last")


class DataFile(BaseModel):
    path: str
    bytes: int


class Choices(BaseModel):
    models: list[str] = Field(description="Folders and GGUF files, the newest first")
    data: list[DataFile]
    defaults: dict[str, dict[str, Any]] = Field(description="By method: what a setting is where it is left out")
    exports: list[str] = Field(description="Formats that a model can be exported in after its training")
    serve_url: str | None = Field(description="Where the page of the inference server is, with which a model is tried")


class Artifact(BaseModel):
    path: str
    bytes: int
    sha256: str
    url: str


class Artifacts(BaseModel):
    job_id: str
    artifacts: list[Artifact] = Field(description="Empty before the job has ended")


class Curves(BaseModel):
    job_id: str
    points: list[dict[str, float | int | None]] = Field(
        description="step, max_steps, time (seconds since 1970), loss and its terms, eval_loss, learning_rate"
    )


def responses(*statuses: int) -> dict[int, dict[str, Any]]:
    return web.responses(*statuses, own=SENTENCES)


def create_app(settings: JobServiceSettings | None = None) -> FastAPI:
    """The application; the jobs run in the background from its start to its end.

    Args:
        settings: default: from the environment.

    Raises:
        UserError: a setting that cannot be.
    """
    service = Service(settings or JobServiceSettings.from_environment())
    settings, prefix = service.settings, service.settings.api_prefix

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if threading.current_thread() is threading.main_thread():
            end_streams_on_signals(service.closing)
        service.runner.start()
        if settings.warm_up:
            threading.Thread(target=import_libraries, daemon=True).start()
        yield
        await asyncio.to_thread(service.runner.close)

    app = FastAPI(
        title="distill-slm jobs",
        description="Distillation, SFT, KD and DPO as jobs: submit, watch, cancel, resume, download.",
        lifespan=lifespan,
        responses=ALWAYS,
        docs_url=None,
        openapi_url=f"{prefix}/openapi.json",
        redoc_url=None,
    )
    app.state.service = service
    web.add_error_handlers(app)

    @app.exception_handler(sqlite3.OperationalError)
    async def on_full_disk(request: Request, error: sqlite3.OperationalError) -> Response:
        message = f"the jobs cannot be read or written now ({error}); try again"
        return web.error_response(web.request_id(request), 503, message, headers={"Retry-After": "30"})

    app.add_middleware(
        Guard,
        metrics=service.metrics,
        max_body_bytes=settings.max_body_bytes,
        api_key=settings.api_key,
        open_paths=web.open_paths(prefix),
        streamed_paths=frozenset(prefix + path for path in file_routes.UPLOADS),
        hosts=settings.allowed_hosts,
    )
    web.add_about(app, service.metrics, PAGE, prefix)

    @app.get("/readyz", responses=responses(503))
    def ready() -> dict[str, str]:
        """The jobs can be read, and are run by this server or by another on the same DATA_DIR."""
        service.store.counts()
        return {"status": "ready", "runs_jobs": "here" if service.runner.is_leader else "elsewhere"}

    router = APIRouter(prefix=prefix)
    add_jobs(router, service)
    add_results(router, service)
    file_routes.add_files(router, service)
    fine_tuning_routes.add_fine_tuning(router, service)
    app.include_router(router)
    return app


def end_streams_on_signals(closing: threading.Event) -> None:
    """uvicorn lets every answer end before it stops, which a stream of events would not do by itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.getsignal(number)

        def handle(number: int, frame: Any, before: Any = before) -> None:
            closing.set()
            if callable(before):
                before(number, frame)

        signal.signal(number, handle)


def add_jobs(router: APIRouter, service: Service) -> None:
    """Submit, look, cancel, pause, resume, delete. Plain functions, which FastAPI runs in threads."""
    prefix = service.settings.api_prefix
    content = {"application/json": {"schema": service.planner.schema(), "example": EXAMPLE}}

    @router.post(
        "/distill",
        status_code=202,
        response_model=Submitted,
        responses=responses(422, 503),
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )
    def submit(
        payload: Annotated[dict[str, Any], Body()],
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
    ) -> Response:
        """Queue a job: a distillation, or with "method" sft, kd or dpo that training. Fields are the trainer's flags.

        Everything is checked first. The same Idempotency-Key gives the same job back.
        """
        job = service.submit(payload, idempotency_key)
        url = f"{prefix}/status/{job.id}"
        return JSONResponse({"job_id": job.id, "state": job.state, "status_url": url}, 202, {"Location": url})

    @router.get("/choices", response_model=Choices)
    def choices() -> Response:
        """What a request may name: models and data under the allowed folders, and the defaults of the settings."""
        return JSONResponse(service.choices())

    @router.get("/jobs", response_model=JobPage, responses=responses(422))
    def jobs(
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        before: Annotated[int | None, Query(ge=0, le=2**63 - 1)] = None,
        state: State | None = None,
    ) -> Response:
        """Jobs, the newest first; `before` is the `next` of the page before."""
        return JSONResponse(service.page(limit, before, state))

    @router.get("/status/{job_id}", response_model=JobStatus, responses=responses(404))
    def status(job_id: str) -> Response:
        """State, progress, the latest losses, and why it failed."""
        return JSONResponse(service.describe(service.get(job_id)))

    @router.post("/cancel/{job_id}", response_model=JobStatus, responses=responses(404, 409))
    def cancel(job_id: str) -> Response:
        """Stop a job: it gets a few seconds to save a checkpoint, then all that it started is killed."""
        return JSONResponse(service.describe(service.cancel(job_id)))

    @router.post("/pause/{job_id}", response_model=JobStatus, responses=responses(404, 409))
    def pause(job_id: str) -> Response:
        """Stop a job with a checkpoint, for up to two minutes; it is kept until it is resumed or cancelled."""
        return JSONResponse(service.describe(service.pause(job_id)))

    @router.post("/resume/{job_id}", response_model=JobStatus, responses=responses(404, 409))
    def resume(job_id: str) -> Response:
        """Queue a paused, failed or cancelled job again; it goes on from its last checkpoint."""
        return JSONResponse(service.describe(service.resume(job_id)))

    @router.delete("/jobs/{job_id}", status_code=204, responses=responses(404, 409))
    def delete(job_id: str) -> Response:
        """Forget an ended job and delete its files."""
        service.delete(job_id)
        return Response(status_code=204)


def add_results(router: APIRouter, service: Service) -> None:
    """What a job writes: its log and losses as they come, and its files."""
    prefix = service.settings.api_prefix

    @router.get(
        "/events/{job_id}",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}, "description": "Until the job has ended"}}
        | responses(404),
    )
    async def events(job_id: str, last_event_id: Annotated[str, Header(max_length=100)] = "") -> Response:
        """Server-sent events: `state` (as /status), `log` (a list of lines), `metrics` (a list of points)."""
        job = await asyncio.to_thread(service.get, job_id)
        seen = re.fullmatch(r"(\d{1,15})-(\d{1,15})", last_event_id)
        where = (int(seen[1]), int(seen[2])) if seen else (0, 0)
        stream = progress.events(
            service.folder(job), lambda: service.find(job_id), service.describe, where, service.closing.is_set
        )
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @router.get("/metrics/{job_id}", response_model=Curves, responses=responses(404))
    def curves(job_id: str) -> Response:
        """The loss curves."""
        job = service.get(job_id)
        return JSONResponse({"job_id": job.id, "points": progress.curves(service.folder(job))})

    @router.get("/artifacts/{job_id}", response_model=Artifacts, responses=responses(404))
    def list_artifacts(job_id: str) -> Response:
        """What can be downloaded: student, tokenizer, exports, record and curves of the run."""
        job = service.get(job_id)
        files = [{**entry, "url": f"{prefix}/download/{job.id}/{quote(entry['path'])}"} for entry in job.artifacts]
        return JSONResponse({"job_id": job.id, "artifacts": files})

    @router.get(
        "/download/{job_id}/{path:path}",
        response_class=Response,
        responses={
            200: {"content": {"application/octet-stream": {}}, "description": "The file; its SHA-256 is the ETag"},
            206: {"content": {"application/octet-stream": {}}, "description": "The range that was asked for"},
            304: {"description": "The client has it"},
            416: {"description": "The file has no such range"},
        }
        | responses(404),
    )
    def download(job_id: str, path: str, request: Request) -> Response:
        """A file of the artifact list, or ranges of it."""
        job = service.get(job_id)
        located = artifacts.locate(service.folder(job).artifacts, job.artifacts, path)
        if located is None:
            raise Problem(404, f"the job has no such file; {prefix}/artifacts/{job.id} lists them", "path")
        return artifacts.answer(request, *located)
