"""What goes on in the background: jobs are started in order, watched, stopped and, after a while, deleted."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.cli import log
from common.jobs.backend import GONE, Backend, Ended
from common.jobs.folder import JobFolder, delete_set_aside, try_lock
from common.jobs.request import as_taken_now
from common.jobs.store import FAILED, QUEUED, RUNNING, Job, Store

TICK = 0.1  # seconds between two looks while jobs run
CLEAN = 60.0  # seconds between two rounds of retention
DAY = 86_400


class Runner:
    """A thread that runs the jobs of a store.

    Of several servers on one DATA_DIR only one runs jobs: the one with the lock on runner.lock. After it has been
    killed, another, or its successor, gets the lock and finds the jobs that were handed over.

    Args:
        keep_days: ended jobs are deleted after that many days; None keeps them.
        quota: bytes that the jobs' folders may have together before the oldest ended ones are deleted; None: no end.
    """

    def __init__(
        self,
        store: Store,
        backend: Backend,
        jobs_dir: Path,
        max_running: int,
        keep_days: float | None,
        quota: int | None,
    ) -> None:
        self.store, self.backend, self.jobs_dir = store, backend, jobs_dir
        self.max_running, self.keep_days, self.quota = max_running, keep_days, quota
        self.is_leader = False
        self._wake, self._stop = threading.Event(), threading.Event()
        self._troubles: set[str] = set()
        self._cleaned = -CLEAN
        self._thread = threading.Thread(target=self._run, name="runner", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop running jobs here; workers go on, and the next server finds them."""
        self._stop.set()
        self._wake.set()
        self._thread.join()
        self.backend.close()

    def wake(self) -> None:
        """Something has been asked for: look at once."""
        self._wake.set()

    def _run(self) -> None:
        lock = os.open(self.jobs_dir.parent / "runner.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not self._stop.is_set():
                self.is_leader = self.is_leader or try_lock(lock)
                if self.is_leader:
                    self._tick()
                self._wake.wait(TICK)
                self._wake.clear()
        finally:
            self.is_leader = False
            os.close(lock)

    def _tick(self) -> None:
        """One look at everything."""
        self._went_well = True
        for job in self._try(self.store.handed) or ():
            self._try(self._look, job)
        self._try(self._fill)
        if time.monotonic() - self._cleaned > CLEAN:
            self._cleaned = time.monotonic()
            self._try(self.clean)
        if self._went_well:
            self._troubles.clear()

    def _try(self, step: Callable[..., Any], *args: Any) -> Any:
        """What a step gives. Whatever goes wrong (a full disk, a lost API server) is said once and tried again."""
        try:
            return step(*args)
        except Exception as error:
            self._went_well = False
            trouble = f"{type(error).__name__}: {error}"
            if trouble not in self._troubles:
                expected = isinstance(error, OSError | sqlite3.Error)
                log(f"jobs: {trouble if expected else traceback.format_exc()}; trying again")
            self._troubles.add(trouble)

    def _fill(self) -> None:
        """Start jobs in the order of the queue, as many as may run."""
        while len(handed := self.store.handed()) < self.max_running and not self._stop.is_set():
            taken = {job.slot for job in handed}
            slot = next(number for number in range(self.max_running) if number not in taken)
            job = self.store.claim(slot, self.backend.first_state)
            if job is None:
                break
            self._start(job)

    def _start(self, job: Job) -> None:
        try:
            self.backend.start(replace(job, commands=[as_taken_now(command) for command in job.commands]))
        except OSError as error:
            self._finish(job, Ended(FAILED, {"reason": f"cannot start: {error}", "exit_code": None, "log": []}))

    def _look(self, job: Job) -> None:
        status = self.backend.look(job)
        if isinstance(status, Ended):
            self._finish(job, status)
        elif status == GONE:
            self._start(job)  # it goes on from its checkpoint
        else:
            if status == RUNNING and job.state == QUEUED:
                self.store.begin(job)
            if job.cancel:
                self.backend.stop(job)

    def _finish(self, job: Job, ended: Ended) -> None:
        self.backend.forget(job)
        folder = JobFolder(self.jobs_dir / job.id)
        self.store.finish(job, ended.state, ended.error, ended.artifacts, folder.size())

    def clean(self) -> None:
        """Delete what is too old or too much. A folder is only deleted for a job of the table, or after one."""
        delete_set_aside(self.jobs_dir)
        self.store.keep_reserve()
        ended = self.store.ended()
        used = sum(size for _, _, size in ended)
        if self.quota is not None:
            used += sum(JobFolder(self.jobs_dir / job.id).size() for job in self.store.handed())
        for job_id, when, size in ended:
            too_old = self.keep_days is not None and time.time() - when > self.keep_days * DAY
            too_much = self.quota is not None and used > self.quota
            if (too_old or too_much) and not self.needing(job_id) and self.delete(job_id):
                used -= size

    def needing(self, job_id: str) -> list[Job]:
        """The jobs that have not ended and need what another has left."""
        folder = os.path.realpath(self.jobs_dir / job_id)  # as a model in reach is named
        return [job for job in self.store.needing(folder) if job.id != job_id]

    def delete(self, job_id: str) -> bool:
        """Delete a job that has ended, and its folder; False where it has not."""

        def set_aside() -> None:
            with contextlib.suppress(FileNotFoundError):  # one that was cancelled before it began has none
                JobFolder(self.jobs_dir / job_id).set_aside()

        try:
            deleted = self.store.delete(job_id, set_aside)
        except sqlite3.OperationalError:  # a full disk: its files make room
            delete_set_aside(self.jobs_dir)
            deleted = self.store.delete(job_id, set_aside)
        delete_set_aside(self.jobs_dir)
        return deleted
