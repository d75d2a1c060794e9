"""Files that people send: streamed to the disk, checked row by row, kept under an id with their SHA-256.

DATA_DIR/files/file-<id>/ holds `content` (with the ending that its kind has) and `file.json`. A file is received in a
folder of another name, which is renamed once it is whole, so a kill leaves no half of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from common.cli import UserError
from common.data import rows as records
from common.data import tables, training_files
from common.data.shapes import DISTILL, PROMPT, TAKES, shape_of
from common.files import open_text, write_json
from common.web.app import Problem

FOLDER, RECORD, CONTENT = "files", "file.json", "content"
INCOMING, GONE = ".incoming-", ".deleted-"
STALE = 86_400.0  # seconds after which a folder that was being received belongs to nobody
FILE_ID = re.compile(r"file-[0-9a-f]{16}")
TEXT = ".txt"  # running text, one row
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", TEXT)
ROWS = {".jsonl": re.compile(r'\s*\{\s*"'), ".json": re.compile(r"\s*\[\s*\{")}  # how rows begin, and no text does
MOST_AT_ONCE = records.LONGEST  # characters of a list, or of a line
LOOKED_AT = 100  # rows, by what most of which are the others are judged
FINE_TUNE, RESULTS = "fine-tune", "fine-tune-results"


@dataclass(frozen=True)
class StoredFile:
    """What is known of a file.

    Attributes:
        name: of the content in the file's folder.
        rows: that it has; None of one that has none, as running text.
        trainer: script that takes its rows; None of one that has none.
        warning: what its rows have that is not read, in a sentence.
        created, expires: seconds since 1970; None: it is kept until it is deleted.
    """

    id: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    created: float
    name: str
    rows: int | None = None
    trainer: str | None = None
    warning: str | None = None
    expires: float | None = None


def file_id(of: str) -> str:
    """The id of a file that belongs to a job (16 hex digits)."""
    return f"file-{of}"


class FileStore:
    """The files under `DATA_DIR/files`; every method blocks.

    Args:
        max_bytes: of one file.
        quota: bytes of all files together.
    """

    def __init__(self, data_dir: Path, max_bytes: int, quota: int) -> None:
        self.root, self.max_bytes, self.quota = data_dir / FOLDER, max_bytes, quota
        self._lock = threading.Lock()
        self._known: dict[str, StoredFile] = {}  # a file never changes
        self._arriving: dict[Incoming, int] = {}

    def clean(self) -> None:
        """Make the folder, and delete what an earlier server was receiving when it was killed."""
        self.root.mkdir(parents=True, exist_ok=True)
        for folder in self.root.iterdir():
            stale = folder.name.startswith(INCOMING) and time.time() - folder.stat().st_mtime > STALE
            if stale or folder.name.startswith(GONE):
                shutil.rmtree(folder, ignore_errors=True)

    def files(self) -> list[StoredFile]:
        """All files, the oldest first."""
        stored = [file for name in self._ids() if (file := self.find(name))]
        return sorted(stored, key=lambda file: (file.created, file.id))

    def find(self, name: str) -> StoredFile | None:
        """A file by its id; None where there is none, or its time has passed."""
        file = self._read(name)
        return None if file is None or has_expired(file) else file

    def expired(self) -> list[StoredFile]:
        """The files whose time has passed, which are still on the disk."""
        return [file for name in self._ids() if (file := self._read(name)) and has_expired(file)]

    def _ids(self) -> list[str]:
        try:
            return [name for name in os.listdir(self.root) if FILE_ID.fullmatch(name)]
        except FileNotFoundError:
            return []

    def _read(self, name: str) -> StoredFile | None:
        if not FILE_ID.fullmatch(name) or not (self.root / name).is_dir():
            self._known.pop(name, None)
            return None
        if name not in self._known:
            try:
                self._known[name] = StoredFile(**json.loads((self.root / name / RECORD).read_text()))
            except (OSError, ValueError, TypeError):
                return None
        return self._known[name]

    def path(self, file: StoredFile) -> Path:
        return self.root / file.id / file.name

    def delete(self, name: str) -> None:
        """Forget a file at once, and delete it."""
        aside = self.root / f"{GONE}{secrets.token_hex(4)}"
        try:
            (self.root / name).rename(aside)
        except FileNotFoundError:
            return
        self._known.pop(name, None)
        shutil.rmtree(aside, ignore_errors=True)

    def receive(self) -> Incoming:
        """A file that begins to arrive. Raises Problem 503 on a full disk."""
        with full_disk():
            return Incoming(self)

    def make_room(self, incoming: Incoming, size: int) -> None:
        """That so many bytes of a file may arrive. Raises Problem 413."""
        if size > self.max_bytes:
            raise Problem(413, f"file: it has more than {self.max_bytes:,} bytes; send it in several files", "file")
        with self._lock:
            if incoming not in self._arriving:
                self._arriving[incoming] = 0
            before = self._arriving[incoming]
            if size <= before:
                return
            step = min(max(size, before + (16 << 20)), self.max_bytes)  # ahead, so that the files are seldom counted
            used = sum(file.bytes for file in self.files()) + sum(self._arriving.values()) - before
            if used + size > self.quota:
                message = f"file: the files here have {used:,} of {self.quota:,} bytes; delete some of them"
                raise Problem(413, message, "file")
            self._arriving[incoming] = min(step, self.quota - used)

    def forget(self, incoming: Incoming) -> None:
        with self._lock:
            self._arriving.pop(incoming, None)


class Incoming:
    """A file that arrives: `write` its bytes, then `keep` it; `close` in any case."""

    def __init__(self, store: FileStore) -> None:
        self.store = store
        self.folder = store.root / f"{INCOMING}{secrets.token_hex(8)}"
        self.folder.mkdir(parents=True)
        self.path = self.folder / CONTENT
        self.size, self._hash = 0, hashlib.sha256()
        self._handle: IO[bytes] = open(self.path, "wb")  # noqa: SIM115 (closed in `close`)

    def write(self, data: bytes) -> None:
        """Raises Problem 413 beyond the limits, 503 on a full disk."""
        self.store.make_room(self, self.size + len(data))
        with full_disk():
            self._handle.write(data)
        self._hash.update(data)
        self.size += len(data)

    def keep(self, filename: str, purpose: str, expires: float | None = None, own_id: str | None = None) -> StoredFile:
        """Check the file and give it its id.

        Raises:
            Problem: 422 that names the line, 503 on a full disk.
        """
        with full_disk():
            return self._keep(filename, purpose, expires, own_id)

    def _keep(self, filename: str, purpose: str, expires: float | None, own_id: str | None) -> StoredFile:
        self._handle.flush()
        os.fsync(self._handle.fileno())
        shown = shown_name(filename)
        with refused_as(self.path, shown):
            name = CONTENT + suffix_of(self.path, shown)
        self.path = self.path.rename(self.folder / name)
        facts = checked_rows(self.path, shown, self.store.max_bytes) if purpose == FINE_TUNE else {}
        file = StoredFile(
            id=own_id or f"file-{secrets.token_hex(8)}",
            filename=shown,
            purpose=purpose,
            bytes=self.size,
            sha256=self._hash.hexdigest(),
            created=time.time(),
            name=name,
            expires=expires,
            **facts,
        )
        write_json(self.folder / RECORD, asdict(file))
        try:
            self.folder.rename(self.store.root / file.id)
        except OSError:
            if own_id is None or self.store.find(own_id) is None:
                raise  # else: a job that was killed in this moment has left it before
        return file

    def close(self) -> None:
        self._handle.close()
        self.store.forget(self)
        shutil.rmtree(self.folder, ignore_errors=True)


def has_expired(file: StoredFile) -> bool:
    """Whether a file's time has passed."""
    return file.expires is not None and time.time() > file.expires


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Turn an OSError into a Problem 503."""
    try:
        yield
    except OSError as error:
        raise Problem(503, f"the file cannot be kept ({error.strerror}); try again", retry_after=60) from error


def shown_name(filename: str) -> str:
    """A client's name for a file as it may be shown: the last part of a path, printable and not endless."""
    last = re.split(r"[/\\]", filename)[-1]
    return "".join(char for char in last if char.isprintable())[-200:] or "rows.jsonl"


