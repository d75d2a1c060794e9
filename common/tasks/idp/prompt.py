"""The one place where the prompt of document extraction is built: prepare, train, infer, eval and serve all ask so."""

from __future__ import annotations

import json

from common.generation.json_schema import Schema
from common.tasks.idp import documents

INSTRUCTION = "Extract from the document what the JSON Schema asks for. Return only the JSON."
SCHEMA, DOCUMENT = "JSON Schema: ", "\n\nDocument:\n"  # what stands before either


def user_turn(document: str, schema: Schema) -> str:
    """What the model is asked for one document."""
    described = {key: value for key, value in schema.items() if key != "$schema"} if schema is not True else {}
    compact = json.dumps(described, ensure_ascii=False, separators=(",", ":"))
    return f"{INSTRUCTION}\n\n{SCHEMA}{compact}{DOCUMENT}{documents.clean(document)}"


def schema_text(prompt: str) -> str | None:
    """The JSON Schema that a user turn shows, as JSON; None where it is no such turn."""
    start, found, rest = prompt.partition(f"{INSTRUCTION}\n\n{SCHEMA}")
    return rest.partition(DOCUMENT)[0] if found and not start else None
