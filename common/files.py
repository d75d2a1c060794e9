"""Files, whole or not at all: written beside their place and renamed into it, read as UTF-8, named by their SHA-256."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from common.cli import UserError

MAX_DIGITS = 4000  # of a whole number; Python reads few more


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside `path` and rename it over `path` only when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    handle = tempfile.NamedTemporaryFile(  # noqa: SIM115 (closed in the `with` below, renamed after it)
        mode, dir=path.parent, prefix=f".{path.name}.", encoding=encoding, delete=False
    )
    try:
        with handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(handle.name, new_file_mode())  # NamedTemporaryFile makes 0600
        os.replace(handle.name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(handle.name)
        raise


def new_file_mode() -> int:
    """The permissions of a new file, as the umask says."""
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o666 & ~umask


def grant(*paths: str | Path) -> None:
    """Give files, or those in folders, the permissions of new files: safetensors writes for the owner alone."""
    mode = new_file_mode()
    for path in map(Path, paths):
        for file in path.iterdir() if path.is_dir() else [path]:
            if file.is_file() and not file.is_symlink():
                file.chmod(mode)


def lies_in(path: str | Path, folder: str | Path) -> bool:
    """Whether a path that is there is a folder or lies in it, whatever links lead to either."""
    place = Path(path).resolve()
    return place.exists() and place.is_relative_to(Path(folder).resolve())


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json_text(value))


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> int:
    """Write one JSON object a line, atomically; returns the number of rows."""
    count = 0
    with atomic_write(path) as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def jsonl_text(rows: Iterable[dict]) -> str:
    """Rows as the text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_text(path: str | Path, text: str) -> None:
    """Write a text, atomically."""
    with atomic_write(path) as handle:
        handle.write(text)


def json_text(value: Any) -> str:
    """`value` as the text of an indented JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_together(folder: str | Path, files: Mapping[str, str | bytes]) -> None:
    """Write all files, by name, in `folder`; until all of them are on the disk, none is put in place.

    They are put in place in the order given, so a file that vouches for the others (a manifest) goes last.
    """
    with contextlib.ExitStack() as stack:  # closes in the reverse order
        for name, content in reversed(files.items()):
            handle = stack.enter_context(atomic_write(Path(folder) / name, "wb" if isinstance(content, bytes) else "w"))
            handle.write(content)
            handle.flush()


@contextlib.contextmanager
def open_text(path: str | Path, newline: str | None = None) -> Iterator[IO[str]]:
    """Open a UTF-8 text file for reading: a byte-order mark is dropped, a gzip file (known by its bytes) unpacked.

    Raises:
        UserError: missing, unreadable, a folder, not UTF-8, or a damaged gzip file; also while it is being read.
    """
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig", newline=newline) as handle:
            yield handle
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}); copy or download it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error


def read_text(path: str | Path) -> str:
    """The whole of a text file (see `open_text`)."""
    with open_text(path) as handle:
        return handle.read()


def read_json(path: str | Path) -> Any:
    """A JSON file. Raises UserError with the line where the JSON breaks."""
    try:
        return parse_json(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}); mend the file") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; mend the file") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: it is not JSON.
        ValueError: what Python would read otherwise than it is written, or not at all: a name that an object has
            twice, a number of thousands of digits, nesting beyond all bounds.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def repeated_name(pairs: Sequence[tuple[str, Any]]) -> str | None:
    """The first name that a JSON object gives twice; None where it gives none."""
    names = [name for name, _ in pairs]
    return None if len(set(names)) == len(names) else next(name for name in names if names.count(name) > 1)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (name := repeated_name(pairs)) is not None:
        raise ValueError(f"the key '{name[:60]}' is given twice")
    return dict(pairs)


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"it has a number of {len(text):,} digits")
    return int(text)


def sha256_text(text: str | bytes) -> str:
    """Hex SHA-256 of a text, in UTF-8 where it is not bytes yet."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
