"""The distillation service without its routes: settings, and how store, runner, backend and checks belong together."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import Gauge

from common.cli import UserError
from common.jobs import choices, local_backend, progress, published
from common.jobs.backend import Backend
from common.jobs.checks import Reach, Vocabularies, check_memory
from common.jobs.files import FileStore, StoredFile
from common.jobs.fine_tuning import JUDGES, KEY, PUBLISHED, Publication, model_name
from common.jobs.folder import ARTIFACTS, JOB_ID, WORKER, JobFolder, check_system
from common.jobs.publication import is_anothers
from common.jobs.recovery import adopt_folders, keep_row
from common.jobs.request import INPUTS, JOB_NAME, PlannedJob, Planner
from common.jobs.runner import Runner
from common.jobs.store import (
    CANCELLED,
    ENDED,
    FAILED,
    PAUSED,
    QUEUED,
    RUNNING,
    STATES,
    TO_PAUSE,
    Job,
    KeyTaken,
    Store,
    new_id,
    open_store,
)
from common.run_record import utc_stamp
from common.web.app import Environment, Problem, WebMetrics

ROOT = Path(__file__).parents[2]
OWN_FOLDERS = tuple(ROOT / name for name in ("runs", "data", "models"))  # where this toolkit's scripts put things
PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)*")
BACKENDS = ("local", "kubernetes")
LOOK = 10.0  # seconds between looks for models and data


@dataclass(frozen=True)
class JobServiceSettings:
    """What the environment may set; the defaults are in `from_environment`."""

    data_dir: Path
    backend: str
    max_running: int | None
    max_queue: int
    keep_days: float | None
    data_quota: int | None
    allowed_roots: tuple[Path, ...]
    api_prefix: str
    api_key: str | None
    max_body_bytes: int
    warm_up: bool = True  # import what the checks need before the first request needs it
    scripts: Path = ROOT
    allowed_hosts: tuple[str, ...] = ()
    max_file_bytes: int = 512 << 20
    files_quota: int = 20 << 30
    runs_dir: Path = ROOT / "runs"  # of the inference server, where fine-tuned models go
    fine_tuning_models: tuple[tuple[str, str], ...] = ()  # (pattern of names, the base that stands in for them)
    serve_url: str | None = None

    @classmethod
    def from_environment(cls) -> JobServiceSettings:
        """Raises UserError for a value that cannot be."""
        env = Environment()
        data_dir = Path(os.path.abspath(env.text("DATA_DIR", str(ROOT / "runs" / "jobs"))))
        backend, prefix = env.text("BACKEND", "local"), env.text("API_PREFIX", "").rstrip("/")
        if backend not in BACKENDS:
            raise UserError(f"BACKEND={backend} is none of {', '.join(BACKENDS)}; set it to one or unset it")
        if not PREFIX.fullmatch(prefix):
            raise UserError(f"API_PREFIX={prefix} is not like /distill-slm/v1; set it to a path or unset it")
        runs_dir = Path(os.path.abspath(env.text("RUNS_DIR", str(cls.runs_dir))))
        return cls(
            data_dir=data_dir,
            backend=backend,
            max_running=env.whole("MAX_RUNNING", 1) if env.text("MAX_RUNNING") else None,
            max_queue=env.whole("MAX_QUEUE", 1000),
            keep_days=env.number("KEEP_DAYS", 0) or None,
            data_quota=env.whole("DATA_QUOTA", 1) if env.text("DATA_QUOTA") else None,
            allowed_roots=roots_of(env.text("ALLOWED_ROOTS"), (*OWN_FOLDERS, data_dir, runs_dir)),
            api_prefix=prefix,
            api_key=env.text("API_KEY"),
            max_body_bytes=env.whole("MAX_BODY_BYTES", 1 << 18),
            allowed_hosts=env.names("ALLOWED_HOSTS"),
            max_file_bytes=env.whole("MAX_FILE_BYTES", cls.max_file_bytes),
            files_quota=env.whole("FILES_QUOTA", cls.files_quota),
            runs_dir=runs_dir,
            fine_tuning_models=stand_ins(env.text("FINE_TUNING_MODELS")),
            serve_url=env.text("SERVE_URL", "/" if prefix else None),
        )


def lost_inputs(commands: Sequence[dict[str, Any]], folder: JobFolder | None = None) -> dict[str, str]:
    """{field: path} of the local models and files that a job's training reads and that are not there any more.

    Args:
        folder: of a job that has begun: once it is trained, those count that are read by what has not ended.
    """
    words = [word.partition("=") for command in commands if command["output"] == "" for word in command["argv"]]
    named = {flag.removeprefix("--"): path for flag, _, path in words if os.path.isabs(path)}
    lost = {field: path for field, path in named.items() if field in INPUTS and not os.path.exists(path)}
    if folder is None or not folder.is_trained:
        return lost
    left = [command for command in commands[folder.read(WORKER).get("finished", 0) :] if command["output"] != ""]
    read = {word.partition("=")[2] for command in left for word in command["argv"]}
    lost = {field: path for field, path in lost.items() if path in read}
    base = published.base_of(folder) if any(map(loads_model, left)) else None
    if base and os.path.isabs(base) and not os.path.exists(base):
        lost["student"] = base
    return lost


def loads_model(command: dict[str, Any]) -> bool:
    """Whether a command that follows a training loads its model: an export, or the figures on the validation file."""
    return bool(command["output"]) or JUDGES in command["argv"]


def roots_of(text: str | None, default: tuple[Path, ...]) -> tuple[Path, ...]:
    """The folders of a list like PATH, in which nothing between two colons is no folder: not the working directory.

    Args:
        default: where there is no list.

    Raises:
        UserError: the list has no folder.
    """
    if text is None:
        return tuple(dict.fromkeys(default))
    if roots := tuple(Path(root) for root in text.split(os.pathsep) if root.strip()):
        return roots
    raise UserError(f"ALLOWED_ROOTS={text} names no folder; set it to some, like /data:/models, or unset it")


def stand_ins(text: str | None) -> tuple[tuple[str, str], ...]:
    """Of `gpt-4o-mini*=Qwen/Qwen2.5-3B-Instruct,...` the pairs. Raises UserError for what is none."""
    pairs = [tuple(part.strip() for part in entry.split("=", 1)) for entry in (text or "").split(",") if entry.strip()]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise UserError(f"FINE_TUNING_MODELS={text} is not like gpt-*=Qwen/Qwen2.5-3B-Instruct; set it so or unset it")
    return tuple(pairs)


class Service:
    """What the routes call. Everything here blocks for a moment: not for the event loop."""

    def __init__(self, settings: JobServiceSettings) -> None:
        """Raises UserError where the settings cannot be met."""
        self.settings = settings
        self.jobs_dir = settings.data_dir / "jobs"
        check_system()
        try:
            self.store: Store = open_store(settings.data_dir, lambda job: keep_row(self.folder(job), job))
            self.jobs_dir.mkdir(exist_ok=True)
            self.files = FileStore(settings.data_dir, settings.max_file_bytes, settings.files_quota)
            self.files.clean()
            published.delete_set_aside(settings.runs_dir)
            adopt_folders(self.store, self.jobs_dir)
        except (OSError, sqlite3.Error) as error:
            words = error.strerror if isinstance(error, OSError) else str(error)
            remedy = f"choose another folder, or give it to user {os.getuid()}"
            raise UserError(f"DATA_DIR={settings.data_dir}: {words}; {remedy}") from error
        self.reach = Reach(settings.allowed_roots, own=settings.data_dir, uploaded=self.uploaded)
        # held while a job is taken, with the name, the files and the models that it needs, and while one is deleted
        self._in_use = threading.Lock()
        self.vocabularies = Vocabularies()
        elsewhere = settings.backend == "kubernetes"  # in images of their own
        self.planner = Planner(settings.scripts, settings.data_dir, self.reach, elsewhere=elsewhere)
        backend, at_once = self.make_backend()
        self.runner = Runner(
            self.store,
            backend,
            self.jobs_dir,
            settings.max_running or at_once,
            settings.keep_days,
            settings.data_quota,
        )
        self._choices: tuple[float, dict[str, Any]] = (0.0, {})
        self.closing = threading.Event()  # the server is about to stop
        self.metrics = WebMetrics()
        gauge = Gauge("jobs", "Jobs by state.", ("state",), registry=self.metrics.registry)
        for state in STATES:
            gauge.labels(state).set_function(lambda state=state: self.store.counts()[state])

    def make_backend(self) -> tuple[Backend, int]:
        """The backend, and how many jobs it runs at once where MAX_RUNNING is not set."""
        if self.settings.backend == "kubernetes":
            from common.jobs.kubernetes_backend import KubernetesBackend

            return KubernetesBackend.from_environment(self.jobs_dir), 1000  # the cluster has a queue of its own
        cards = local_backend.find_cards()
        return local_backend.LocalBackend(self.jobs_dir, cards), max(1, len(cards))

    def folder(self, job: Job) -> JobFolder:
        return JobFolder(self.jobs_dir / job.id)

    def find(self, job_id: str) -> Job | None:
        return self.store.find(job_id) if JOB_ID.fullmatch(job_id) else None

    def get(self, job_id: str) -> Job:
        """Raises Problem 404."""
        job = self.find(job_id)
        if job is None:
            raise Problem(404, "there is no such job", "job_id")
        return job

    def file(self, name: str) -> StoredFile:
        """A file that was sent. Raises Problem 404."""
        file = self.files.find(name)
        if file is None:
            raise Problem(404, "there is no such file", "file_id")
        return file

    def uploaded(self, name: str) -> Path | None:
        """Where a file that was sent is; None where there is none of this id."""
        file = self.files.find(name)
        return None if file is None else self.files.path(file)

    def delete_file(self, name: str) -> None:
        """Raises Problem 404, or 409 where a job that has not ended needs it."""
        with self._in_use:
            path = str(self.files.path(self.file(name)))
            for job in self.store.needing(path):
                raise Problem(409, f"the job {job.id}, which is {job.state}, needs the file; cancel it first")
            self.files.delete(name)

    def delete_expired_files(self) -> None:
        """Delete the files whose time has passed, but for those that a job needs which has not ended."""
        with self._in_use:
            for file in self.files.expired():
                if not self.store.needing(str(self.files.path(file))):
                    self.files.delete(file.id)

    def submit(self, payload: dict[str, Any], key: str | None, fine_tuning: dict[str, Any] | None = None) -> Job:
        """Check a request and put its job into the queue.

        Args:
            fine_tuning: of one of OpenAI's: what was asked for, and its hyperparameters; its model is then published.

        Raises:
            Problem: 422 that names the field; 503 where too many wait.
        """
        try:
            request = payload if fine_tuning is None else payload | {KEY: fine_tuning}
            if key is not None and (known := self.store.by_key(key, request)):
                return known
            job_id = new_id()
            plan = self.planner.plan(payload, self.jobs_dir / job_id / "artifacts")
            teacher = getattr(plan.settings, "teacher", None)
            if teacher and not plan.settings.teacher_cache:  # in a cache another vocabulary is translated
                self.vocabularies.check(teacher, plan.settings.student)
            check_memory(plan.settings, self.runner.backend.device)
            if self.store.counts()[QUEUED] >= self.settings.max_queue:
                raise Problem(503, f"{self.settings.max_queue} jobs wait already; try again later", retry_after=60)
            commands = plan.commands
            if fine_tuning is not None:
                published = Publication(self.settings.runs_dir, self.settings.data_dir)
                name = model_name(payload["student"], fine_tuning["asked"].get("suffix"), job_id)
                commands = [*commands, *published.commands(plan.settings, name, job_id)]
            with self._in_use:
                if key is not None and (known := self.store.by_key(key, request)):
                    return known
                if fine_tuning is None and (name := payload.get(JOB_NAME)):
                    commands = [*commands, *self._named(name, plan, job_id)]
                for field in lost_inputs(commands):
                    raise Problem(422, f"{field}: it is not there any more", field)
                with self._no_trace(job_id):
                    job = self.store.submit(plan.method, request, commands, job_id, key)
        except KeyTaken:
            raise Problem(422, "Idempotency-Key: it was used for another request", "Idempotency-Key") from None
        except OSError as error:
            raise Problem(503, f"the job cannot be kept ({error.strerror}); try again", retry_after=60) from error
        self.runner.wake()
        return job

    @contextlib.contextmanager
    def _no_trace(self, job_id: str) -> Iterator[None]:
        """Of a job that is not taken no folder stays, from which a later start would take it in."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError, sqlite3.Error):
                if self.store.find(job_id) is None:
                    JobFolder(self.jobs_dir / job_id).set_aside()
            raise

    def _named(self, name: str, plan: PlannedJob, job_id: str) -> list[dict[str, Any]]:
        """What gives the run of a job that has a name a place among those that are served, under it.

        Raises:
            Problem: 422 where there is, or will be, another run of that name.
        """
        if self._is_taken(name, job_id):
            raise Problem(422, f"{JOB_NAME}: there is a run called {name}; take another name", JOB_NAME)
        place = Publication(self.settings.runs_dir, self.settings.data_dir)
        return place.commands(plan.settings, name, job_id, judged=plan.method in ("sft", "dpo"), results=False)

    def _is_taken(self, name: str, job_id: str) -> bool:
        """Whether a run is, or is to be, served under a name that is not of this job."""
        waiting = {job.request.get(JOB_NAME) for job in self.store.unended() if job.id != job_id}
        return name in waiting or is_anothers(self.settings.runs_dir / name, job_id)

    def cancel(self, job_id: str) -> Job:
        """Raises Problem 404, or 409 for one that has ended."""
        job = self.get(job_id)
        if job.state in ENDED and job.state != CANCELLED:
            raise Problem(409, f"the job has {job.state} already")
        job = self.store.cancel(job_id) or job
        self.runner.wake()
        return job

    def pause(self, job_id: str) -> Job:
        """Raises Problem 404, or 409 for one that has ended or is about to be cancelled."""
        job = self.get(job_id)
        if job.state in ENDED:
            raise Problem(409, f"the job has {job.state} already" if job.state != CANCELLED else "the job is cancelled")
        job = self.store.pause(job_id) or job
        if job.cancel and job.cancel != TO_PAUSE:
            raise Problem(409, "the job is being cancelled; resume it once it is")
        self.runner.wake()
        return job

    def resume(self, job_id: str) -> Job:
        """Raises Problem 404, or 409 for one that is neither paused nor failed nor cancelled, or has lost its name or
        something that it reads."""
        with self._in_use:
            job = self.get(job_id)
            name = job.request.get(JOB_NAME)
            if job.state in (PAUSED, FAILED, CANCELLED):
                if name and self._is_taken(name, job_id):
                    sentence = f"there is another run called {name} by now; send the job again under another name"
                    raise Problem(409, sentence)
                for flag, path in lost_inputs(job.commands, self.folder(job)).items():
                    field, value = self.planner.asked_for(job.method, job.request, flag) or (flag, path)
                    raise Problem(409, f"{field}: {value} is not there any more; send the job again with another")
            resumed = self.store.resume(job_id)
        if not resumed:
            state = "being paused; wait until it is" if job.cancel == TO_PAUSE else job.state
            raise Problem(409, f"the job is {state}; one that is paused, failed or was cancelled can be resumed")
        self.runner.wake()
        return self.get(job_id)

    def delete(self, job_id: str) -> None:
        """Raises Problem 404, or 409 for one that has not ended, or whose model another needs which has not ended."""
        with self._in_use:
            job = self.get(job_id)
            for other in self.runner.needing(job_id):
                raise Problem(409, f"the job {other.id}, which is {other.state}, needs its model; cancel that first")
            if not self.runner.delete(job_id):
                raise Problem(409, f"the job is {job.state}; cancel it first")

    def delete_model(self, name: str) -> None:
        """Delete a model that a job has published, with the earlier states of it; the job stays.

        Raises:
            Problem: 404, 403 for a run that no job has made, 409 while a job or another model needs it, 503 where the
                disk does not let it go.
        """
        runs_dir = self.settings.runs_dir
        with self._in_use:
            folders = published.states(runs_dir, name)
            job = self.find(published.owner_of(folders[-1]) or "")
            if job and job.state not in ENDED:
                raise Problem(409, f"the job {job.id}, which makes it, is {job.state}; cancel that first", "model")
            for folder in folders:
                for other in self.store.needing(os.path.realpath(folder)):  # as a model in reach is named
                    words = f"the job {other.id}, which is {other.state}, needs {folder.name}; cancel that first"
                    raise Problem(409, words, "model")
                for other in published.standing_on(runs_dir, self.jobs_dir, folder):
                    raise Problem(409, f"the {other} stands on {folder.name}; delete that first", "model")
            try:
                published.delete(folders)
            except OSError as error:
                message = f"the model cannot be deleted ({error.strerror}); make {runs_dir} writable and try again"
                raise Problem(503, message, retry_after=60) from error

    def describe(self, job: Job) -> dict[str, Any]:
        """A job as the API shows it."""
        waiting = job.state == QUEUED and not job.handed
        return {
            "job_id": job.id,
            "name": job.request.get(JOB_NAME),
            "served_as": self._served_as(job),
            "method": job.method,
            "state": job.state,
            "cancelling": bool(job.cancel) and job.cancel != TO_PAUSE,
            "pausing": job.cancel == TO_PAUSE,
            "ahead": self.store.ahead_of(job) if waiting else None,
            "attempt": job.attempt,
            "created": stamp(job.created),
            "started": stamp(job.started),
            "ended": stamp(job.ended),
            "command": self._command(job),
            **progress.status(self.folder(job), job.state in ENDED),
            "evaluations": self.folder(job).evaluations(),
            "error": job.error,
            "resumable": job.state in (PAUSED, FAILED, CANCELLED),
            "request": job.request,
        }

    def _served_as(self, job: Job) -> str | None:
        """The run that a job has become, unless that was deleted."""
        name = self.folder(job).read(f"{ARTIFACTS}/{PUBLISHED}").get("model")
        return name if name and published.owner_of(self.settings.runs_dir / name) == job.id else None

    def choices(self) -> dict[str, Any]:
        """What a request may name, looked for again after `LOOK` seconds."""
        until, known = self._choices
        if time.monotonic() > until:
            known = choices.choices(self.reach, self.planner) | {"serve_url": self.settings.serve_url}
            self._choices = time.monotonic() + LOOK, known
        return known

    def _command(self, job: Job) -> dict[str, Any] | None:
        """Which of a running job's commands is at work."""
        if job.state != RUNNING:
            return None
        number = min(self.folder(job).read(WORKER).get("finished", 0) + 1, len(job.commands))
        script, *words = job.commands[number - 1]["argv"]
        return {"number": number, "of": len(job.commands), "name": words[0] if script == "-m" else Path(script).name}

    def page(self, limit: int, before: int | None, state: str | None) -> dict[str, Any]:
        """The newest jobs, and where the next page begins."""
        jobs = self.store.page(limit + 1, before, state)
        more = len(jobs) > limit
        return {"jobs": [self.describe(job) for job in jobs[:limit]], "next": jobs[limit - 1].number if more else None}


def stamp(seconds: float | None) -> str | None:
    """Seconds since 1970 as 2026-01-02T03:04:05.678Z."""
    return None if seconds is None else utc_stamp(seconds, milliseconds=True)
