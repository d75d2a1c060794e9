"""Rows in Parquet, and rows and answers written as JSONL, CSV or Parquet: the form follows from a file's ending."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import UserError, reason
from common.files import atomic_write, jsonl_text

if TYPE_CHECKING:
    from pyarrow import Array, RecordBatch, Table

FORMATS = ("jsonl", "csv", "parquet")
PARQUET = b"PAR1"  # how such a file begins
NOT_ROWS = {  # how files begin that hold rows, too, but in a form that is not read
    b"PK\x03\x04": "an Excel workbook or another archive",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"ARROW1": "an Arrow file",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"SQLite format 3": "an SQLite database",
}
PROBABILITIES = "probabilities."  # how columns begin that are entries of one object
BLOCK = 1 << 24  # bytes of JSONL that are made columns at a time; no line may be longer


def form_of(path: str | Path) -> str:
    """ "csv" or "parquet" where the file's name ends so, else "jsonl"."""
    ending = Path(path).suffix.lower().removeprefix(".")
    return ending if ending in FORMATS else "jsonl"


def is_parquet(path: str | Path) -> bool:
    """Whether a file is Parquet, by its first bytes.

    Raises:
        UserError: it is named so and is not, or it holds rows in a form that nobody here reads.
    """
    try:
        with open(path, "rb") as handle:
            start = handle.read(16)
    except OSError:  # what is wrong with it is said where it is read as text
        return False
    if kind := next((kind for mark, kind in NOT_ROWS.items() if start.startswith(mark)), None):
        raise UserError(f"{path} is {kind}, which is not read; save its rows as CSV, JSONL or Parquet")
    parquet = start.startswith(PARQUET)
    if form_of(path) == "parquet" and not parquet:
        raise UserError(f"{path} is not Parquet; write it again, or rename it")
    return parquet


def parquet_columns(path: str | Path) -> list[str]:
    """The names of a Parquet file's columns.

    Raises:
        UserError: the file is damaged.
    """
    from pyarrow import parquet

    with _readable(path):
        return parquet.read_schema(path).names