@contextlib.contextmanager
def refused_as(path: Path, filename: str) -> Iterator[None]:
    """Turn what is wrong with a file into a Problem 422 that has its client's name for it."""
    try:
        yield
    except UserError as error:
        raise Problem(422, f"file: {str(error).replace(str(path), filename)}", "file") from error


def suffix_of(path: Path, filename: str) -> str:
    """The ending by which trainers know what a file is: of one that is called .txt and holds rows, theirs.

    Raises:
        UserError: it cannot be read.
    """
    suffix = Path(filename.removesuffix(".gz")).suffix.lower()
    if suffix != TEXT:
        return suffix if suffix in SUFFIXES else ".jsonl"
    if tables.is_parquet(path):
        return ".parquet"
    with open_text(path) as handle:
        start = handle.read(4096)
    return next((suffix for suffix, beginning in ROWS.items() if beginning.match(start)), TEXT)


def checked_rows(path: Path, filename: str, max_bytes: int) -> dict[str, Any]:
    """{"rows", "trainer", "warning"} of a training file (see `StoredFile`), each row of which is looked at.

    Args:
        max_bytes: of the file as it is read, unpacked.

    Raises:
        Problem: 422 that names the lines of bad rows, or what the file is where no trainer takes it; 413.
    """
    with refused_as(path, filename):
        check_unpacked(path, max_bytes)
        if path.suffix == TEXT:
            check_text(path)
            return {"rows": None, "trainer": DISTILL, "warning": None}
        trainer = trainer_of(row for _, row in islice(records.iter_rows(path)[1], LOOKED_AT))
        inspection = training_files.inspect(path, trainer)
    if inspection.faults:
        number, fault = inspection.faults[0]
        more = ", ".join(str(other) for other, _ in inspection.faults[1:])
        others = f"; {inspection.bad - 1:,} others are bad, too: {more}" if more else ""
        raise Problem(422, f"file: {filename}, {inspection.unit} {number}: {fault}{others}", "file")
    return {"rows": inspection.good, "trainer": trainer, "warning": inspection.warning}


