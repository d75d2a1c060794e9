"""A job's folder: what the server, its worker and (on Kubernetes) another machine tell one another.

job.json        from the server: its row of the table, so that a lost table can be made again
plan.json       from the server: the attempt and the commands
lock            held by the worker and the command it runs, for as long as one of them lives
worker.json     from the worker: its process id, and how many commands are finished
result.json     from the worker, at its end: state, error, artifacts
log.txt         what the commands print
artifacts/      the run folder of the training, with a folder in it for each export

What a job runs is not trusted: links that it puts here are not followed, neither as a file nor on the way to one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from common.cli import UserError
from common.evaluation import run_figures
from common.files import sha256_file, write_json

try:
    import fcntl
except ModuleNotFoundError:  # native Windows
    fcntl = None

ARTIFACTS, LOG, LOCK = "artifacts", "log.txt", "lock"
ROW, PLAN, RESULT, WORKER = "job.json", "plan.json", "result.json", "worker.json"
JOB_ID = re.compile(r"[0-9a-f]{16}")
DELETED = ".deleted"  # a folder of this ending is being deleted
CHECKPOINTS = "checkpoints"  # of the trainers, in the artifacts
LOG_LINES = 20  # of a failure that are kept with the job
LONGEST_LINE = 1000  # characters


def check_system() -> None:
    """Raises UserError where jobs cannot run."""
    if fcntl is None:
        raise UserError("jobs need locks and signals that native Windows does not have; run the job service in WSL")


def try_lock(handle: int) -> bool:
    """Lock an open file for this process and those that it starts; False where another holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class JobFolder:
    """`DATA_DIR/jobs/<id>`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.artifacts, self.log = self.path / ARTIFACTS, self.path / LOG

    def prepare(self, attempt: int, commands: Sequence[dict[str, Any]]) -> None:
        """Make the folder ready for an attempt. Raises OSError."""
        self.artifacts.mkdir(parents=True, exist_ok=True)
        write_json(self.path / PLAN, {"attempt": attempt, "commands": list(commands)})

    def read(self, name: str) -> dict[str, Any]:
        """One of the JSON files; empty where there is none that can be read."""
        try:
            with self.open(name) as handle:
                content = json.loads(handle.read())
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def read_record(self) -> dict[str, Any]:
        """The run.json of the training; empty where it has not begun."""
        return self.read(f"{ARTIFACTS}/run.json")

    @property
    def is_trained(self) -> bool:
        """Whether the training has ended well; what comes after it may not have."""
        return self.read_record().get("state") == "done"

    def evaluations(self) -> list[run_figures.Record]:
        """What evaluators kept in the artifacts, the newest first; one that cannot be read is left out."""
        folder, records = self.artifacts / run_figures.FOLDER, []
        for file in list(plain_files(folder))[: run_figures.MOST]:
            with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
                records.append(run_figures.check(self.read(str(file.relative_to(self.path)))))
        return run_figures.newest_first(records)

    def open(self, name: str, flags: int = os.O_RDONLY) -> IO[bytes]:
        """A file of this folder by its path in it, unbuffered. Raises OSError, also for a link or what is no file."""
        return os.fdopen(open_beneath(self.path, name, flags), "ab" if flags & os.O_APPEND else "rb", buffering=0)

    def open_log(self) -> IO[bytes]:
        """The log, to write more to it. Raises OSError."""
        return self.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, name: str, facts: dict[str, Any]) -> None:
        write_json(self.path / name, facts)

    def result(self, attempt: int) -> dict[str, Any] | None:
        """What the worker of this attempt left; None where it has not ended, or not by itself."""
        result = self.read(RESULT)
        return result if result.get("attempt") == attempt else None

    def take_lock(self) -> int | None:
        """A file descriptor that holds the lock until no process has it open; None where another holds it."""
        handle = open_beneath(self.path, LOCK, os.O_RDWR | os.O_CREAT)
        if try_lock(handle):
            return handle
        os.close(handle)
        return None

    def is_locked(self) -> bool:
        """Whether a worker, or a command that it started, is alive."""
        if not (self.path / LOCK).exists():
            return False
        try:
            handle = self.take_lock()
        except OSError:  # what a worker holds is a file
            return False
        if handle is not None:
            os.close(handle)
        return handle is None

    def log_tail(self, lines: int = LOG_LINES, start: int = 0) -> list[str]:
        """The last lines that were logged after byte `start`; of a progress bar, what it showed last."""
        with contextlib.suppress(OSError), self.open(LOG) as handle:
            handle.seek(max(start, os.fstat(handle.fileno()).st_size - lines * LONGEST_LINE))
            return log_lines(handle.read())[-lines:]
        return []

    def list_artifacts(self) -> list[dict[str, Any]]:
        """{"path", "bytes", "sha256"} of every file of the run folder, but for checkpoints and hidden files."""
        listed = []
        for file in plain_files(self.artifacts):
            path = file.relative_to(self.artifacts)
            if path.parts[0] != CHECKPOINTS and not any(part.startswith(".") for part in path.parts):
                facts = {"path": str(path), "bytes": file.stat().st_size, "sha256": sha256_file(file)}
                listed.append(facts)
        return listed

    def size(self) -> int:
        """Bytes of all files, but for the copy of the row, which says how many they are."""
        total = 0
        for file in plain_files(self.path):
            if file == self.path / ROW:
                continue
            with contextlib.suppress(FileNotFoundError):  # a checkpoint that goes at this moment
                total += file.lstat().st_size
        return total

    @property
    def is_marked(self) -> bool:
        """Whether it is a job's folder: named and filled as this service does."""
        return bool(JOB_ID.fullmatch(self.path.name)) and any((self.path / name).is_file() for name in (ROW, PLAN))

    def set_aside(self) -> Path:
        """Rename the folder, so that it counts as no job's any more; where it is now. Raises OSError."""
        return self.path.rename(self.path.with_name(self.path.name + DELETED))


def delete_set_aside(jobs_dir: Path) -> None:
    """Delete the folders that were set aside; all others are left alone, whatever they are."""
    for folder in jobs_dir.iterdir():
        if folder.name.endswith(DELETED) and JOB_ID.fullmatch(folder.name.removesuffix(DELETED)):
            shutil.rmtree(folder, ignore_errors=True)


def open_beneath(folder: Path, name: str, flags: int) -> int:
    """A file descriptor of a regular file by its path beneath a folder, on which there may be no link.

    Raises:
        OSError: there is none, a link is on the way, or it is no regular file.
    """
    *parents, file = Path(name).parts
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for parent in parents:
            below = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = below
        handle = os.open(file, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=at)
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", name)
    return handle


def log_lines(content: bytes) -> list[str]:
    """The lines of a log that are not blank, each as a terminal would show it in the end, and not endless."""
    lines = content.decode(errors="replace").split("\n")
    texts = (line.rstrip().rpartition("\r")[2] for line in lines)
    return [text[:LONGEST_LINE] for text in texts if text]


def plain_files(folder: Path) -> Iterator[Path]:
    """The regular files beneath a folder, in the order of their names; links are neither followed nor named.

    Nor is the folder itself where it is one.
    """
    if folder.is_symlink():
        return
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders.sort()
        for name in sorted(names):
            file = Path(parent) / name
            if file.is_file() and not file.is_symlink():
                yield file