def parquet_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, row) of a Parquet file, as JSON would have it; the ValueError of a row that it cannot have.

    Raises:
        UserError: the file is damaged.
    """
    from pyarrow import parquet

    number = 0
    with _readable(path):
        for batch in parquet.ParquetFile(path).iter_batches(4096):
            for row in _rows_of(batch):
                number += 1
                yield number, row


def _rows_of(batch: RecordBatch) -> Iterator[dict[str, Any] | ValueError]:
    """The rows of a batch as JSON would have them; one by one where there is one among them that it cannot have."""
    try:
        rows = [{name: _json_value(value) for name, value in row.items()} for row in batch.to_pylist()]
    except (ValueError, OverflowError) as error:  # no UTF-8, though the column says text, or a date of the year 30000
        if batch.num_rows > 1:
            rows = [row for start in range(batch.num_rows) for row in _rows_of(batch.slice(start, 1))]
        else:
            no_utf8 = isinstance(error, UnicodeDecodeError)
            rows = [ValueError(no_text(error) if no_utf8 else f"it holds what cannot be read ({error})")]
    yield from rows


def no_text(error: UnicodeDecodeError) -> str:
    """What is wrong with a row whose bytes are no text, in words."""
    return f"it holds bytes that are no UTF-8 text (byte {error.start})"


def parquet_bytes(path: str | Path, most: int) -> int:
    """Bytes of a Parquet file's values once they are read; beyond `most` the count may stop early.

    Texts are read by their dictionaries, so that a file of a few kilobytes in which one long text stands in a million
    rows takes no more memory here than it says it has.

    Raises:
        UserError: the file is damaged.
    """
    from pyarrow import parquet

    with _readable(path):
        facts = parquet.read_metadata(path)
        groups = [facts.row_group(number) for number in range(facts.num_row_groups)]
        size = sum(group.total_byte_size for group in groups)
        if size > most:
            return size
        leaves = [facts.schema.column(number) for number in range(facts.num_columns)]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        size = 0
        for batch in parquet.ParquetFile(path, read_dictionary=texts).iter_batches(4096):
            size += sum(map(_read_bytes, batch.columns))
            if size > most:
                break
    return size


def _read_bytes(array: Array) -> int:
    """Of an array's values, each at least one, with texts as often as they stand in it."""
    from pyarrow import compute, types

    if types.is_dictionary(array.type):
        if not (types.is_string(array.type.value_type) or types.is_binary(array.type.value_type)):
            return len(array) + array.nbytes
        lengths = compute.take(compute.binary_length(array.dictionary), array.indices)
        return len(array) + (compute.sum(lengths).as_py() or 0)
    if types.is_map(array.type):
        return len(array) + _read_bytes(array.keys) + _read_bytes(array.items)
    if types.is_struct(array.type):
        return len(array) + sum(map(_read_bytes, array.flatten()))
    if types.is_list(array.type) or types.is_large_list(array.type) or types.is_fixed_size_list(array.type):
        return len(array) + _read_bytes(array.flatten())
    return len(array) + array.nbytes


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is a damaged Parquet file ({reason(error)}); write it again") from error


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        return {str(name): _json_value(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    return value.decode() if isinstance(value, bytes) else str(value)  # dates, times, decimals: as they are written


def packed(rows: Sequence[dict], form: str) -> bytes:
    """The bytes of a file with these rows.

    Args:
        form: one of `FORMATS`.
    """
    if form == "jsonl":
        return jsonl_text(rows).encode()
    from pyarrow import Table

    flat = [dict(_columns(row)) for row in rows]
    names = dict.fromkeys(name for row in flat for name in row)  # of all rows: the first may lack some
    return _packed(Table.from_pydict({name: [row.get(name) for row in flat] for name in names}), form)


def _columns(row: dict) -> Iterator[tuple[str, Any]]:
    """The cells of a row: each entry of an object has one of its own, "probabilities.Good"."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{entry}", inner) for entry, inner in value.items())
        else:
            yield name, value


def folded(row: Any) -> Any:
    """A row of a table whose columns "probabilities.Good", "probabilities.Bad" are one object again, and, of CSV,
    numbers; what is empty in all of them is not there."""
    if not isinstance(row, dict):
        return row
    own = {name: value for name, value in row.items() if name.startswith(PROBABILITIES) and name != PROBABILITIES}
    if not own:
        return row
    others = {name: value for name, value in row.items() if name not in own}
    if all(value in (None, "") for value in own.values()):
        return others
    return others | {PROBABILITIES[:-1]: {name[len(PROBABILITIES) :]: _number(value) for name, value in own.items()}}


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):  # which is said where the row is read
        return value


def put_in_place(answers: Path, output: str, texts: Sequence[str]) -> None:
    """Make a JSONL file of answers the file `output`, in the form that its name says.

    In a table every entry of an object has a column of its own, "scores.Good".

    Args:
        answers: is gone afterwards.
        texts: keys whose values are texts, also where all of them look like dates.
    """
    form = form_of(output)
    if form == "jsonl":
        os.replace(answers, output)
        return
    import pyarrow
    from pyarrow import json, types

    schema = pyarrow.schema([(name, pyarrow.string()) for name in texts])
    table = json.read_json(answers, json.ReadOptions(block_size=BLOCK), json.ParseOptions(explicit_schema=schema))
    while any(types.is_struct(field.type) for field in table.schema):
        table = table.flatten()
    with atomic_write(output, "wb") as handle:
        handle.write(_packed(table, form))
    answers.unlink()


def _packed(table: Table, form: str) -> bytes:
    from pyarrow import csv, parquet

    target = io.BytesIO()
    (csv.write_csv if form == "csv" else parquet.write_table)(table, target)
    return target.getvalue()
