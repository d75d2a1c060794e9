"""Documents with their true fields, read from rows or a folder."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
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


def read(
    path: str | Path,
    schema: json_schema.Schema,
    skip_bad_rows: bool = False,
    recognise: str = "auto",
    kept: str | Path | None = None,
) -> list[dict]:
    """Labelled documents: rows {"document", "fields"} (JSONL, JSON list), or texts, PDFs and images in a folder, each
    with its fields in name.json.

    Args:
        recognise, kept: of a folder, as in `reading.file_rows`.

    Returns:
        Rows {"document": clean text, "fields", "group": group hash}, "id" where the row has one or it is a file, and
        "lines" (words or lines with their boxes, see `documents.of_row`) where they are known.

    Raises:
        UserError: by file and line, a row without text or whose fields do not satisfy the schema; no good row at all.
    """

    def fields_fault(row: dict) -> str | None:
        if not isinstance(row.get("fields"), dict):
            return "'fields' must be a JSON object"
        if endless := next((value for _, value in leaves(row["fields"]) if not _is_json(value)), None):
            return f"'fields' has {json.dumps(endless)}, which JSON has not; write null"
        wrong = json_schema.errors(row["fields"], schema)
        return f"the fields do not satisfy the schema: {wrong[0]}" if wrong else None

    def fault(row: dict) -> str | None:
        return fields_fault(row) or splits.group_fault(row, "idp_prepare.py") or documents.row_fault(row)

    if Path(path).is_dir():
        unit, numbered = "file", _folder_rows(Path(path), fields_fault, recognise, kept)
    else:
        unit, numbered, header = records.numbered_rows(path)
        if header is not None:
            raise UserError(f'{path} must be JSONL rows {{"document", "fields"}}, or a folder of documents')
    rows = []
    for row in records.check_rows(path, numbered, KEYS, skip_bad_rows, unit, fault).rows:
        text = documents.clean(row["document"])
        facts = {"document": text, "fields": row["fields"], "group": row.get("group") or documents.group_of(text)}
        rows.append({key: row[key] for key in ("id", "lines") if row.get(key) is not None} | facts)
    return rows


def _is_json(leaf: Any) -> bool:
    """Whether JSON can hold a leaf: Python reads NaN and 1e999, too."""
    return not isinstance(leaf, float) or math.isfinite(leaf)


def _folder_rows(
    folder: Path, fields_fault: Callable[[dict], str | None], recognise: str, kept: str | Path | None
) -> Iterator[tuple[str, dict | ValueError]]:
    """(file name, row or what is wrong) of each document in a folder, by name; first those whose fields are bad.

    So these are named before text recognition has taken its hours.
    """
    by_fields: dict[Path, list[Path]] = defaultdict(list)
    for path in reading.document_files(folder):
        by_fields[path.with_suffix(".json")].append(path)
    labelled: dict[Path, Any] = {}
    for fields_file, (path, *others) in by_fields.items():
        try:
            if others:  # one document, read twice, could come to stand on both sides of the split
                raise UserError(f"{others[0].name} has the same {fields_file.name}; keep one of the two")
            fields = read_json(fields_file)
            labelled[path] = fields[0] if isinstance(fields, list) and len(fields) == 1 else fields
            if wrong := fields_fault({"fields": labelled[path]}):
                raise UserError(wrong)
        except UserError as error:
            labelled.pop(path, None)
            yield path.name, ValueError(str(error))
    for path, row in reading.file_rows(list(labelled), recognise, kept):
        yield path.name, row if isinstance(row, ValueError) else row | {"id": path.stem, "fields": labelled[path]}
