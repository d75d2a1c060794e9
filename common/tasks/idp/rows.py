"""Documents with their true fields: read from rows or a folder, and the mistakes that an answer could make in them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.data import rows as records
from common.data import splits
from common.files import read_json
from common.generation import json_schema
from common.tasks.idp import documents
from common.tasks.idp import extractor as idp
from common.tasks.idp.field_metrics import leaves, type_of

KEYS = ("document",)
DATE = re.compile(r"^(\d+)[-/.](\d+)[-/.](\d+)$")


def read(path: str | Path, schema: json_schema.Schema, skip_bad_rows: bool = False) -> list[dict]:
    """Labelled documents: rows {"document", "fields"} (JSONL, JSON list), or name.pdf/.txt + name.json in a folder.

    Returns:
        Rows {"document": clean text, "fields", "group": group hash}, and "id" where the row has one or it is a file.

    Raises:
        UserError: by file and line, a row without text or whose fields do not satisfy the schema; no good row at all.
    """
    if Path(path).is_dir():
        unit, numbered = "file", _folder_rows(Path(path))
    else:
        unit, numbered, header = records.numbered_rows(path)
        if header is not None:
            raise UserError(f'{path} must be JSONL rows {{"document", "fields"}}, or a folder of documents')

    def fault(row: dict) -> str | None:
        if not isinstance(row.get("fields"), dict):
            return "'fields' must be a JSON object"
        if "group" in row and not splits.GROUP_HASH.fullmatch(str(row["group"])):
            return f"group '{row['group']}' is not the 16 hex digits that idp_prepare.py writes"
        wrong = json_schema.errors(row["fields"], schema)
        return f"the fields do not satisfy the schema: {wrong[0]}" if wrong else None

    rows = []
    for row in records.check_rows(path, numbered, KEYS, skip_bad_rows, unit, fault):
        text = documents.clean(row["document"])
        facts = {"document": text, "fields": row["fields"], "group": row.get("group") or idp.group_of(text)}
        rows.append(({"id": row["id"]} if "id" in row else {}) | facts)
    return rows


def _folder_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    """(file name, row or the ValueError that says what is wrong) of each document in a folder, in order of name."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in documents.SUFFIXES:
            continue
        try:
            fields = read_json(path.with_suffix(".json"))
            if isinstance(fields, list) and len(fields) == 1:
                fields = fields[0]
            yield path.name, {"id": path.stem, "document": documents.read_document(path), "fields": fields}
        except UserError as error:
            yield path.name, ValueError(str(error))


# Mistakes, for the rejected side of preference rows.

Mistake = Callable[[dict, random.Random], "dict | str | None"]


def rejected(fields: dict, schema: json_schema.Schema, draw: random.Random) -> str:
    """An answer with one realistic mistake, never equal to the right one."""
    right = json_schema.dumps(fields, schema)
    for mistake in draw.sample(MISTAKES, len(MISTAKES)):
        wrong = mistake(json.loads(right), draw)
        if wrong is not None:
            text = wrong if isinstance(wrong, str) else json_schema.dumps(wrong, schema)
            if text != right:
                return text
    return right[:-1]


def other_date_format(fields: dict, draw: random.Random) -> dict | None:
    """2025-09-12 as 12/09/2025, or another date with its parts turned round."""
    return _change_one(fields, draw, lambda leaf: DATE.sub(r"\3/\2/\1", leaf) if isinstance(leaf, str) else leaf)


def swapped_fields(fields: dict, draw: random.Random) -> dict | None:
    """The values of two fields of one type exchanged."""
    by_type: dict[str, list[str]] = {}
    for key, value in fields.items():
        by_type.setdefault(type_of(value), []).append(key)
    pairs = [(a, b) for keys in by_type.values() for a in keys for b in keys if a < b and fields[a] != fields[b]]
    if not pairs:
        return None
    a, b = draw.choice(pairs)
    return fields | {a: fields[b], b: fields[a]}


def missing_key(fields: dict, draw: random.Random) -> dict | None:
    """One field left out."""
    gone = draw.choice(list(fields)) if fields else None
    return {key: value for key, value in fields.items() if key != gone} if fields else None


def invented_value(fields: dict, draw: random.Random) -> dict | None:
    """A value that the document does not have: another digit, a word less, another truth."""
    return _change_one(fields, draw, lambda leaf: _other_value(leaf, draw))


def broken_json(fields: dict, draw: random.Random) -> str:
    """JSON that is cut off, has a quote or a comma too few, or stands in chatter."""
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    place = draw.choice([match.start() for match in re.finditer('[",]', text)] or [0])
    return draw.choice((text[: len(text) * 3 // 4], text[:place] + text[place + 1 :], f"Here is the JSON: {text}"))


MISTAKES: tuple[Mistake, ...] = (other_date_format, swapped_fields, missing_key, invented_value, broken_json)


def _other_value(leaf: Any, draw: random.Random) -> Any:
    if isinstance(leaf, bool):
        return not leaf
    if isinstance(leaf, int | float):
        return leaf + draw.randint(1, 99)
    digits = [match.start() for match in re.finditer("[0-9]", leaf)]
    if digits:
        place = draw.choice(digits)
        return leaf[:place] + str((int(leaf[place]) + draw.randint(1, 9)) % 10) + leaf[place + 1 :]
    words = leaf.split(" ")
    return " ".join(words[:-1]) if len(words) > 1 else leaf + "s"


def _change_one(fields: dict, draw: random.Random, change: Callable[[Any], Any]) -> dict | None:
    """`fields` with one of the leaves that `change` changes, changed; None where there is none."""
    changes = [(path, leaf, change(leaf)) for path, leaf in leaves(fields)]
    changes = [(path, after) for path, leaf, after in changes if after != leaf]
    if not changes:
        return None
    path, after = draw.choice(changes)
    holder = fields
    for part in path[:-1]:
        holder = holder[part]
    holder[path[-1]] = after
    return fields
