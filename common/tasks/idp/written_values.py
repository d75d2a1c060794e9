"""Typed fields as the document writes them: a schema that asks for text instead, and the values read from the text.

    typed = TypedFields(schema)
    typed.written_schema            # what the model is asked for and held to: "total": "717,97"
    typed.read(written, document)   # .value: "total": 717.97, valid by `schema`; .faults where that cannot be

A grammar that holds "31/12/2017" to a date makes a model write 3112-01-20. So dates, times and numbers, and values of
an enum that has a mapping, are copied as text, and read by code, which gives no value where it can read none.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from common.cli import UserError
from common.generation import json_schema
from common.generation.schema_graph import Node, nodes
from common.generation.schema_places import SchemaPlaces, items_of, property_of
from common.tasks.idp.copies import copies
from common.tasks.idp.field_metrics import path_name
from common.tasks.idp.readers import AS_SHOWN, Conventions, Reading, ReadingSettings, choice_key, read, read_choice

MAPPING = "x-written"  # beside an enum: {value: what documents write for it, a text or a list of them}
MARK = "x-typed"  # in `marked`: the kind of a typed field, or the choices of an enum
MAX_COPIES = 400  # texts that a typed field may be one of
MAX_WRITTEN = 64  # characters of a typed field
KEPT = ("title", "$defs", "definitions", "$id", "$anchor", "$comment")
NOTHING = ("", "-", "–", "—", "n/a", "none", "null")  # what is written where there is nothing
NOTHING_WRITTEN = ("",)
NAMES = {"number": "number", "integer": "number", "date": "date", "time": "time", "date-time": "date and time"}


@dataclass(frozen=True)
class ReadAnswer:
    """An answer with its typed fields read.

    Attributes:
        value: what could not be read is null in it, left out, or where neither is allowed as it was written.
        faults: for each field that neither could be read nor be left empty, a sentence.
        notes: for each field that is not sure, or that was left empty because it could not be read, a sentence.
    """

    value: Any
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class TypedFields:
    """The typed fields of a schema that `json_schema.preflight` has passed.

    Raises:
        UserError: a mapping beside an enum that is none.

    Attributes:
        written_schema: the schema with text in their place.
        places: of the schema itself, where `MARK` says which fields are typed.
    """

    def __init__(self, schema: json_schema.Schema, settings: ReadingSettings | None = None) -> None:
        self.settings = settings or AS_SHOWN
        self.schema = schema
        marked = copy.deepcopy(schema)
        everything = nodes(marked) if isinstance(marked, dict) else []
        held = _ambiguous(everything)
        for node in everything:
            if id(node.schema) not in held and (kind := kind_of(node.schema)):
                node.schema[MARK] = _choices(node.schema) if kind == "choice" else kind
        self.places = SchemaPlaces(marked)
        as_text = copy.deepcopy(marked)
        for node in nodes(as_text) if isinstance(as_text, dict) else ():
            if MARK in node.schema:
                _write_as_text(node.schema)
        self._text_places = SchemaPlaces(as_text)
        self._grammar_schema: dict[str, Any] | None = None
        self.written_schema: json_schema.Schema = copy.deepcopy(as_text)
        for node in nodes(self.written_schema) if isinstance(self.written_schema, dict) else ():
            node.schema.pop(MARK, None)

    def read(self, written: Any, document: str) -> ReadAnswer:
        """The values that an answer's texts stand for.

        Args:
            written: of JSON; what is of another type than text already is taken as it is.
            document: all of its text, whose other dates and numbers show how to read one.
        """
        return _Reader(self._text_places, self.conventions(document)).read(written)

    def grammar_schema(self, document: str) -> dict[str, Any]:
        """`json_schema.Preflight.grammar_schema` for one document: a typed field is one of its dates or numbers.

        So it is a copy to the character, whatever a model would make of it. Where the document has none of a field's
        kind, or very many, the field is any text.
        """
        if self._grammar_schema is None:
            self._grammar_schema = json_schema.preflight(self._text_places.schema, best_effort=True).grammar_schema
        schema = copy.deepcopy(self._grammar_schema)
        conventions = self.conventions(document)
        texts: dict[str, list[str]] = {}
        for node in json_schema.schemas_of(schema):
            kind = node.pop(MARK, None)
            if isinstance(kind, str):
                if kind not in texts:
                    texts[kind] = list(dict.fromkeys(copies(kind, conventions)))
                if 0 < len(texts[kind]) <= MAX_COPIES:
                    nullable = "null" in node["type"]
                    node.clear()
                    # Nothing at all can be written, too, lest a value be taken that is another field's.
                    node["enum"] = [*texts[kind], *NOTHING_WRITTEN, *([None] if nullable else [])]
        return schema

    def conventions(self, document: str) -> Conventions:
        """How a document writes dates and numbers."""
        return Conventions(document, self.settings)


def kind_of(schema: dict[str, Any]) -> str | None:
    """The kind of a typed field, "number", "integer", "date", "time", "date-time" or "choice"; None for others."""
    if "const" in schema:
        return None
    if "enum" in schema:
        return "choice" if isinstance(schema.get(MAPPING), dict) else None
    kinds = schema.get("type", [])
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    kinds.discard("null")
    if kinds and kinds <= {"number", "integer"}:
        return "integer" if kinds == {"integer"} else "number"
    named = schema.get("format")
    return named if kinds == {"string"} and named in ("date", "time", "date-time") else None


def _write_as_text(schema: dict[str, Any]) -> None:
    original, kind = dict(schema), schema[MARK]
    kinds = original.get("type", [])
    nullable = "null" in ([kinds] if isinstance(kinds, str) else kinds) or None in original.get("enum", [])
    said = original.get("description")
    schema.clear()
    schema |= {key: original[key] for key in KEPT if key in original}
    schema["type"] = ["string", "null"] if nullable else "string"
    schema["maxLength"] = MAX_WRITTEN
    if isinstance(kind, dict):
        name = ", ".join(str(value) for value in original["enum"] if value is not None)
    else:
        name = NAMES[kind]
    schema["description"] = f"{said} ({name}, as written)" if isinstance(said, str) else f"{name}, as written"
    schema[MARK] = kind


def _choices(schema: dict[str, Any]) -> dict[str, Any]:
    """{what may be written, by `choice_key`: value} of an enum with a mapping."""
    choices = {choice_key(value): value for value in schema["enum"] if isinstance(value, str)}
    by_name = {str(value): value for value in schema["enum"]}
    for name, texts in schema[MAPPING].items():
        texts = [texts] if isinstance(texts, str) else texts
        if name not in by_name or not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{MAPPING}: '{name}' must be a value of the enum, with a text or a list of texts")
        choices |= {choice_key(text): by_name[name] for text in texts}
    return choices


def _ambiguous(everything: list[Node]) -> set[int]:
    """By `id`, the typed schemas that are one of several kinds of text that a value may be: those stay as they are."""
    targets = {id(node.schema): node.targets for node in everything}

    def members(schema: Any, depth: int = 0) -> list[dict[str, Any]]:
        """A branch and what it refers to or consists of, as far as that may be text."""
        if not isinstance(schema, dict) or depth > 20:
            return []
        parts = [*targets.get(id(schema), ()), *schema.get("allOf", ())]
        parts += [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
        return [schema] * _may_be_text(schema) + [member for part in parts for member in members(part, depth + 1)]

    held: set[int] = set()
    for node in everything:
        for key in ("anyOf", "oneOf"):
            branches = [branch_members for branch in node.schema.get(key, ()) if (branch_members := members(branch))]
            if len(branches) > 1:
                held |= {id(member) for branch in branches for member in branch}
    return held


def _may_be_text(schema: dict[str, Any]) -> bool:
    if kind_of(schema):
        return True
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is not None:
        return any(isinstance(value, str) for value in values)
    kinds = schema.get("type", [] if schema.keys() & {"$ref", "allOf", "anyOf", "oneOf", "properties"} else "string")
    return "string" in ([kinds] if isinstance(kinds, str) else kinds)


class _Reader:
    """One answer being read."""

    def __init__(self, places: SchemaPlaces, conventions: Conventions) -> None:
        self.places, self.conventions = places, conventions
        self.faults: list[str] = []
        self.notes: list[str] = []

    def read(self, written: Any) -> ReadAnswer:
        value = self._value(written, [self.places.schema], (), required=True)
        return ReadAnswer(value, tuple(self.faults), tuple(self.notes))

    def _value(self, written: Any, schemas: list[Any], path: tuple[str | int, ...], required: bool) -> Any:
        applied = [part for schema in schemas for part in self.places.applied(schema, written)]
        if isinstance(written, dict):
            needed = {name for part in applied for name in part.get("required", ())}
            members = {
                name: self._value(member, property_of(applied, name), (*path, name), name in needed)
                for name, member in written.items()
            }
            return {name: member for name, member in members.items() if member is not LEFT_OUT}
        if isinstance(written, list):
            return [
                self._value(item, items_of(applied, index), (*path, index), required=True)
                for index, item in enumerate(written)
            ]
        kind = next((part[MARK] for part in applied if MARK in part), None)
        if kind is None or not isinstance(written, str):
            return written
        reading = read_choice(written, kind) if isinstance(kind, dict) else read(kind, written, self.conventions)
        return self._settle(written, reading, schemas, path_name(path), required)

    def _settle(self, written: str, reading: Reading, schemas: list[Any], name: str, required: bool) -> Any:
        """The value that was read; else null, nothing or the text, whichever is allowed first."""
        sentence = f"{name}: '{written}' {reading.note}"
        if reading.value is not None:
            self.notes += [sentence] if reading.note else []
            return reading.value
        empty = written.strip().lower() in NOTHING
        if all(self.places.fits(None, schema) for schema in schemas):
            self.notes += [] if empty else [f"{sentence}, and is null"]
            return None
        if empty and not required:
            return LEFT_OUT
        self.faults.append(sentence)
        return written


LEFT_OUT = object()
