"""The description of a label set, guessed from the columns of somebody's rows, for that person to look at.

The label is the column that is named like one, or else the last that has few values, words before numbers; the text is
what is written in words; the group is the column that is named like a customer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.cli import UserError
from common.data import rows as records

MOST_LABELS = 100
LONGEST_LABEL = 60  # characters
LEAST_ROWS = 20  # of a label; the held-out parts are a third, and each needs some
FREE_TEXT = 4  # words, on average
LABEL = re.compile(
    r"(?:.*_)?(label|class|category|target|severity|priority|sentiment|intent|topic|answer|rating|stars|status|decision|outcome"
    r"|credit_mix)",
    re.IGNORECASE,
)
GROUP = re.compile(
    r"(?:.*_)?(customer|client|user|account|author|patient|company|group|thread|session|person)(_?(id|no|number|name))?",
    re.IGNORECASE,
)
IDENTITY = re.compile(r"(?:.*_)?(id|uuid|guid|key|index|url|link|e?mail|phone|ssn)", re.IGNORECASE)
NAME = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Column:
    """What is in a column.

    Attributes:
        counts: rows by value, empty ones left out.
        words: that a value has, on average.
    """

    name: str
    counts: Counter[str]
    words: float

    @property
    def rows(self) -> int:
        """That have a value."""
        return self.counts.total()

    @property
    def may_be_label(self) -> bool:
        """Whether its values are few and short."""
        return 2 <= len(self.counts) <= min(MOST_LABELS, self.rows / 2) and max(map(len, self.counts)) <= LONGEST_LABEL

    @property
    def is_identity(self) -> bool:
        """Whether it tells rows apart and says nothing of them."""
        named = bool(IDENTITY.fullmatch(self.name) or GROUP.fullmatch(self.name))
        return named or (len(self.counts) == self.rows and self.words < 2)

    @property
    def is_number(self) -> bool:
        """Whether all values are numbers."""
        return all(re.fullmatch(r"[-+]?[\d.,]+", value) for value in self.counts)


@dataclass(frozen=True)
class Guess:
    """What rows seem to be.

    Attributes:
        label, group: columns; group is None where none is named like one.
        texts: the columns of the text.
        others: columns that are not used, but could be.
        notes: sentences for whoever looks at it.
        as_line: whether the text is a line of its columns, each with its name: of several, or of a number alone.
    """

    label: Column
    texts: tuple[str, ...]
    group: str | None
    others: tuple[str, ...]
    notes: tuple[str, ...]
    as_line: bool


def guess(path: str) -> Guess:
    """What the rows of a JSON list, JSONL, CSV or Parquet file seem to be.

    Raises:
        UserError: no column has few values, or none is left for the text.
    """
    columns = _columns(path)
    able = [column for column in columns if column.may_be_label and not column.is_identity]
    label = next((column for column in able if LABEL.fullmatch(column.name.strip())), None)
    label = label or next(iter(sorted(reversed(able), key=lambda column: column.is_number)), None)
    if label is None:
        raise UserError(
            f"{path} has no column of a few short values that could be labels, only "
            f"{', '.join(column.name for column in columns)}; describe the task as recipes/ticket_severity.yaml does"
        )
    group = next((column.name for column in columns if column != label and GROUP.fullmatch(column.name)), None)
    rest = [column for column in columns if column != label and len(column.counts) > 1 and not column.is_identity]
    free = [column for column in rest if column.words >= FREE_TEXT]
    parts = free or rest
    texts = tuple(column.name for column in parts)
    if not texts:
        raise UserError(
            f"{path} has the labels '{label.name}', but no column of a text; give the text of each row, too"
        )
    others = tuple(column.name for column in rest if column.name not in texts)
    as_line = len(parts) > 1 or parts[0].is_number
    notes = _notes(label, able, group)
    if others:
        notes.append(f"Not in the text: {', '.join(others)}; add what tells something of the label to text_columns.")
        if not as_line:
            columns = f"text_columns: [{texts[0]}, {others[0]}]"
            notes.append(f"For that, write text_field: {_new_name(texts)} and {columns}.")
    return Guess(label, texts, group, others, tuple(notes), as_line)


def _columns(path: str) -> list[Column]:
    unit, numbered, names = records.numbered_rows(path)
    rows = records.check_rows(path, ((number, row) for number, row in numbered), (), True, unit).rows
    names = names or list(dict.fromkeys(name for row in rows for name in row))
    columns = []
    for name in names:
        cells = [_cell(row.get(name)) for row in rows]
        values = [cell for cell in cells if cell]
        if name and values:
            words = sum(len(value.split()) for value in values) / len(values)
            columns.append(Column(name, Counter(values), words))
    return columns


def _cell(value: Any) -> str:
    return "" if value is None or isinstance(value, dict | list) else str(value).strip()


def _new_name(texts: Sequence[str]) -> str:
    """Of the field of a text that these columns make."""
    return "text" if "text" not in texts else "whole_text"


def _notes(label: Column, able: Sequence[Column], group: str | None) -> list[str]:
    notes = []
    if doubts := [
        f"{column.name} ({len(column.counts)} values)"
        for column in able
        if column != label and column.words < FREE_TEXT
    ]:
        notes.append(f"The label could also be {', '.join(doubts)}.")
    if rare := [f"{value} ({count})" for value, count in label.counts.items() if count < LEAST_ROWS]:
        notes.append(f"Rare labels: {', '.join(rare)}; give more rows of them, or leave them out.")
    if len({value.lower() for value in label.counts}) < len(label.counts):
        notes.append("Some labels differ only in capitals: spell them alike in the rows.")
    if not group:
        notes.append("Rows of one customer should share a group_key; without one, only equal texts stay together.")
    return notes


def to_yaml(guessed: Guess, path: str) -> str:
    """The text of a task's YAML file, with notes as comments.

    Args:
        path: of the rows, for the task's name.
    """
    labels = [value for value, _ in guessed.label.counts.most_common()]
    what = guessed.label.name.replace("_", " ").strip()
    settings: dict[str, Any] = {
        "name": NAME.sub("_", f"{Path(path).name.partition('.')[0]}_{guessed.label.name}").strip("_") or "labels",
        "labels": labels,
        "instruction": f"Choose the {what} of this text: {', '.join(labels[:-1])} or {labels[-1]}. "
        f"Return only the {what}.",
    }
    if guessed.as_line:
        settings |= {"text_field": _new_name(guessed.texts)}
        settings |= {"text_columns": list(guessed.texts)}
    else:
        settings |= {"text_field": guessed.texts[0]}
    settings |= {"label_field": guessed.label.name}
    if guessed.group:
        settings |= {"group_key": guessed.group}
    comments = [
        f"# Guessed from {Path(path).name}: look at every line before training on it (docs/add-a-label-set.md).",
        "# Put the labels into the order that tables are to have, the instruction into your own words.",
        *(f"# {note}" for note in guessed.notes),
    ]
    return "\n".join(comments) + "\n" + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=110)
