"""Rows on disk: JSONL in, JSONL out, every bad row named by file and line, no half-written file."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from common.cli import UserError, log

SFT_KEYS = ("input", "output")
KD_KEYS = ("input", "teacher_output")
DPO_KEYS = ("prompt", "chosen", "rejected")
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
        os.chmod(handle.name, 0o644)  # NamedTemporaryFile makes 0600
        os.replace(handle.name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(handle.name)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as handle:
        handle.write(json_text(value))


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


def json_text(value: Any) -> str:
    """`value` as the text of an indented JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_together(folder: str | Path, texts: dict[str, str]) -> None:
    """Write every text under its file name in `folder`; until all of them are on the disk, none is put in place.

    They are put in place in the order given, so a file that vouches for the others (a manifest) goes last.
    """
    with contextlib.ExitStack() as stack:  # closes in the reverse order
        for name, text in reversed(texts.items()):
            handle = stack.enter_context(atomic_write(Path(folder) / name))
            handle.write(text)
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)[:60]}' is given twice")
    return value


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"it has a number of {len(text):,} digits")
    return int(text)


def iter_jsonl(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, parsed object or the ValueError that parsing raised); blank lines are passed over."""
    with open_text(path) as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                try:
                    yield number, parse_json(line)
                except json.JSONDecodeError as error:
                    yield number, ValueError(f"not JSON ({error.msg})")
                except ValueError as error:
                    yield number, error


def numbered_rows(path: str | Path) -> tuple[str, list[tuple[int, Any]], list[str] | None]:
    """(what the numbers count, numbered rows, CSV header or None) of a JSON list, JSONL or CSV."""
    with open_text(path) as handle:
        start = handle.read(4096).lstrip()
    if not start:
        raise UserError(f"{path} is empty; give a file with rows, as a JSON list, JSONL or CSV")
    suffixes = Path(path).suffixes
    if start[0] == "[" or (".json" in suffixes and start[0] != "{"):
        rows = read_json(path)
        if not isinstance(rows, list):
            raise UserError(f"{path} must hold a JSON list of rows, or one JSON object a line")
        return "row", list(enumerate(rows, start=1)), None
    if start[0] == "{" or ".jsonl" in suffixes:
        return "line", list(iter_jsonl(path)), None
    return _csv_rows(path)


def _csv_rows(path: str | Path) -> tuple[str, list[tuple[int, Any]], list[str]]:
    numbered: list[tuple[int, Any]] = []
    with open_text(path, newline="") as handle:
        reader = csv.reader(handle, strict=True)
        try:
            header = [name.strip() for name in next(reader)]
            if repeated := [name for name in dict.fromkeys(header) if name and header.count(name) > 1]:
                raise UserError(f"{path}, line 1: the column '{repeated[0][:60]}' is given twice; rename one of them")
            for cells in reader:
                if len(cells) == len(header):
                    numbered.append((reader.line_num, dict(zip(header, cells, strict=True))))
                elif cells:
                    fault = ValueError(f"{len(cells)} cells where the header has {len(header)}")
                    numbered.append((reader.line_num, fault))
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not CSV ({error}); mend the file") from error
    if not numbered:
        raise UserError(f"{path} has a header but no rows; give a file with rows")
    return "line", numbered, header


def row_fault(row: Any, keys: Sequence[str]) -> str | None:
    """Why `row` is not an object with a non-empty text under each of `keys`; None when it is."""
    if isinstance(row, ValueError):
        return str(row)
    if not isinstance(row, dict):
        return f"a JSON object is needed, not {type(row).__name__}"
    for key in keys:
        if key not in row:
            return f"key '{key}' is missing"
        if not isinstance(row[key], str) or not row[key].strip():
            return f"'{key}' must be a non-empty string"
        if not _encodable(row[key]):
            return f"'{key}' holds half a character (a lone \\ud800-\\udfff escape)"
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_rows(
    path: str | Path,
    numbered: Iterable[tuple[int, Any]],
    keys: Sequence[str],
    skip_bad_rows: bool = False,
    unit: str = "line",
    fault_of: Callable[[dict], str | None] = lambda row: None,
) -> list[dict]:
    """The good rows of `numbered` (number, row). A bad one stops, or is counted and said, never dropped in silence.

    Args:
        unit: what the numbers count: "line", or "row" in a JSON list.
        fault_of: a further check of a row that has the keys: why it is bad, or None.

    Raises:
        UserError: the first bad row, by file and line (unless `skip_bad_rows`), or no good row at all.
    """
    rows, bad = [], 0
    for number, row in numbered:
        fault = row_fault(row, keys) or fault_of(row)
        if fault is None:
            rows.append(row)
        elif skip_bad_rows:
            bad += 1
            log(f"{path}, {unit} {number}: {fault}; skipped")
        else:
            raise UserError(
                f"{path}, {unit} {number}: {fault}; mend the row, or pass --skip_bad_rows to go on without it"
            )
    if bad:
        log(f"{path}: {bad} bad rows skipped, {len(rows)} kept")
    if not rows:
        needed = f"each needs the keys {', '.join(keys)}" if keys else "every one of them is bad, so mend the file"
        raise UserError(f"{path} has no usable rows; {needed}")
    return rows


def read_rows(path: str | Path, keys: Sequence[str], skip_bad_rows: bool = False) -> list[dict]:
    """All rows of a JSONL file that have a non-empty text under each of `keys` (see `check_rows`)."""
    return check_rows(path, iter_jsonl(path), keys, skip_bad_rows)


def check_output(output: str | None, source: str | None) -> None:
    """Refuse an --output that is the --input itself."""
    if output and source and Path(output).resolve() == Path(source).resolve():
        raise UserError(f"--output {output} would replace --input; choose another name")


def sha256_text(text: str) -> str:
    """Hex SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_outdir(outdir: Path, src: str | None, files: Sequence[str]) -> None:
    """Refuse an --outdir that cannot be a folder, or whose `files` would replace the source."""
    nearest = next((folder for folder in (outdir, *outdir.parents) if folder.exists()), outdir)
    if nearest.exists() and not nearest.is_dir():
        raise UserError(f"--outdir {outdir}: {nearest} is a file; choose a folder")
    if src and Path(src).resolve() in [(outdir / file).resolve() for file in files]:
        raise UserError(f"--src {src} would be overwritten by its own output; choose another --outdir")
