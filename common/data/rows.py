"""Rows of a JSON list, JSONL, CSV or Parquet file, with every bad one named by file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from common.cli import UserError, log
from common.data import tables
from common.files import open_text, parse_json, read_json

LONGEST = 64 << 20  # characters of what is read whole: a cell, in a file that was sent a line
csv.field_size_limit(LONGEST)

SFT_KEYS = ("input", "output")
KD_KEYS = ("input", "teacher_output")
DPO_KEYS = ("prompt", "chosen", "rejected")
ANSWER_KEYS = ("output", "teacher_output", "chosen")  # what a student learns to write


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
    """(what the numbers count, numbered rows, a table's columns or None) of a JSON list, JSONL, CSV or Parquet file."""
    unit, numbered, header = iter_rows(path)
    rows = list(numbered)
    if header is not None and not rows:
        raise UserError(f"{path} has a header but no rows; give a file with rows")
    return unit, rows, header


def iter_rows(path: str | Path) -> tuple[str, Iterator[tuple[int, Any]], list[str] | None]:
    """The same one after the other; but for a JSON list, in memory that does not grow with the file."""
    if tables.is_parquet(path):
        rows = ((number, tables.folded(row)) for number, row in tables.parquet_rows(path))
        return "row", rows, tables.parquet_columns(path)
    with open_text(path) as handle:
        start = handle.read(4096).lstrip()
    if not start:
        raise UserError(f"{path} is empty; give a file with rows, as a JSON list, JSONL, CSV or Parquet")
    suffixes = Path(path).suffixes
    if start[0] == "[" or (".json" in suffixes and start[0] != "{"):
        rows = read_json(path)
        if not isinstance(rows, list):
            raise UserError(f"{path} must hold a JSON list of rows, or one JSON object a line")
        return "row", enumerate(rows, start=1), None
    if start[0] == "{" or ".jsonl" in suffixes:
        return "line", iter_jsonl(path), None
    numbered = _csv_rows(path)
    _, header = next(numbered)
    return "line", ((number, tables.folded(row)) for number, row in numbered), header


def _csv_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """`csv_rows` of a file, with the errors of a user's file."""
    with open_text(path, newline="") as handle:
        try:
            for number, row in csv_rows(handle):
                if isinstance(row, list):
                    check_columns(path, row)
                yield number, row
        except csv.Error as error:
            raise UserError(f"{path}, {error}; mend the file") from error


def csv_rows(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """(line number, row) of CSV; the first is the list of its columns' names, and empty lines are passed over.

    Cells are separated by what the header has most of: commas, semicolons (as Excel writes in much of Europe) or tabs.

    Raises:
        csv.Error: it is not CSV, by line.
    """
    lines = iter(lines)
    first = next(lines, "")
    reader = csv.reader(chain([first], lines), delimiter=max(",;\t", key=first.count), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        yield reader.line_num, header
        for cells in reader:
            if len(cells) == len(header):
                yield reader.line_num, dict(zip(header, cells, strict=True))
            elif cells:
                yield reader.line_num, ValueError(f"{len(cells)} cells where the header has {len(header)}")
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: not CSV ({error})") from error


def check_columns(path: str | Path, header: Sequence[str]) -> None:
    """Refuse a table with two columns of one name."""
    if repeated := [name for name in dict.fromkeys(header) if name and list(header).count(name) > 1]:
        raise UserError(f"{path}, line 1: the column '{repeated[0][:60]}' is given twice; rename one of them")


def row_fault(row: Any, keys: Sequence[str]) -> str | None:
    """Why `row` is not an object with a non-empty text under each of `keys`; None when it is."""
    if isinstance(row, ValueError):
        return str(row)
    if not isinstance(row, dict):
        return f"a JSON object is needed, not {type(row).__name__}"
    for key in keys:
        if key not in row:
            return f"key '{key}' is missing"
        if fault := text_fault(row[key], key):
            return fault
    return None


def text_fault(value: Any, key: str) -> str | None:
    """Why a value is no text that can be learnt from; None when it is."""
    if not isinstance(value, str) or not value.strip():
        return f"'{key}' must be a non-empty string"
    if not _encodable(value):
        return f"'{key}' holds half a character (a lone \\ud800-\\udfff escape)"
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class CheckedRows(NamedTuple):
    """The good rows of a file.

    Attributes:
        numbers: of its lines, rows or files, one a row.
    """

    numbers: list[Any]
    rows: list[dict]


def check_rows(
    path: str | Path,
    numbered: Iterable[tuple[int, Any]],
    keys: Sequence[str],
    skip_bad_rows: bool = False,
    unit: str = "line",
    fault_of: Callable[[dict], str | None] = lambda row: None,
) -> CheckedRows:
    """The good ones of `numbered` (number, row). A bad one stops, or is counted and said, never dropped in silence.

    Args:
        unit: what the numbers count: "line", "row" in a JSON list, "file" of a folder's documents.
        fault_of: a further check of a row that has the keys: why it is bad, or None.

    Raises:
        UserError: the first bad row, by file and line (unless `skip_bad_rows`), no good row, or no row at all.
    """
    numbers, rows, bad = [], [], 0
    for number, row in numbered:
        fault = row_fault(row, keys) or fault_of(row)
        if fault is None:
            numbers.append(number)
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
    if not rows and not bad:
        if unit == "file":
            raise UserError(f"{path} has no document; give a folder with some")
        needed = f", each with the keys {', '.join(keys)}" if keys else ""
        raise UserError(f"{path} has no rows; give a file with rows{needed}")
    if not rows:
        needed = f"each needs the keys {', '.join(keys)}" if keys else "every one of them is bad, so mend the file"
        raise UserError(f"{path} has no usable rows; {needed}")
    return CheckedRows(numbers, rows)


def read_rows(
    path: str | Path,
    keys: Sequence[str],
    skip_bad_rows: bool = False,
    fault_of: Callable[[dict], str | None] = lambda row: None,
) -> list[dict]:
    """All rows of a file that have a non-empty text under each of `keys` (see `numbered_rows`, `check_rows`)."""
    unit, numbered, _ = numbered_rows(path)
    return check_rows(path, numbered, keys, skip_bad_rows, unit, fault_of).rows


def check_output(output: str | None, source: str | None, forms: Sequence[str] = ("jsonl",)) -> None:
    """Refuse an --output that is the --input itself, or that is named as a table where none is written.

    Args:
        forms: that are written (`tables.FORMATS`).
    """
    if output and source and Path(output).resolve() == Path(source).resolve():
        raise UserError(f"--output {output} would replace --input; choose another name")
    if output and (form := tables.form_of(output)) not in forms:
        raise UserError(f"--output {output}: answers are written as JSONL here, not as {form}; name it .jsonl")


def check_outdir(outdir: Path, src: str | None, files: Sequence[str]) -> None:
    """Refuse an --outdir that cannot be a folder, or whose `files` would replace the source."""
    nearest = next((folder for folder in (outdir, *outdir.parents) if folder.exists()), outdir)
    if nearest.exists() and not nearest.is_dir():
        raise UserError(f"--outdir {outdir}: {nearest} is a file; choose a folder")
    if src and Path(src).resolve() in [(outdir / file).resolve() for file in files]:
        raise UserError(f"--src {src} would be overwritten by its own output; choose another --outdir")
