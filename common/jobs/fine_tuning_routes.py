"""OpenAI's `/v1/fine_tuning/jobs` over the service's jobs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from common.data.shapes import DPO, SFT
from common.jobs import fine_tuning_view as view
from common.jobs.checks import DoesNotFit
from common.jobs.file_routes import page_of
from common.jobs.files import FINE_TUNE, StoredFile, file_id
from common.jobs.fine_tuning import KEY, FineTuningRequest, base_of, is_fine_tuning, payloads, renamed
from common.jobs.service import Service
from common.jobs.store import Job, KeyTaken
from common.web import app as web
from common.web.app import Problem

OF_MODELS = {
    403: "No job of this service has made it, so that it is deleted by hand; or as on every path",
    404: "No such model",
    409: "A job or another model needs it; the message says which",
    503: "The disk does not let it go; try again after `Retry-After` seconds",
}
SENTENCES = {
    404: "No such fine-tuning job",
    409: "The job's state does not allow it; the message says why",
    503: "Too many jobs wait, or the disk is full; try again after `Retry-After` seconds",
}
# the paths of OpenAI's API that this service has, of one beside the inference server with the method
OPENAIS = ("/v1/files", "/v1/fine_tuning", "DELETE /v1/models")
PAGE = 100  # jobs that are read at once
METADATA = re.compile(r"metadata\[(.{1,64})\]", re.DOTALL)


def responses(*statuses: int) -> dict[int, dict[str, Any]]:
    return web.responses(*statuses, own=SENTENCES)


class FineTuning:
    """What the routes call; everything blocks."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def create(self, request: FineTuningRequest, key: str | None) -> Job:
        """Put a job into the queue. Raises Problem 422 that names the field, or 503."""
        request.refuse_what_is_missing()
        try:
            asked = {KEY: {"asked": request.body()}}
            if key is not None and (known := self.service.store.by_key(key, asked)):
                return known
        except KeyTaken:
            raise Problem(422, "Idempotency-Key: it was used for another request", "Idempotency-Key") from None
        trainer = DPO if request.is_dpo else SFT
        training = self._file("training_file", request.training_file, trainer)
        validation = request.validation_file and self._file("validation_file", request.validation_file, trainer)
        settings = self.service.settings
        base = base_of(request.model, settings.fine_tuning_models, settings.runs_dir)
        asked, passes = payloads(request, base, training, validation or None)
        refused: list[Problem] = []
        for payload in passes:
            try:
                return self.service.submit(payload, key, asked)
            except DoesNotFit as problem:  # a smaller pass may
                fields = f"student: {problem.sentence}{problem.fields}, through POST /distill"
                refused.append(Problem(422, fields, "student"))
            except Problem as problem:
                raise renamed(problem, settings.fine_tuning_models) from problem
        raise renamed(refused[0])

    def _file(self, field: str, name: str, trainer: str) -> StoredFile:
        file = self.service.files.find(name)
        if file is None:
            raise Problem(422, f"{field}: there is no file {name!r}; send it with purpose {FINE_TUNE}", field)
        if file.purpose != FINE_TUNE:
            raise Problem(422, f"{field}: it has the purpose {file.purpose}; send one with {FINE_TUNE}", field)
        if file.trainer != trainer:
            rows = {DPO: "preferences, for the method dpo", SFT: "answers, for the method supervised"}
            what = rows.get(file.trainer, f"rows for {file.trainer}; send them to /distill")
            raise Problem(422, f"{field}: the file has {what}", field)
        return file

    def get(self, name: str) -> Job:
        """Raises Problem 404."""
        job = self.service.find(name.removeprefix(view.PREFIX)) if name.startswith(view.PREFIX) else None
        if job is None or not is_fine_tuning(job.request):
            raise Problem(404, "there is no such fine-tuning job", "fine_tuning_job_id")
        return job

    def show(self, job: Job) -> dict[str, Any]:
        """OpenAI's object of a job."""
        return view.job_object(job, self.service.folder(job), self.service.files.find(file_id(job.id)) is not None)

    def events(self, job: Job) -> list[dict[str, Any]]:
        return view.events(job, self.service.folder(job))

    def jobs(self, before: int | None) -> Iterator[Job]:
        """The fine-tuning jobs, the newest first, that were submitted before the job of a number."""
        while page := self.service.store.page(PAGE, before):
            yield from (job for job in page if is_fine_tuning(job.request))
            before = page[-1].number

    def page(self, after: str | None, limit: int, wanted: dict[str, str] | None) -> dict[str, Any]:
        """OpenAI's list.

        Args:
            wanted: metadata that a job has to have; None: it has to have none.
        """

        def fits(job: Job) -> bool:
            metadata = job.request[KEY]["asked"].get("metadata")
            return metadata is None if wanted is None else wanted.items() <= (metadata or {}).items()

        before = self.get(after).number if after is not None else None
        jobs = list(islice(filter(fits, self.jobs(before)), limit + 1))
        shown = [self.show(job) for job in jobs[:limit]]
        return {"object": "list", "data": shown, "has_more": len(jobs) > limit}