def check_text(path: Path) -> None:
    """Raises UserError where there is none."""
    with open_text(path) as handle:
        if not any(line.strip() for line in handle):
            raise UserError(f"{path} is empty; give a text file with text in it")


def check_unpacked(path: Path, max_bytes: int) -> None:
    """Bound what is read of a file that may be packed, and more so of what is read whole: a list, or a line.

    Raises:
        Problem: 413.
        UserError: it cannot be read.
    """
    is_list, line, longest = False, 0, 0  # characters of the line that is being read, and of the longest one
    if tables.is_parquet(path):
        size, most = tables.parquet_bytes(path, max_bytes), max_bytes
    else:
        with open_text(path) as handle:
            piece = handle.read(4096)
            size, is_list = len(piece), path.suffix != TEXT and piece.lstrip().startswith("[")
            most = min(MOST_AT_ONCE, max_bytes) if is_list else max_bytes
            while piece and size <= most:
                first, *others = piece.split("\n")
                longest = max(longest, line + len(first), max(map(len, others), default=0))
                line = len(others[-1]) if others else line + len(first)
                piece = handle.read(1 << 20)
                size += len(piece)
    if size > most and is_list:
        limit = f"a JSON list has at most {most:,} bytes, as it is read whole; send one object a line"
        raise Problem(413, f"file: {limit}", "file")
    if size > most:
        raise Problem(413, f"file: unpacked it has more than {most:,} bytes; send it in several files", "file")
    if longest > MOST_AT_ONCE:
        limit = f"a line has at most {MOST_AT_ONCE:,} characters, as it is read whole; send one row a line"
        raise Problem(413, f"file: {limit}", "file")


def trainer_of(rows: Iterable[Any]) -> str:
    """The trainer that takes most of some rows, the first of several."""
    kinds = Counter(shape.kind for row in rows if (shape := shape_of(row)))
    if len(kinds) > 1:
        del kinds[PROMPT]  # among others that is a row without its answer
    return max(TAKES, key=lambda trainer: sum(kinds[kind] for kind in TAKES[trainer]))


def as_object(file: StoredFile) -> dict[str, Any]:
    """A file as OpenAI shows it, with its SHA-256 and the number of its rows."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created),
        "expires_at": None if file.expires is None else int(file.expires),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": file.warning,
        "sha256": file.sha256,
        "rows": file.rows,
    }
