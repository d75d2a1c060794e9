"""The one place where the prompt of document extraction is built: prepare, train, infer, eval and serve all ask so."""

from __future__ import annotations

import json

from common.generation.json_schema import Schema
from common.tasks.idp import documents

INSTRUCTION = "Extract from the document what the JSON Schema asks for. Return only the JSON."
SCHEMAS = {  # what stands before the schema, by how typed fields are asked for (see `answer_form`)
    "written": "JSON Schema, of values exactly as the document writes them: ",
    "held": "JSON Schema: ",
}
DOCUMENT = "\n\nDocument:\n"  # what stands before the document


def user_turn(document: str, schema: Schema, typed_fields: str, schema_last: bool = False) -> str:
    """What the model is asked for one document.

    Args:
        schema: with text for typed fields where they are "written" (`written_values.TypedFields`).
        typed_fields: "written" or "held".
        schema_last: the document comes before what is asked for; as training has it, it comes after.
    """
    described = {key: value for key, value in schema.items() if key != "$schema"} if schema is not True else {}
    compact = json.dumps(described, ensure_ascii=False, separators=(",", ":"))
    asked, read = f"{INSTRUCTION}\n\n{SCHEMAS[typed_fields]}{compact}", documents.clean(document)
    return f"{DOCUMENT.lstrip()}{read}\n\n{asked}" if schema_last else f"{asked}{DOCUMENT}{read}"


def shown(prompt: str) -> tuple[str, str] | None:
    """(how typed fields are asked for, the JSON Schema as JSON) of a user turn; None where it is no such turn."""
    for typed_fields, before in SCHEMAS.items():
        start = f"{INSTRUCTION}\n\n{before}"
        if prompt.startswith(start):
            return typed_fields, prompt.removeprefix(start).partition(DOCUMENT)[0]
    return None
