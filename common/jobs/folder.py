"""A job's folder: what the server, its worker and (on Kubernetes) another machine tell one another.

plan.json       from the server: the attempt and the commands
lock            held by the worker and the command it runs, for as long as one of them lives
worker.json     from the worker: its process id, and how many commands are finished
result.json     from the worker, at its end: state, error, artifacts
log.txt         what the commands print
artifacts/      the run folder of the training, with a folder in it for each export
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.data import rows as records

ARTIFACTS, LOG, LOCK = "artifacts", "log.txt", "lock"
PLAN, RESULT, WORKER = "plan.json", "result.json", "worker.json"
CHECKPOINTS = "checkpoints"  # of the trainers, in the artifacts
LOG_LINES = 20  # of a failure that are kept with the job
LONGEST_LINE = 1000  # characters


class JobFolder:
    """`DATA_DIR/jobs/<id>`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.artifacts, self.log = self.path / ARTIFACTS, self.path / LOG

    def prepare(self, attempt: int, commands: Sequence[dict[str, Any]]) -> None:
        """Make the folder ready for an attempt. Raises OSError."""
        self.artifacts.mkdir(parents=True, exist_ok=True)
        records.write_json(self.path / PLAN, {"attempt": attempt, "commands": list(commands)})

    def read(self, name: str) -> dict[str, Any]:
        """One of the JSON files; empty where there is none."""
        try:
            return json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return {}

    def read_record(self) -> dict[str, Any]:
        """The run.json of the training; empty where it has not begun."""
        return self.read(f"{ARTIFACTS}/run.json")

    def write(self, name: str, facts: dict[str, Any]) -> None:
        records.write_json(self.path / name, facts)

    def result(self, attempt: int) -> dict[str, Any] | None:
        """What the worker of this attempt left; None where it has not ended, or not by itself."""
        result = self.read(RESULT)
        return result if result.get("attempt") == attempt else None

    def take_lock(self) -> int | None:
        """A file descriptor that holds the lock until no process has it open; None where another holds it."""
        handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return handle

    def is_locked(self) -> bool:
        """Whether a worker, or a command that it started, is alive."""
        if not (self.path / LOCK).exists():
            return False
        handle = self.take_lock()
        if handle is not None:
            os.close(handle)
        return handle is None

    def log_tail(self, lines: int = LOG_LINES, start: int = 0) -> list[str]:
        """The last lines that were logged after byte `start`; of a progress bar, what it showed last."""
        with contextlib.suppress(FileNotFoundError), open(self.log, "rb") as handle:
            handle.seek(max(start, os.fstat(handle.fileno()).st_size - lines * LONGEST_LINE))
            return log_lines(handle.read())[-lines:]
        return []

    def list_artifacts(self) -> list[dict[str, Any]]:
        """{"path", "bytes", "sha256"} of every file of the run folder, but for checkpoints and hidden files."""
        listed = []
        for file in plain_files(self.artifacts):
            path = file.relative_to(self.artifacts)
            if path.parts[0] != CHECKPOINTS and not any(part.startswith(".") for part in path.parts):
                facts = {"path": str(path), "bytes": file.stat().st_size, "sha256": records.sha256_file(file)}
                listed.append(facts)
        return listed

    def size(self) -> int:
        """Bytes of all files."""
        total = 0
        for file in plain_files(self.path):
            with contextlib.suppress(FileNotFoundError):  # a checkpoint that goes at this moment
                total += file.lstat().st_size
        return total

    def delete(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def log_lines(content: bytes) -> list[str]:
    """The lines of a log that are not blank, each as a terminal would show it in the end, and not endless."""
    lines = content.decode(errors="replace").split("\n")
    texts = (line.rstrip().rpartition("\r")[2] for line in lines)
    return [text[:LONGEST_LINE] for text in texts if text]


def plain_files(folder: Path) -> Iterator[Path]:
    """The regular files beneath a folder, in the order of their names; links are neither followed nor named."""
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders.sort()
        for name in sorted(names):
            file = Path(parent) / name
            if file.is_file() and not file.is_symlink():
                yield file
