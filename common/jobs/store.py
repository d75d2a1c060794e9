"""The jobs that a service knows, in SQLite: what was asked for, in which state it is, how it ended.

A job is queued, running, paused, succeeded, failed or cancelled. `handed` says that it was given to the backend and
not yet taken back; only one that is queued and not handed can be claimed. The process that runs jobs is the only one
that claims and finishes; any process may submit, cancel, pause, resume and read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from common.cli import log

STATES = ("queued", "running", "paused", "succeeded", "failed", "cancelled")
QUEUED, RUNNING, PAUSED, SUCCEEDED, FAILED, CANCELLED = STATES
ENDED = (SUCCEEDED, FAILED, CANCELLED)
TO_CANCEL, TO_PAUSE = 1, 2  # what a job that is handed was asked for
FINE_TUNING = "fine_tuning"  # of a request: what OpenAI's client asked for, and its hyperparameters
WAIT = 10  # seconds for the write lock
RESERVE = 1 << 20  # bytes kept back on the disk, so that a full one still takes what makes room
SCHEMA = """
CREATE TABLE IF NOT EXISTS job (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given twice
    id TEXT NOT NULL UNIQUE,
    method TEXT NOT NULL,
    request TEXT NOT NULL,                     -- JSON, as it was sent
    commands TEXT NOT NULL,                    -- JSON, see request.PlannedJob
    key TEXT UNIQUE,                           -- of idempotency
    place INTEGER NOT NULL,                    -- in the queue
    state TEXT NOT NULL DEFAULT 'queued',
    handed INTEGER NOT NULL DEFAULT 0,
    attempt INTEGER NOT NULL DEFAULT 0,
    slot INTEGER,                              -- which of the cards, while it is handed
    cancel INTEGER NOT NULL DEFAULT 0,         -- TO_CANCEL or TO_PAUSE, while it is handed
    created REAL NOT NULL,
    started REAL,
    ended REAL,
    error TEXT,                                -- JSON
    artifacts TEXT NOT NULL DEFAULT '[]',      -- JSON
    bytes INTEGER NOT NULL DEFAULT 0,          -- of its folder, once it has ended
    stops TEXT NOT NULL DEFAULT '[]'           -- JSON, see Job
);
CREATE INDEX IF NOT EXISTS waiting ON job (state, handed, place);
"""


@dataclass(frozen=True)
class Job:
    """A row. Times are seconds since 1970.

    Attributes:
        stops: {"state", "time", "reason"} of each time that it was paused or cancelled, or failed, also when it was
            resumed afterwards.
    """

    number: int
    id: str
    method: str
    request: dict[str, Any]
    commands: list[dict[str, Any]]
    key: str | None
    place: int
    state: str
    handed: bool
    attempt: int
    slot: int | None
    cancel: int
    created: float
    started: float | None
    ended: float | None
    error: dict[str, Any] | None
    artifacts: list[dict[str, Any]]
    bytes: int
    stops: list[dict[str, Any]] = field(default_factory=list)

    def needs(self, path: str) -> bool:
        """Whether its commands name a file or folder, or what is in it."""
        named = re.compile(re.escape(path) + r"(?![\w.-])")  # runs/tickets-2 is not in runs/tickets
        return any(named.search(word) for command in self.commands for word in command["argv"])


JSON_COLUMNS = ("request", "commands", "error", "artifacts", "stops")
ADDED = {"stops": "TEXT NOT NULL DEFAULT '[]'"}  # columns that tables of earlier versions lack


def _with_stop(state: str, time: str, reason: str = "NULL") -> str:
    """SQL: the stops of a row, and one more."""
    return f"json_insert(stops, '$[#]', json_object('state', {state}, 'time', {time}, 'reason', {reason}))"


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    for name in JSON_COLUMNS:
        values[name] = None if values[name] is None else json.loads(values[name])
    return Job(**values | {"handed": bool(values["handed"])})


class KeyTaken(Exception):
    """The idempotency key belongs to a job with another request."""


class Store:
    """The table, for any number of threads and processes; every method is one transaction.

    On a full disk jobs can still be cancelled, deleted and taken back from the backend: a file of `RESERVE` bytes is
    given up for that.

    Args:
        keep: called with every row that has changed, before the change is final, to keep a copy of it elsewhere.
            Where that fails with an OSError, a new job is not taken; other changes go on.

    Raises (all of its methods):
        sqlite3.OperationalError: the disk is full, or the file cannot be written.
    """

    def __init__(self, path: str | Path, keep: Callable[[Job], None] = lambda job: None) -> None:
        self.path, self._keep = Path(path), keep
        self.reserve = self.path.with_name("reserve")
        self._local = threading.local()
        with self._transaction() as connection:
            for statement in SCHEMA.split(";\n"):
                connection.execute(statement)
            there = {row["name"] for row in connection.execute("PRAGMA table_info(job)")}
            for name in ADDED.keys() - there:
                connection.execute(f"ALTER TABLE job ADD COLUMN {name} {ADDED[name]}")

    def _connection(self) -> sqlite3.Connection:
        """This thread's own: readers and the writer never wait for one another."""
        if not hasattr(self._local, "connection"):
            connection = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")  # an accepted job outlives a power cut
            self._local.connection = connection
        return self._local.connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection = self._connection()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _make_room(self) -> bool:
        """Give the reserve up; False where there is none any more."""
        try:
            self.reserve.unlink()
        except OSError:
            return False
        return True

    def keep_reserve(self) -> None:
        """Take the reserve back, where there is room for it again."""
        if not hasattr(os, "posix_fallocate") or self.reserve.exists():
            return
        try:
            with open(self.reserve, "wb") as handle:
                os.posix_fallocate(handle.fileno(), 0, RESERVE)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._make_room()

    def _even_when_full(self, change: Callable[[], Any]) -> Any:
        """What a transaction gives, also one on a full disk."""
        try:
            return change()
        except sqlite3.OperationalError as error:
            if "full" not in str(error) or not self._make_room():
                raise
            return change()

    def _rows(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        return self._connection().execute(sql, values).fetchall()

    def _kept(self, job_id: str) -> Job | None:
        """A job as it is now, a copy of which is kept where there is room for it."""
        job = self.find(job_id)
        if job is not None:
            with contextlib.suppress(OSError):
                self._keep(job)
        return job

    # Asked by anybody.

    def submit(
        self, method: str, request: dict[str, Any], commands: Sequence[dict[str, Any]], job_id: str, key: str | None
    ) -> Job:
        """Put a job at the end of the queue; with the key of an earlier one, that one comes back and nothing is added.

        Raises:
            KeyTaken: the earlier one's request was another.
        """
        with self._transaction() as connection:
            if key is not None and (known := self.by_key(key, request)):
                return known
            connection.execute(
                "INSERT INTO job (id, method, request, commands, key, place, created) VALUES (?, ?, ?, ?, ?, "
                "(SELECT coalesce(max(place), 0) + 1 FROM job), ?)",
                (job_id, method, json.dumps(request), json.dumps(commands), key, time.time()),
            )
            job = self.find(job_id)
            self._keep(job)
            return job

    def by_key(self, key: str, request: dict[str, Any]) -> Job | None:
        """The job that was submitted under an idempotency key. Raises KeyTaken for another request than this.

        Of a fine-tuning job what was asked for counts, not what the service has made of it.
        """
        rows = self._rows("SELECT * FROM job WHERE key = ?", key)
        if rows and asked_for(json.loads(rows[0]["request"])) != asked_for(request):
            raise KeyTaken(key)
        return _job(rows[0]) if rows else None

    def find(self, job_id: str) -> Job | None:
        rows = self._rows("SELECT * FROM job WHERE id = ?", job_id)
        return _job(rows[0]) if rows else None

    def page(self, limit: int, before: int | None = None, state: str | None = None) -> list[Job]:
        """The newest jobs, those with a number below `before`."""
        rows = self._rows(
            "SELECT * FROM job WHERE (?1 IS NULL OR number < ?1) AND (?2 IS NULL OR state = ?2) "
            "ORDER BY number DESC LIMIT ?3",
            before, state, limit,
        )  # fmt: skip
        return [_job(row) for row in rows]

    def ahead_of(self, job: Job) -> int:
        """How many jobs come before one that waits."""
        sql = "SELECT count(*) FROM job WHERE state = 'queued' AND handed = 0 AND place < ?"
        return self._rows(sql, job.place)[0][0]

    def counts(self) -> dict[str, int]:
        """Jobs by state; every state is there."""
        counts = dict(self._rows("SELECT state, count(*) FROM job GROUP BY state"))
        return {state: counts.get(state, 0) for state in STATES}

    def cancel(self, job_id: str) -> Job | None:
        """A job that waits or is paused is cancelled; one that is handed gets a mark, for the runner.

        Others stay as they are.
        """

        def change() -> Job | None:
            with self._transaction() as connection:
                stops = _with_stop("'cancelled'", "?1")
                connection.execute(
                    f"UPDATE job SET state = 'cancelled', ended = ?1, stops = {stops} "
                    "WHERE id = ?2 AND state IN ('queued', 'paused') AND handed = 0",
                    (time.time(), job_id),
                )
                connection.execute("UPDATE job SET cancel = ? WHERE id = ? AND handed = 1", (TO_CANCEL, job_id))
                return self._kept(job_id)

        return self._even_when_full(change)

    def pause(self, job_id: str) -> Job | None:
        """A job that waits is paused; one that is handed gets a mark, for the runner, unless it is to be cancelled."""

        def change() -> Job | None:
            with self._transaction() as connection:
                stops = _with_stop("'paused'", "?1")
                connection.execute(
                    f"UPDATE job SET state = 'paused', stops = {stops} "
                    "WHERE id = ?2 AND state = 'queued' AND handed = 0",
                    (time.time(), job_id),
                )
                connection.execute(
                    "UPDATE job SET cancel = ? WHERE id = ? AND handed = 1 AND cancel = 0", (TO_PAUSE, job_id)
                )
                return self._kept(job_id)

        return self._even_when_full(change)

    def resume(self, job_id: str) -> bool:
        """Put a paused, failed or cancelled job at the end of the queue again; False where it is none of these."""
        with self._transaction() as connection:
            changed = connection.execute(
                "UPDATE job SET state = 'queued', cancel = 0, started = NULL, ended = NULL, error = NULL, "
                "artifacts = '[]', place = (SELECT max(place) + 1 FROM job) "
                "WHERE id = ? AND state IN ('paused', 'failed', 'cancelled')",
                (job_id,),
            )
            self._kept(job_id)
            return changed.rowcount == 1

    def delete(self, job_id: str, set_aside: Callable[[], Any] = lambda: None) -> bool:
        """Forget a job that has ended; False where it has not.

        Args:
            set_aside: called before it is forgotten for good; where that fails, it is not.
        """

        def change() -> bool:
            with self._transaction() as connection:
                sql = "DELETE FROM job WHERE id = ? AND state IN ('succeeded', 'failed', 'cancelled')"
                ended = connection.execute(sql, (job_id,)).rowcount == 1
                if ended:
                    set_aside()
                return ended

        return self._even_when_full(change)

    # Asked by the one that runs jobs.

    def claim(self, slot: int, state: str) -> Job | None:
        """Hand the next job in the queue to the backend; it is in `state` from now on."""
        with self._transaction() as connection:
            rows = connection.execute(
                "UPDATE job SET handed = 1, attempt = attempt + 1, slot = ?1, state = ?2, "
                "started = CASE ?2 WHEN 'running' THEN ?3 END "
                "WHERE number = (SELECT number FROM job WHERE state = 'queued' AND handed = 0 ORDER BY place LIMIT 1) "
                "RETURNING *",
                (slot, state, time.time()),
            ).fetchall()
            return self._kept(rows[0]["id"]) if rows else None

    def handed(self) -> list[Job]:
        """The jobs that the backend has, in the order of the queue."""
        return [_job(row) for row in self._rows("SELECT * FROM job WHERE handed = 1 ORDER BY place")]

    def begin(self, job: Job) -> None:
        """The backend has begun to work on a job that it was handed."""
        with self._transaction() as connection:
            sql = "UPDATE job SET state = 'running', started = ? WHERE id = ? AND state = 'queued' AND handed = 1"
            connection.execute(sql, (time.time(), job.id))
            self._kept(job.id)

    def finish(
        self, job: Job, state: str, error: dict[str, Any] | None, artifacts: Sequence[dict[str, Any]], size: int
    ) -> None:
        """Take a job back from the backend; `size` is the bytes of its folder.

        One that was stopped to be paused is paused.
        """
        columns = (
            state, time.time(), None if error is None else json.dumps(error), json.dumps(artifacts), size, job.id,
            job.attempt, state == CANCELLED, TO_PAUSE,
        )  # fmt: skip

        state_now = "CASE WHEN ?8 AND cancel = ?9 THEN 'paused' ELSE ?1 END"
        stopped = _with_stop(state_now, "?2", "json_extract(?3, '$.reason')")

        def change() -> None:
            with self._transaction() as connection:
                connection.execute(
                    f"UPDATE job SET state = {state_now}, "
                    f"stops = CASE ?1 WHEN 'succeeded' THEN stops ELSE {stopped} END, "
                    "ended = CASE WHEN ?8 AND cancel = ?9 THEN NULL ELSE ?2 END, "
                    "handed = 0, slot = NULL, cancel = 0, error = ?3, artifacts = ?4, bytes = ?5 "
                    "WHERE id = ?6 AND handed = 1 AND attempt = ?7",
                    columns,
                )
                self._kept(job.id)

        self._even_when_full(change)

    def ended(self) -> list[tuple[str, float, int]]:
        """(id, when, bytes) of every ended job, the oldest first."""
        sql = "SELECT id, ended, bytes FROM job WHERE state IN ('succeeded', 'failed', 'cancelled') ORDER BY ended"
        return [tuple(row) for row in self._rows(sql)]

    def unended(self) -> list[Job]:
        """The jobs that wait, run or are paused."""
        return [_job(row) for row in self._rows("SELECT * FROM job WHERE state IN ('queued', 'running', 'paused')")]

    def needing(self, path: str) -> list[Job]:
        """Those of `unended` that need a file or folder."""
        return [job for job in self.unended() if job.needs(path)]

    def ids(self) -> set[str]:
        return {row["id"] for row in self._rows("SELECT id FROM job")}

    def adopt(self, job: Job) -> bool:
        """Take in a job that the table does not know, as its folder has kept it; False where it cannot be.

        It keeps its number and its key unless another job has them.
        """
        row = asdict(job)
        for name in JSON_COLUMNS:
            row[name] = None if row[name] is None else json.dumps(row[name])
        with self._transaction() as connection:
            if self._rows("SELECT 1 FROM job WHERE id = ?", job.id):
                return False
            if self._rows("SELECT 1 FROM job WHERE number = ?", job.number) or job.number < 1:
                row["number"] = None
            if job.key is not None and self._rows("SELECT 1 FROM job WHERE key = ?", job.key):
                row["key"] = None
            names = ", ".join(row)
            connection.execute(f"INSERT INTO job ({names}) VALUES ({', '.join('?' * len(row))})", [*row.values()])
            return True


def asked_for(request: dict[str, Any]) -> Any:
    """What the client has sent."""
    fine_tuning = request.get(FINE_TUNING)
    return fine_tuning.get("asked", request) if isinstance(fine_tuning, dict) else request


def new_id() -> str:
    """A job's id: 16 hex digits that cannot be guessed."""
    return secrets.token_hex(8)


def open_store(data_dir: str | Path, keep: Callable[[Job], None] = lambda job: None) -> Store:
    """The store under `data_dir`, which only its owner may enter.

    A table that cannot be read is set aside, with a sentence, and an empty one takes its place.
    """
    os.makedirs(data_dir, mode=0o700, exist_ok=True)
    path = Path(data_dir) / "jobs.db"
    if reason := _damage(path):
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        log(f"{path} cannot be read ({reason}); it is set aside as {aside.name}, and made again from the jobs' folders")
        path.rename(aside)
        for ending in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                path.with_name(path.name + ending).rename(f"{aside}{ending}")
    store = Store(path, keep)
    store.keep_reserve()
    return store


def _damage(path: Path) -> str | None:
    """Why a file is no table of jobs; None for one that is, or that is not there."""
    if not path.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=WAIT)) as connection:
            (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if answer == "ok" and connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'job'").fetchone():
                known = [each.name for each in fields(Job) if each.name not in ADDED]
                connection.execute(f"SELECT {', '.join(known)} FROM job LIMIT 1")
            return None if answer == "ok" else answer
    except sqlite3.OperationalError as error:
        if "no such column" in str(error):
            return str(error)
        raise  # busy, or not to be opened: that is no damage
    except sqlite3.DatabaseError as error:
        return str(error)
