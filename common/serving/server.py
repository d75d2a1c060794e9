"""The inference server without its routes: settings, metrics, and requests on their way to a model and back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Request
from prometheus_client import Counter, Gauge, Histogram

from common.cli import UserError, log
from common.generation import json_schema
from common.models import gguf_import
from common.serving.adapter_host import HostSettings, Unusable, Work
from common.serving.audit_log import AuditLog
from common.serving.model_process import Gone, ModelProcess, Models, Pending, QueueFull
from common.serving.run_registry import BASE, BadName, Registry, UnknownRun, Version, describe
from common.serving.work import WarmUp
from common.tasks.ranking.loading import load_task
from common.web import app as web
from common.web.app import Environment, Problem, WebMetrics

POLL = 0.25  # seconds between looks whether the client is still there
CHARACTERS_A_TOKEN = 3  # about; how many rows make a batch is decided before they are encoded
FRAME_TOKENS = 40  # about, of the instruction and the chat template


@dataclass(frozen=True)
class Settings:
    """What the environment may set; the defaults are in `from_environment`."""

    runs_dir: str
    base_model: str | None
    idp_schema: str
    max_bases: int
    host: HostSettings
    request_timeout: float
    max_body_bytes: int
    api_key: str | None
    audit_log: str | None
    audit_inputs: bool
    audit_max_bytes: int
    preload: bool

    @classmethod
    def from_environment(cls) -> Settings:
        """Raises UserError for a value that cannot be."""
        env = Environment()
        runs_dir = env.text("RUNS_DIR", "runs")
        task = load_task(env.text("TASK"))
        base_model = env.text("BASE_MODEL")
        nulls = env.whole("NUM_NULL_PROMPTS", len(task.null_inputs))
        if nulls > len(task.null_inputs):
            raise UserError(f"NUM_NULL_PROMPTS={nulls} is more than the {len(task.null_inputs)} that there are")
        return cls(
            runs_dir=runs_dir,
            base_model=base_model and gguf_import.model_folder(base_model),
            idp_schema=env.text("IDP_SCHEMA", "data/idp_schema.json"),
            max_bases=env.whole("MAX_BASES", 2),
            host=HostSettings(
                max_batch_tokens=env.whole("MAX_BATCH_TOKENS", 8192),
                max_wait=env.number("MAX_WAIT_MS", 0) / 1000,
                max_queue=env.whole("MAX_QUEUE", 1024),
                task=task,
                num_null_prompts=nulls,
                runs_dir=runs_dir,
                load_in_4bit=env.choice("LOAD_IN_4BIT", ("auto", "on", "off")),
                auto_fit=env.switch("AUTO_FIT"),
            ),
            request_timeout=env.number("REQUEST_TIMEOUT", 120, least=0.001),
            max_body_bytes=env.whole("MAX_BODY_BYTES", 1 << 20),
            api_key=env.text("API_KEY"),
            audit_log=env.text("AUDIT_LOG"),
            audit_inputs=env.switch("AUDIT_INPUTS"),
            audit_max_bytes=env.whole("AUDIT_MAX_BYTES", 64 << 20),
            preload=env.switch("PRELOAD"),
        )


class ServingMetrics:
    """What /metrics shows beside requests and their latency by route."""

    def __init__(self, registry, server: Server) -> None:
        def histogram(name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        self.seconds = histogram(
            "inference_seconds", "From request to answer, by adapter and task.", ("adapter", "task"), web.SECONDS
        )
        self.batch_rows = histogram(
            "batch_rows", "Rows that shared a forward pass.", ("base", "task"), [2**i for i in range(12)]
        )
        self.margin = histogram(
            "top2_margin", "Best minus second-best score, in nats.", ("adapter",), (0.1, 0.25, 0.5, 1, 2, 4, 8, 16)
        )
        self.predictions = Counter("predictions", "Predictions per class.", ("adapter", "label"), registry=registry)
        self.loading = {
            kind: Gauge(name, text, ("name",), registry=registry)
            for kind, name, text in (
                ("base", "base_load_seconds", "Loading a base model."),
                ("adapter", "adapter_load_seconds", "Loading an adapter."),
                ("prior", "prior_warmup_seconds", "Computing a prior, or reading it from the disk."),
            )
        }
        depth = Gauge("queue_rows", "Rows that wait.", registry=registry)
        depth.set_function(lambda: sum(process.rows for process in server.models.all()))
        bases = Gauge("bases_loaded", "Base models in memory.", registry=registry)
        bases.set_function(lambda: sum(process.loaded for process in server.models.all()))
        failures = Gauge("audit_failures", "Audit lines that could not be written.", registry=registry)
        failures.set_function(lambda: server.audit.failures if server.audit else 0)
        memory = Gauge("gpu_memory_bytes", "GPU memory of what is loaded; 0 without one.", registry=registry)
        memory.set_function(lambda: sum(process.state.gpu_bytes for process in server.models.all()))
        self._children: dict[tuple, Any] = {}

    def child(self, metric: Counter | Histogram, *labels: str) -> Any:
        """`metric.labels`, looked up once."""
        key = (metric, *labels)
        if key not in self._children:
            self._children[key] = metric.labels(*labels)
        return self._children[key]


class Server:
    """Takes a request to the process of its model and waits for the answer."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.registry = Registry(settings.runs_dir, settings.base_model, settings.host.task.name)
        self.audit = AuditLog(settings.audit_log, settings.audit_max_bytes) if settings.audit_log else None
        self.web_metrics = WebMetrics()
        self.models = Models(settings.max_bases, self._start)
        self.metrics = ServingMetrics(self.web_metrics.registry, self)
        self._preloading: list[Pending] = []
        self._ready = False
        self._waiting: dict[Pending, tuple[Request, float]] = {}  # until when

    def _start(self, base: str, after: ModelProcess | None) -> ModelProcess:
        def timed(kind: str, name: str, seconds: float) -> None:
            self.metrics.loading[kind].labels(name).set(seconds)

        def batch(key: Any, rows: int) -> None:
            version, work = key
            self.metrics.child(self.metrics.batch_rows, version.base, work.name).observe(rows)

        adapters = self.registry.adapters_of(base)
        return ModelProcess(base, self.settings.host, adapters, on_batch=batch, on_timed=timed, after=after)

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
            raise Problem(409, str(error), param) from error

    def encode(self, version: Version, prompts: Sequence[str]) -> list[str | list[int]]:
        """Prompts as token ids, where this process has been told how (see `ModelProcess.encode`)."""
        return self.models.get(version.base).encode(version, prompts)

    async def answer(
        self,
        request: Request,
        version: Version,
        work: Work,
        payload: Any,
        *,
        rows: int = 1,
        tokens: int = 0,
        emit: Callable[[str], None] | None = None,
    ) -> Any:
        """What the model makes of `payload`.

        Args:
            rows, tokens: about what it takes of a queue and of a batch.
            emit: called with the parts of a text as they are written, where `work` streams.

        Raises:
            Problem: 409, 422, 503 or 504.
        """
        started = time.monotonic()
        process, pending = self._enqueue(version, work, payload, rows=rows, tokens=tokens, emit=emit)
        self._waiting[pending] = (request, started + self.settings.request_timeout)
        try:
            answer = await pending.answer
        finally:
            del self._waiting[pending]
            process.withdraw(pending)  # has no effect once it is answered
        self.metrics.child(self.metrics.seconds, version.name, work.name).observe(time.monotonic() - started)
        return outcome(answer)

    async def watch(self) -> None:
        """End the wait of requests that are late or whose client has gone; one round for all costs each one nothing."""
        while True:
            await asyncio.sleep(min(POLL, self.settings.request_timeout / 4))
            late = f"no answer within {self.settings.request_timeout:g} s; send less, or raise REQUEST_TIMEOUT"
            for pending, (request, deadline) in list(self._waiting.items()):
                problem = None
                if time.monotonic() > deadline:
                    problem = Problem(504, late)
                elif time.monotonic() - pending.job.arrived > POLL and await request.is_disconnected():
                    problem = Problem(499, "the client went away")
                if problem and not pending.answer.done():
                    pending.answer.set_exception(problem)

    def _enqueue(self, version: Version, work: Work, payload: Any, **more: Any) -> tuple[ModelProcess, Pending]:
        process = self.models.get(version.base)
        try:
            return process, process.put(version, work, payload, versions=self.registry.versions(version.name), **more)
        except QueueFull:
            raise Problem(503, "the queue is full; try again", retry_after=1) from None
        except Unusable as error:
            raise Problem(409, str(error)) from None

    def preload(self) -> None:
        """Have the base and what the named endpoints stand for loaded, with their priors."""
        addresses = [(BASE, True), *((name, True) for name in self.registry.short)]
        addresses += [(self.newest(part), False) for part in ("idp", "code")]
        for address, prior in addresses:
            try:
                version = self.registry.find(address)
                self._preloading.append(self._enqueue(version, WarmUp(prior), None)[1])
            except UnknownRun:
                continue  # not trained yet
            except (UserError, Problem) as error:
                log(f"{address} cannot be loaded in advance: {error}")

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
        """The newest run with `part` in its name, else the base."""
        names = [name for name in self.registry.names() if part in name.lower()]
        return max(names, key=lambda name: _changed(Path(self.settings.runs_dir) / name), default=BASE)

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
                    if about["current"] or about["loaded"]:
                        entries.append({**about, "error": None})
            except UserError as error:
                nothing = dict.fromkeys(("adapter_sha256", "method", "created", "metrics"))
                entries.append(
                    {
                        "name": name,
                        "address": name,
                        "model_dir": str(Path(self.settings.runs_dir) / name),
                        "base": "",
                        **nothing,
                        "loaded": False,
                        "current": True,
                        "error": str(error),
                    }
                )
        found = {entry["name"] for entry in entries}
        return {
            "base_model": self.registry.base_model(),
            "bases": [process.base for process in processes],
            "task": self.settings.host.task.name,
            "labels": self.settings.host.task.labels,
            "short_names": {short: name for short, name in self.registry.short.items() if name in found},
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


def _changed(folder: Path) -> float:
    try:
        return max(entry.stat().st_mtime for entry in folder.iterdir() if entry.is_file())
    except (OSError, ValueError):
        return 0.0


def outcome(answer: Any) -> Any:
    """What a model's process has answered, unless that is an exception.

    Raises:
        Problem: 409 for a model that cannot be used, 422 for a request that it cannot take, 503 where the process
            ended over it.
    """
    if isinstance(answer, Unusable):
        raise Problem(409, str(answer))
    if isinstance(answer, UserError):
        raise Problem(422, str(answer))
    if isinstance(answer, Gone):
        raise Problem(503, str(answer), retry_after=1)
    if isinstance(answer, BaseException):
        raise answer
    return answer


def estimate(text: str) -> int:
    """About how many tokens a prompt with this text has."""
    return FRAME_TOKENS + len(text) // CHARACTERS_A_TOKEN


def check_schema(schema: dict[str, Any], param: str) -> None:
    """Raises Problem 422 for a schema that decoding cannot follow."""
    try:
        json_schema.preflight(schema)
    except UserError as error:
        raise Problem(422, str(error), param) from error
