"""Training rows of a file of any shape: recognised, checked line by line, or refused by the name of what takes them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.cli import UserError, log
from common.data import rows as records
from common.data import shapes, squad
from common.data.shapes import DISTILL, PROMPT, SFT, SHAPES, TAKER, TAKES, TEXT, Row, Shape, shape_of

KEPT = {"group", "id"}
OWN = {*KEPT, "teacher", "reason", "uncovered_mass"}  # in rows that the toolkit itself writes
EMPTY = (None, "", [], {})
SHOWN = 20  # faults, or keys, in a report


@dataclass
class Inspection:
    """What a file holds for a trainer.

    Attributes:
        shape: of its first row that has one.
        unit: what numbers count: "line", or "row" in a list or a table.
        good, bad: rows.
        faults: (number, why) of the first bad rows.
        unread: how many rows have each key that is not read.
    """

    shape: Shape
    unit: str
    good: int = 0
    bad: int = 0
    faults: list[tuple[int, str]] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)

    @property
    def warning(self) -> str | None:
        """The keys that are not read, in a sentence; None where all are."""
        if not self.unread:
            return None
        keys = (
            f"{key[:40]!r}" + (f" ({count:,} of {self.good:,} rows)" if count < self.good else "")
            for key, count in self.unread.most_common(SHOWN)
        )
        return f"keys that are not read: {', '.join(keys)}"

    def read(self, numbered: Iterable[tuple[int, Any]], trainer: str) -> Iterator[tuple[int, Any]]:
        """(number, row as trainers read it or the ValueError of a bad one), counted here as they go by."""
        for number, row in numbered:
            try:
                converted = _converted(row, shape_of(row, TAKES[trainer]) or self.shape, self.unread)
                self.good += 1
                yield number, converted
            except ValueError as error:
                self.bad += 1
                if len(self.faults) < SHOWN:
                    self.faults.append((number, str(error)))
                yield number, error


def _converted(row: Any, shape: Shape, unread: Counter[str]) -> Row:
    """A row with the keys that the trainers read. Raises ValueError with what is wrong with it."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, not {type(row).__name__}")
    if missing := next((key for key in shape.keys if key not in row), None):
        raise ValueError(f"key '{missing}' is missing")
    converted = shape.read(row)
    known = {*shape.keys, *shape.optional, *OWN}
    unread.update(key for key, value in row.items() if key not in known and value not in EMPTY)
    if shape.nested:
        outer, read = shape.nested
        unread.update(f"{outer}.{key}" for key, value in row[outer].items() if key not in read and value not in EMPTY)
    return {key: row[key] for key in KEPT & row.keys()} | converted


def inspect(path: str | Path, trainer: str) -> Inspection:
    """Read a file for a trainer line by line, without keeping its rows, and say all that is wrong with them.

    Args:
        trainer: one of `TAKES`.

    Raises:
        UserError: the file cannot be read, or is of a shape that this trainer does not take.
    """
    unit, numbered, _ = records.iter_rows(path)
    inspection = Inspection(file_shape(path, numbered, trainer), unit)
    deque(inspection.read(records.iter_rows(path)[1], trainer), maxlen=0)
    if not inspection.good + inspection.bad:
        raise UserError(f"{path} has no rows; give a file with rows")
    return inspection


def read(
    path: str | Path,
    trainer: str,
    skip_bad_rows: bool = False,
    fault_of: Callable[[Row], str | None] = lambda row: None,
) -> list[Row]:
    """The rows of a file as trainers read them (see above); keys that are not read are named in one warning.

    Args:
        trainer: one of `TAKES`.
        skip_bad_rows: go on without bad rows, which are named and counted.
        fault_of: a further check of a row: why it is bad, or None.

    Raises:
        UserError: as `inspect`; the first bad row, by file and line; no good row at all.
    """
    unit, numbered, _ = records.numbered_rows(path)
    return read_numbered(path, numbered, trainer, skip_bad_rows, unit, fault_of)


def read_all(path: str | Path, trainer: str) -> tuple[Inspection, list[Row]]:
    """What a file holds for a trainer, and its good rows. Raises UserError as `inspect`."""
    unit, numbered, _ = records.numbered_rows(path)
    inspection = Inspection(file_shape(path, numbered, trainer), unit)
    rows = inspection.read(numbered, trainer)
    return inspection, [row for _, row in rows if not isinstance(row, ValueError)]


def read_numbered(
    path: str | Path,
    numbered: Sequence[tuple[int, Any]],
    trainer: str,
    skip_bad_rows: bool = False,
    unit: str = "line",
    fault_of: Callable[[Row], str | None] = lambda row: None,
) -> list[Row]:
    """`read`, of rows that are there already; `path` and `unit` are for the sentences."""
    inspection = Inspection(file_shape(path, numbered, trainer), unit)
    good = records.check_rows(path, inspection.read(numbered, trainer), (), skip_bad_rows, unit, fault_of).rows
    if inspection.warning:
        log(f"{path}: {inspection.warning}")
    return good


def as_question(row: Any) -> Any:
    """A row of a question and its answer as {"input", "output"}, whatever its shape; any other row as it is."""
    shape = shape_of(row, (shapes.COMPLETION,))
    try:
        converted = shape.read(row) if shape else {}
    except ValueError:  # what is wrong with it is said where it is needed
        return row
    return row | converted if isinstance(converted.get("input"), str) else row


def file_shape(path: str | Path, numbered: Iterable[tuple[int, Any]], trainer: str) -> Shape:
    """The shape of the first row that a trainer takes; of none, the shape that the first row comes nearest to.

    Args:
        path: of the file, for the sentence.
        numbered: its rows.

    Raises:
        UserError: no row is of a shape that the trainer takes, and the first of another, or of none that is known.
    """
    first: Row = {}
    for _, row in numbered:
        if isinstance(row, dict):
            if shapes.has(row, shapes.UNPAIRED[:2]) and isinstance(row.get(shapes.UNPAIRED[2]), bool):
                raise UserError(
                    f"{path} has unpaired preferences, each good or bad by its label, which no trainer takes; keep the "
                    f"rows whose label is true for {SFT}"
                )
            if shape := shape_of(row, TAKES[trainer]):
                return shape
            first = first or row
    if other := shape_of(first, (kind for kind in TAKER if kind not in (PROMPT, TEXT))):
        raise UserError(f"{path} has {other.name}, which {trainer} does not take; train them with {TAKER[other.kind]}")
    if squad.is_squad(path):
        raise UserError(
            f"{path} is no list of rows; SQuAD's JSON is for {DISTILL}, rows of your own are JSONL or a list"
        )
    if what := next((what for keys, what in shapes.ELSEWHERE if shapes.has(first, keys)), None):
        raise UserError(f"{path} has {what}")
    if other := shape_of(first, (TEXT,)):
        raise UserError(f"{path} has {other.name}, which {trainer} does not take; train on it with {TAKER[TEXT]}")
    own = [shape for kind in TAKER if kind in TAKES[trainer] for shape in reversed(SHAPES) if shape.kind == kind]
    nearest = max(own, key=lambda shape: len(first.keys() & shape.keys) / len(shape.keys))
    if first and not first.keys() & nearest.keys:
        keys = ", ".join(map(repr, list(first)[:SHOWN]))
        raise UserError(
            f"{path} has rows with {keys}, which no trainer takes; docs/formats.md has the rows that one takes"
        )
    return nearest
