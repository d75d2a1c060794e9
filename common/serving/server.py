"""The inference server without its routes: requests on their way to a model and back."""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import Request

from common.cli import UserError, log
from common.data import task_record
from common.serving import label_tasks
from common.serving.audit_log import AuditLog
from common.serving.cascade import ServedCascade
from common.serving.fields import with_fields
from common.serving.helpers import Helpers
from common.serving.messages import Loaded, Unusable
from common.serving.metrics import ServingMetrics
from common.serving.model_process import Gone, ModelProcess, Models, Pending, QueueFull
from common.serving.run_registry import BASE, BadName, Registry, UnknownRun, Version, describe, made_at
from common.serving.schema_checks import SchemaChecks
from common.serving.settings import ServerSettings
from common.serving.view import Work
from common.serving.work import WarmUp
from common.tasks.ranking.task import LabelTask
from common.web import app as web
from common.web.app import Problem, WebMetrics

KINDS = {"idp": task_record.IDP, "code": task_record.CODEGEN}  # by what is in the names of runs
GRACE = 30.0  # seconds beyond REQUEST_TIMEOUT until a model's process that does not answer is ended
PDF_SECONDS = 20.0  # that the text of a PDF may take
POLL = 0.25  # seconds between looks whether the client is still there
PRELOAD_AGAIN = 30.0  # seconds until what PRELOAD asks for is tried again where the base could not be loaded


