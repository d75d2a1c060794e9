"""True fields as a document writes them: what a model is trained to copy."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from common.generation.json_writer import plain
from common.generation.schema_places import items_of, property_of
from common.tasks.idp import dates
from common.tasks.idp.copies import copies
from common.tasks.idp.readers import Conventions, read
from common.tasks.idp.written_values import MARK, TypedFields


class Copyist:
    """Finds the characters for typed fields.

    Attributes:
        copied, missed: typed fields whose characters are in their document, and those that had to be written anew.
    """

    def __init__(self, typed: TypedFields) -> None:
        self.typed = typed
        self.copied = self.missed = 0

    def written(self, fields: Any, document: str) -> Any:
        """Fields with the document's characters for each typed one; reading them gives the fields again."""
        return self._value(fields, [self.typed.places.schema], self.typed.conventions(document))

    def _value(self, value: Any, schemas: list[Any], conventions: Conventions) -> Any:
        applied = [part for schema in schemas for part in self.typed.places.applied(schema, value)]
        if isinstance(value, dict):
            return {name: self._value(part, property_of(applied, name), conventions) for name, part in value.items()}
        if isinstance(value, list):
            return [self._value(part, items_of(applied, number), conventions) for number, part in enumerate(value)]
        kind = next((part[MARK] for part in applied if MARK in part), None)
        if kind is None or value is None:
            return value
        if isinstance(kind, dict):
            written = _chosen(value, kind, conventions.document)
        else:
            texts = Counter(_texts_of(value, kind, conventions))
            written = max(texts, key=texts.__getitem__, default=None)
        self.copied += written is not None
        self.missed += written is None
        return _anew(value, kind, conventions) if written is None else written


def _texts_of(value: Any, kind: str, conventions: Conventions) -> Iterator[str]:
    """The texts in a document that a value can have been copied from.

    Where day, month and year could change places, either may be meant: the value tells which.
    """
    for text in copies(kind, conventions):
        if kind.startswith("date") and (date := dates.only(text, conventions.language)):
            days = {meaning.isoformat() for meaning in date.meanings}
            rest = "" if kind == "date" else read("time", dates.masked(text), conventions).value
            if value in {day + (rest and f"T{rest}") for day in days if rest is not None}:
                yield text
        elif read(kind, text, conventions).value == value:
            yield text


def _chosen(value: Any, choices: dict[str, Any], document: str) -> str | None:
    """The longest of the texts for a value of an enum that a document has, as words of their own."""
    text = " ".join(document.split())
    keys = sorted((key for key, meant in choices.items() if meant == value), key=len, reverse=True)
    for key in keys:
        starts, ends = (r"(?<!\w)" if key[:1].isalnum() else ""), (r"(?!\w)" if key[-1:].isalnum() else "")
        if match := re.search(starts + re.escape(key) + ends, text, re.IGNORECASE):
            return match[0]
    return None


def _anew(value: Any, kind: str | dict[str, Any], conventions: Conventions) -> str:
    """A value that its document does not have, so that it is read as it is."""
    if not isinstance(value, int | float) or isinstance(kind, dict):
        return str(value)
    text = plain(value)
    # In a document with decimal commas, 1.234 would be read as a thousand and more.
    return text if read(kind, text, conventions).value == value else f"{text}0"
