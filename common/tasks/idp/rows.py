"""Documents with their true fields, read from rows or a folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.data import rows as records
from common.data import splits
from common.files import read_json
from common.generation import json_schema
from common.tasks.idp import documents, reading
from common.tasks.idp.field_metrics import leaves

KEYS = ("document",)


def read(path: str | Path, schema: json_schema.Schema, skip_bad_rows: bool = False) -> list[dict]:
    """Labelled documents: rows {"document", "fields"} (JSONL, JSON list), or name.pdf/.txt + name.json in a folder.

    Returns:
        Rows {"document": clean text, "fields", "group": group hash}, "id" where the row has one or it is a file, and
        "lines" (words or lines with their boxes, see `documents.of_row`) where they are known.

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
        if endless := next((value for _, value in leaves(row["fields"]) if not _is_json(value)), None):
            return f"'fields' has {json.dumps(endless)}, which JSON has not; write null"
        if wrong := splits.group_fault(row, "idp_prepare.py") or documents.row_fault(row):
            return wrong
        wrong = json_schema.errors(row["fields"], schema)
        return f"the fields do not satisfy the schema: {wrong[0]}" if wrong else None

    rows = []
    for row in records.check_rows(path, numbered, KEYS, skip_bad_rows, unit, fault).rows:
        text = documents.clean(row["document"])
        facts = {"document": text, "fields": row["fields"], "group": row.get("group") or documents.group_of(text)}
        rows.append({key: row[key] for key in ("id", "lines") if row.get(key) is not None} | facts)
    return rows


def _is_json(leaf: Any) -> bool:
    """Whether JSON can hold a leaf: Python reads NaN and 1e999, too."""
    return not isinstance(leaf, float) or math.isfinite(leaf)


def _folder_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    """(file name, row or the ValueError that says what is wrong) of each document in a folder, in order of name."""
    for path in reading.document_files(folder):
        try:
            fields = read_json(path.with_suffix(".json"))
            if isinstance(fields, list) and len(fields) == 1:
                fields = fields[0]
            yield path.name, {"id": path.stem, **documents.to_row(reading.read_document(path)), "fields": fields}
        except UserError as error:
            yield path.name, ValueError(str(error))