class Server:
    """Takes a request to the process of its model and waits for the answer."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.registry = Registry(settings.runs_dir, settings.base_model, settings.host.task.name)
        self.audit = AuditLog(settings.audit_log, settings.audit_max_bytes) if settings.audit_log else None
        self.web_metrics = WebMetrics()
        self.models = Models(settings.max_bases, self._start)
        self.schema_checks = SchemaChecks()
        nothing = {"document": "", "lines": [], "value": None}
        self.evidence = Helpers("common.tasks.idp.evidence_worker", nothing)
        self.pdfs = Helpers("common.tasks.idp.pdf_worker", {"pdf": ""}, PDF_SECONDS)
        self.metrics = ServingMetrics(
            self.web_metrics.registry, self.models.all, lambda: self.audit.failures if self.audit else 0
        )
        self.cascade = ServedCascade(settings.cascade, self) if settings.cascade else None
        self._preloading: list[Pending] = []
        self._preloaded = 0.0  # when that was last begun
        self._faults: dict[str, str] = {}  # why what is to be loaded in advance cannot be, by its address
        self._ready = False
        self.waiting: dict[Pending, tuple[Request, float]] = {}  # until when

    def _start(self, base: str, after: ModelProcess | None) -> ModelProcess:
        def loaded(what: Loaded) -> None:
            self.metrics.loading[what.kind].labels(what.name).set(what.seconds)

        def batch(key: Any, rows: int) -> None:
            version, work = key
            self.metrics.child(self.metrics.batch_rows, version.base, work.name).observe(rows)

        adapters = self.registry.adapters_of(base)
        return ModelProcess(base, self.settings.host, adapters, on_batch=batch, on_loaded=loaded, after=after)

    async def find(self, address: str, param: str = "run") -> Version:
        """The version that a request names.

        Raises:
            Problem: 422, 404 or 409.
        """
        try:
            return self.registry.known(address) or await asyncio.to_thread(self.registry.find, address)
        except BadName as error:
            raise Problem(422, str(error), param) from error
        except UnknownRun as error:
            raise Problem(404, str(error), param) from error
        except UserError as error:
            raise Problem(409, with_fields(str(error)), param) from error

    async def label_task(self, version: Version, name: str | None = None) -> LabelTask:
        """The label task of a run, or for a run that was trained for none the known one of this name.

        Raises:
            Problem: 422 for a run of another task and an unknown name, 409 for a broken record.
        """
        try:
            task = label_tasks.task_of(version, self.settings.host.task)
        except label_tasks.OtherTask as error:
            raise Problem(422, str(error), "run") from error
        except UserError as error:
            raise Problem(409, str(error), "run") from error
        if name in (None, task.name):
            return task
        known = await asyncio.to_thread(self.known_tasks)
        if name not in known:
            raise Problem(422, f"task: there is no run of the task '{name[:80]}'; there are {', '.join(known)}", "task")
        if version.task is not None:
            raise Problem(
                422, f"task: {version.name} was trained for {task.name}, not for {name}; leave it out", "task"
            )
        return known[name]

    def known_tasks(self) -> dict[str, LabelTask]:
        """The label tasks of the runs that are there, and the server's own, by name; blocking."""
        known = {self.settings.host.task.name: self.settings.host.task}
        for name in self.registry.names():
            with contextlib.suppress(UserError, OSError):  # /models says what is wrong with it
                task = label_tasks.task_of(self.registry.find(name), self.settings.host.task)
                known.setdefault(task.name, task)
        return known

    async def check_schema(self, schema: Any, param: str) -> None:
        """Raises Problem 422 for a schema that decoding cannot follow, 503 where too many wait to be checked."""
        try:
            fault = await self.schema_checks.fault(schema)
        except QueueFull:
            raise Problem(503, "too many schemas wait to be checked; try again", retry_after=1) from None
        if fault:
            raise Problem(422, with_fields(fault), param)

    def encode(self, version: Version, prompts: Sequence[str]) -> list[str | list[int]]:
        """Prompts as token ids, where this process knows how (see `ModelProcess.encode`)."""
        return self.models.get(version.base).encode(version, prompts)

    async def answer(
        self,
        request: Request,
        version: Version,
        work: Work,
        payload: Any,
        *,
        tokens: int,
        rows: int = 1,
        emit: Callable[[str], None] | None = None,
    ) -> Any:
        """What the model makes of `payload`.

        Args:
            tokens, rows: about what it takes of a batch and of a queue.
            emit: called with the parts of a text as they are written, where `work` streams.

        Raises:
            Problem: 409, 422, 503 or 504.
        """
        started = time.monotonic()
        process, pending = self._enqueue(version, work, payload, rows=rows, tokens=tokens, emit=emit)
        self.waiting[pending] = (request, started + self.settings.request_timeout)
        try:
            answer = await pending.answer
        finally:
            del self.waiting[pending]
            process.withdraw(pending)  # has no effect once it is answered
        self.metrics.child(self.metrics.seconds, version.name, work.name).observe(time.monotonic() - started)
        return outcome(answer)

    async def stream(
        self, request: Request, version: Version, work: Work, payload: Any, *, tokens: int
    ) -> AsyncIterator[Any]:
        """The parts of a text as they are written, and last, as what is no str, the whole answer.

        Args:
            tokens: see `answer`.

        Raises:
            Problem: as `answer`.
        """
        parts: asyncio.Queue[str | None] = asyncio.Queue()

        async def run() -> Any:
            try:
                return await self.answer(request, version, work, payload, tokens=tokens, emit=parts.put_nowait)
            finally:
                parts.put_nowait(None)  # after all parts: they and the answer come through one channel, in order

        task = asyncio.create_task(run())
        try:
            while (part := await parts.get()) is not None:
                yield part
            yield await task
        finally:
            task.cancel()

    async def watch(self) -> None:
        """End the wait of requests that are late or whose client has gone, and processes that do not answer.

        One round for all costs each of them nothing. What goes wrong with a request is its answer, and what goes wrong
        beside is said, once while it stays the same: the next round comes all the same.
        """
        said = ""
        while True:
            await asyncio.sleep(min(POLL, self.settings.request_timeout / 4))
            try:
                for pending, (request, deadline) in list(self.waiting.items()):
                    problem = await self._problem(pending, request, deadline)
                    if problem and not pending.answer.done():
                        pending.answer.set_exception(problem)
                for process in self.models.running():
                    process.end_if_silent(self.settings.request_timeout + GRACE)
                if self._preloaded and time.monotonic() - self._preloaded > PRELOAD_AGAIN and not self.ready():
                    self.preload(await asyncio.to_thread(self.wanted))
            except Exception:
                if (report := traceback.format_exc()) != said:
                    log(f"a look for late requests and silent processes failed; trying again:\n{report}")
                said = report

    async def _problem(self, pending: Pending, request: Request, deadline: float) -> Exception | None:
        """Why nobody is to wait for a request any more."""
        try:
            if time.monotonic() > deadline:
                late = f"no answer within {self.settings.request_timeout:g} s; send less, or raise REQUEST_TIMEOUT"
                return Problem(504, late)
            if time.monotonic() - pending.queued.arrived > POLL and await request.is_disconnected():
                return Problem(499, "the client went away")
        except Exception as error:
            return error
        return None

    def _enqueue(self, version: Version, work: Work, payload: Any, **more: Any) -> tuple[ModelProcess, Pending]:
        process = self.models.get(version.base)
        try:
            return process, process.put(version, work, payload, versions=self.registry.versions(version.name), **more)
        except QueueFull:
            raise Problem(503, "the queue is full; try again", retry_after=1) from None
        except Unusable as error:
            raise Problem(409, with_fields(str(error))) from None
        except Gone as error:
            raise Problem(503, str(error), retry_after=10) from None

    def wanted(self) -> list[tuple[str, Version, WarmUp]]:
        """What PRELOAD asks for: the base and the runs behind the short names, with their priors; blocking."""
        addresses = [(BASE, True), *((name, True) for name in self.registry.short)]
        addresses += [(self.newest(part), False) for part in ("idp", "code")]
        found = []
        for address, prior in addresses:
            try:
                version = self.registry.find(address)
                task = label_tasks.task_of(version, self.settings.host.task).text if prior else None
                found.append((address, version, WarmUp(prior, task)))
            except UnknownRun:
                continue  # not trained yet
            except UserError as error:
                self._tell_fault(address, str(error))
        return found

    def preload(self, wanted: Sequence[tuple[str, Version, WarmUp]]) -> None:
        """Load what is `wanted`; where the base cannot be, it is tried again later: the Hub may have been out of reach,
        or the runs not there yet, and nobody sends a request to a server that is not ready."""
        self._preloaded = time.monotonic()
        self._preloading.clear()
        for address, version, work in wanted:
            try:
                self._preloading.append(self._enqueue(version, work, None)[1])
            except Problem as error:
                self._tell_fault(address, str(error))

    def _tell_fault(self, address: str, fault: str) -> None:
        """Log why something cannot be loaded in advance, once."""
        if self._faults.get(address) != fault:
            self._faults[address] = fault
            log(f"{address} cannot be loaded in advance: {fault}")

    def unready(self) -> str | None:
        """Why it is not ready, in a sentence; None when it is."""
        if self.ready():
            return None
        if not self.settings.preload:
            return "the base is not loaded yet; PRELOAD=1 loads it at the start"
        if all(pending.answer.done() for pending in self._preloading):
            return "the base could not be loaded, and is tried again; the server's log says why"
        return "the base is being loaded"

    def ready(self) -> bool:
        """The base has been loaded and its prior is known, and so is all that PRELOAD asks for.

        It stays so when the base leaves for another one: the next request for it brings it back.
        """
        if not all(pending.answer.done() for pending in self._preloading):
            return False
        base = self.registry.base_model()
        self._ready = self._ready or any(
            warm and not version.adapter and version.model_dir == base
            for process in self.models.all()
            for version, warm in process.state.views.items()
        )
        return self._ready

    def newest(self, part: str) -> str:
        """The newest run that was trained for a kind of task ("idp" or "codegen"), or has `part` in its name and does
        not say what it was trained for; else the base. Runs that write no text are none."""
        kinds = {name: self.registry.kind(name) for name in self.registry.names() if self.registry.writes(name)}
        names = [name for name, kind in kinds.items() if kind == KINDS[part] or (kind is None and part in name.lower())]
        return max(names, key=lambda name: made_at(str(Path(self.settings.runs_dir) / name)), default=BASE)

    def about_models(self) -> dict[str, Any]:
        """What /models answers; blocking."""
        processes = [process for process in self.models.all() if process.loaded]
        loaded = {version for process in processes for version in process.state.views}
        entries = []
        for name in [BASE, *self.registry.names()]:
            try:
                newest = self.registry.find(name)
                for version in self.registry.versions(name):
                    about = describe(version) | {"loaded": version in loaded, "current": version == newest}
                    about["error"] = about["error"] or label_tasks.calibration_fault(version, self.settings.host.task)
                    if about["current"] or about["loaded"]:
                        entries.append(about)
            except (UserError, OSError, ValueError, RecursionError) as error:
                empty = ("adapter_sha256", "method", "created", "metrics", "engine", "kind", "task", "labels")
                nothing = dict.fromkeys((*empty, "text_fields"))
                entries.append(
                    {
                        "name": name,
                        "address": name,
                        "model_dir": str(Path(self.settings.runs_dir) / name),
                        "base": "",
                        **nothing,
                        "unproven": False,
                        "evaluations": [],
                        "loaded": False,
                        "current": True,
                        "error": str(error),
                    }
                )
        listed = {entry["name"] for entry in entries}
        return {
            "base_model": self.registry.base_model(),
            "bases": [process.base for process in processes],
            "task": self.settings.host.task.name,
            "labels": self.settings.host.task.labels,
            "short_names": {short: name for short, name in self.registry.short.items() if name in listed},
            "models": entries,
        }

    def record(self, request: Request, version: Version, task: str, started: float, text: str, **facts: Any) -> None:
        """One line of the audit log."""
        if self.audit is None:
            return
        hashes = {"adapter": version.name, "adapter_sha256": version.sha256, "base": version.base}
        hashes["base_hash"] = self.models.base_hash(version.base)
        inputs = {"input": text} if self.settings.audit_inputs else {}
        latency = round(1000 * (time.perf_counter() - started), 2)
        self.audit.write(request_id=web.request_id(request), task=task, **hashes, **facts, **inputs, latency_ms=latency)


def outcome(answer: Any) -> Any:
    """What a model's process has answered, unless that is an exception.

    Raises:
        Problem: 409 for a model that cannot be used, 422 for a request that it cannot take, 503 where the process
            ended over it.
    """
    if isinstance(answer, Unusable):
        raise Problem(409, with_fields(str(answer)))
    if isinstance(answer, UserError):
        raise Problem(422, with_fields(str(answer)))
    if isinstance(answer, Gone):
        raise Problem(503, str(answer), retry_after=1)
    if isinstance(answer, BaseException):
        raise answer
    return answer