def wanted_metadata(request: Request) -> dict[str, str] | None:
    """The filter of a query; None where it asks for jobs without metadata."""
    query = request.query_params
    if query.get("metadata") == "null":
        return None
    return {match[1]: value for name, value in query.items() if (match := METADATA.fullmatch(name))}


def add_fine_tuning(router: APIRouter, service: Service) -> None:
    """The routes."""
    tuning = FineTuning(service)
    add_jobs(router, tuning)
    add_results(router, tuning)

    @router.delete("/v1/models/{model}", responses=web.responses(403, 404, 409, 503, own=OF_MODELS))
    def delete_model(model: str) -> dict[str, Any]:
        """Delete a fine-tuned model and its checkpoints' models; its job, and what that has left, stay."""
        service.delete_model(model)
        return {"id": model, "object": "model", "deleted": True}


def add_jobs(router: APIRouter, tuning: FineTuning) -> None:
    """Create, list, look, cancel, pause, resume."""
    service = tuning.service

    @router.post("/v1/fine_tuning/jobs", responses=responses(422, 503))
    def create(
        body: FineTuningRequest,
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
    ) -> dict[str, Any]:
        """Queue a fine-tuning job. The same Idempotency-Key gives the same job back."""
        return tuning.show(tuning.create(body, idempotency_key))

    @router.get("/v1/fine_tuning/jobs", responses=responses(404, 422))
    def list_jobs(
        request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 20
    ) -> dict[str, Any]:
        """The fine-tuning jobs, the newest first; `metadata[k]=v` or `metadata=null` chooses among them."""
        return tuning.page(after, limit, wanted_metadata(request))

    @router.get("/v1/fine_tuning/jobs/{fine_tuning_job_id}", responses=responses(404))
    def retrieve(fine_tuning_job_id: str) -> dict[str, Any]:
        """A job."""
        return tuning.show(tuning.get(fine_tuning_job_id))

    @router.post("/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel", responses=responses(404, 409))
    def cancel(fine_tuning_job_id: str) -> dict[str, Any]:
        """Stop a job within a few seconds."""
        return tuning.show(service.cancel(tuning.get(fine_tuning_job_id).id))

    @router.post("/v1/fine_tuning/jobs/{fine_tuning_job_id}/pause", responses=responses(404, 409))
    def pause(fine_tuning_job_id: str) -> dict[str, Any]:
        """Stop a job with a checkpoint; it is `pausing`, then `paused`."""
        return tuning.show(service.pause(tuning.get(fine_tuning_job_id).id))

    @router.post("/v1/fine_tuning/jobs/{fine_tuning_job_id}/resume", responses=responses(404, 409))
    def resume(fine_tuning_job_id: str) -> dict[str, Any]:
        """Queue a paused, failed or cancelled job again; it goes on from its last checkpoint."""
        return tuning.show(service.resume(tuning.get(fine_tuning_job_id).id))


def add_results(router: APIRouter, tuning: FineTuning) -> None:
    """Events and checkpoints."""
    service = tuning.service

    @router.get(
        "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events",
        responses={200: {"content": {"text/event-stream": {}}, "description": "A list, or with `stream` as they come"}}
        | responses(404, 422),
    )
    async def events(
        fine_tuning_job_id: str,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
        stream: bool = False,
    ) -> Response:
        """What has happened, the newest first; with `stream` the oldest first, as it comes, until the job has ended."""
        job = await asyncio.to_thread(tuning.get, fine_tuning_job_id)
        if not stream:
            entries = await asyncio.to_thread(tuning.events, job)
            return JSONResponse(page_of(entries[::-1], after, limit))

        def look() -> tuple[Job, list] | None:
            current = service.find(job.id)
            return None if current is None else (current, tuning.events(current))

        return StreamingResponse(
            view.stream(look, service.closing.is_set),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )

    @router.get("/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints", responses=responses(404, 422))
    def checkpoints(
        fine_tuning_job_id: str, after: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 10
    ) -> dict[str, Any]:
        """The models that a job has left, each with its figures; all of them are served."""
        job = tuning.get(fine_tuning_job_id)
        return page_of(view.checkpoints(job, service.folder(job)), after, limit)
