"""The text of docs/formats.md: what becomes of each keyword of a JSON Schema, how values are read, which rows train.

Nothing here is asserted by hand: every keyword is put to the preflight on a small schema, and every date and amount to
the functions that compare fields.
"""

from __future__ import annotations

import json
from typing import Any

from common.data import shapes
from common.generation import json_schema, string_formats
from common.tasks.idp import field_metrics

OBJECT = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "number"}}}
CLOSED = OBJECT | {"additionalProperties": False}
ITEMS = {"type": "array", "items": {"type": "integer"}}
TEXT, NUMBER = {"type": "string"}, {"type": "number"}
# A schema in which each keyword says something, so that it is not passed over as idle.
EXAMPLES: dict[str, dict[str, Any]] = {
    "type": {"type": "string"},
    "enum": {"enum": ["a", "b"]},
    "const": {"const": 1},
    "anyOf": {"anyOf": [TEXT, NUMBER]},
    "oneOf": {"oneOf": [TEXT, NUMBER]},
    "allOf": {"allOf": [{"minimum": 1}, {"maximum": 5}], "type": "number"},
    "not": {"type": "integer", "not": {"const": 3}},
    "if": {**OBJECT, "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "then": {**OBJECT, "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "else": {**OBJECT, "if": {"required": ["a"]}, "else": {"required": ["b"]}},
    "$ref": {"$defs": {"name": TEXT}, "type": "object", "properties": {"a": {"$ref": "#/$defs/name"}}},
    "$dynamicRef": {"$defs": {"name": TEXT}, "type": "object", "properties": {"a": {"$dynamicRef": "#/$defs/name"}}},
    "properties": OBJECT,
    "patternProperties": {"type": "object", "patternProperties": {"^x": TEXT}, "additionalProperties": False},
    "additionalProperties": CLOSED,
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 3}},
    "required": OBJECT | {"required": ["a"]},
    "minProperties": CLOSED | {"minProperties": 1},
    "maxProperties": {"type": "object", "maxProperties": 1},
    "dependentRequired": OBJECT | {"dependentRequired": {"a": ["b"]}},
    "dependentSchemas": OBJECT | {"dependentSchemas": {"a": {"required": ["b"]}}},
    "unevaluatedProperties": OBJECT | {"unevaluatedProperties": False},
    "items": ITEMS,
    "prefixItems": {"type": "array", "prefixItems": [TEXT, NUMBER]},
    "minItems": ITEMS | {"minItems": 1},
    "maxItems": ITEMS | {"maxItems": 3},
    "uniqueItems": ITEMS | {"uniqueItems": True},
    "contains": ITEMS | {"contains": {"const": 1}},
    "minContains": ITEMS | {"contains": {"const": 1}, "minContains": 2},
    "maxContains": ITEMS | {"contains": {"const": 1}, "maxContains": 2},
    "unevaluatedItems": {"type": "array", "prefixItems": [TEXT], "unevaluatedItems": False},
    "minLength": TEXT | {"minLength": 2},
    "maxLength": TEXT | {"maxLength": 8},
    "pattern": TEXT | {"pattern": "^[A-Z]{2}[0-9]+$"},
    "format": TEXT | {"format": "date"},
    "minimum": NUMBER | {"minimum": 0},
    "maximum": NUMBER | {"maximum": 9},
    "exclusiveMinimum": NUMBER | {"exclusiveMinimum": 0},
    "exclusiveMaximum": NUMBER | {"exclusiveMaximum": 9},
    "multipleOf": {"type": "integer", "multipleOf": 5},
    "dependencies": OBJECT | {"dependencies": {"a": ["b"]}},
    "additionalItems": ITEMS | {"additionalItems": False},
    "$recursiveRef": {"type": "object", "properties": {"a": {"$recursiveRef": "#"}}},
    "extends": TEXT | {"extends": {"minLength": 2}},
    "disallow": {"type": "string", "disallow": "number"},
    "nullable": TEXT | {"nullable": True},
    "divisibleBy": NUMBER | {"divisibleBy": 5},
}
# What makes of an enforced keyword one that is checked.
EXCEPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("pattern", "with look-around", TEXT | {"pattern": "^(?!x)"}),
    ("pattern", "with a word boundary", TEXT | {"pattern": "\\bkg"}),
    ("multipleOf", "0.01", NUMBER | {"multipleOf": 0.01}),
    ("minProperties", "above 1, beside optional properties", CLOSED | {"minProperties": 2}),
    ("minProperties", "beside properties, with others allowed", OBJECT | {"minProperties": 1}),
    ("maxProperties", "beside properties, with others allowed", OBJECT | {"maxProperties": 1}),
    ("oneOf", "alternatives that may hold together", {"oneOf": [{"type": "number"}, {"type": "integer"}]}),
]
DATES = (
    "2025-10-01", "2025/10/1", "2025.10.01", "01.10.2025", "25/12/2018", "12/25/2018", "25-12-18", "09/01/2019",
    "19 april 2014", "7. Mai 2014", "3 février 2021", "2018年4月2日", "1 Oct 2025", "1st October 2025", "01-OCT-25",
    "October 1, 2025", "Oct. 1st 2025", "30.02.2025", "2025-W40-3",
)  # fmt: skip
AMOUNTS = (
    "1234.5", "1,234.50", "1.234,50", "1 234,50", "1'234.50", "$ 8.20", "RM31.00", "USD 50", "1.234,50 EUR", "-12.00",
    "1,234", "1.234", "1.234.567", "(12.00)", "12.00-", "about 50",
)  # fmt: skip
WORDS = {"enforced": "enforced", "checked": "checked", "unsupported": "refused"}


def treatment(keyword: str, schema: dict[str, Any]) -> tuple[str, str]:
    """("enforced", "checked" or "refused", the reason that the preflight gives) of a keyword in a schema."""
    keywords = json_schema.preflight(schema, best_effort=True).keywords
    one = next(entry for entry in keywords if entry.path.endswith(f"/{keyword}"))
    return WORDS[one.treatment], one.reason


def known_formats() -> dict[str, str]:
    """What becomes of each format that the validator or the grammar knows."""
    names = sorted({*json_schema.FORMATS, *string_formats.CHECKER.checkers})
    return {name: treatment("format", TEXT | {"format": name})[0] for name in names}


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _example(schema: dict[str, Any]) -> str:
    return f"`{_cell(json.dumps(schema))}`"


def text(note: str) -> str:
    """The page."""
    lines = [
        "# Formats",
        "",
        note,
        "What of a JSON Schema is kept to, how dates and amounts are read, which rows the trainers take, and which",
        "files the scripts.",
        "",
        *_schema_section(),
        "",
        *_values_section(),
        "",
        *_rows_section(),
        "",
        *_files_section(),
    ]
    return "\n".join(lines) + "\n"


def _schema_section() -> list[str]:
    rows = [(keyword, *treatment(keyword, schema)) for keyword, schema in EXAMPLES.items()]
    kinds = {kind: [keyword for keyword, treated, _ in rows if treated == kind] for kind in WORDS.values()}
    exceptions = [(keyword, case, schema, *treatment(keyword, schema)) for keyword, case, schema in EXCEPTIONS]
    return [
        "## JSON Schema",
        "",
        "The dialect is draft 2020-12, with formats. A keyword is",
        "",
        "- **enforced**: the model cannot write anything else;",
        "- **checked**: the answer is validated afterwards, and one that fails is an error. `infer_idp.py` names these",
        "  before it starts;",
        "- **refused**: the command stops before a model loads, unless `--best_effort`, which leaves the keyword out.",
        "",
        "Keywords that no draft knows, and annotations (`title`, `description`, `default`, ...), are passed over.",
        "References lead within the document; `$schema` is ignored.",
        "",
        "| | keywords |",
        "| --- | --- |",
        *(f"| {kind} | {', '.join(f'`{keyword}`' for keyword in kinds[kind])} |" for kind in kinds),
        "",
        "Enforced keywords that are only checked in some cases:",
        "",
        "| keyword | case | example | |",
        "| --- | --- | --- | --- |",
        *(
            f"| `{keyword}` | {case} | {_example(schema)} | {treated}: {reason} |"
            for keyword, case, schema, treated, reason in exceptions
        ),
        "",
        "Refused, and what to write instead:",
        "",
        "| keyword | |",
        "| --- | --- |",
        *(f"| `{keyword}` | {reason} |" for keyword, treated, reason in rows if treated == "refused"),
        "",
        "| format | |",
        "| --- | --- |",
        *(f"| `{name}` | {kind} |" for name, kind in known_formats().items()),
        "| any other | refused: give a `pattern` instead |",
        "",
        f"A schema may have {json_schema.MAX_BYTES // 1024} KiB, {json_schema.MAX_DEPTH} levels,",
        f"{json_schema.MAX_NODES:,} schemas, and {json_schema.MAX_PROPERTIES:,} entries in one object.",
        "One that nothing can satisfy is refused, with the place of the contradiction.",
    ]


def _values_section() -> list[str]:
    return [
        "## Dates and amounts",
        "",
        "Typed fields are copied as the document has them and read ([IDP](idp.md#dates-times-and-numbers)). Normalised",
        "F1 of `eval_idp.py` compares what values mean, without a document to decide what is not sure:",
        "",
        "| text | read as the date |",
        "| --- | --- |",
        *(f"| `{form}` | {_date(form)} |" for form in DATES),
        "",
        "| text | read as the amount |",
        "| --- | --- |",
        *(f"| `{form}` | {_amount(form)} |" for form in AMOUNTS),
        "",
        "Two digits of a year mean 20xx, from 69 on 19xx. Where day and month cannot be told apart, two dates agree",
        "only in the same order.",
    ]


def _rows_section() -> list[str]:
    return [
        "## Training rows",
        "",
        "Rows are known by their keys, not by the file's name, one by one: a file may mix those that a trainer takes.",
        "",
        "| rows | for example | trainers |",
        "| --- | --- | --- |",
        *(f"| {shape.name} | `{_cell(shape.example)}` | {_trainers(shape)} |" for shape in shapes.SHAPES),
        "",
        "- **Chats.** Turns are the system's (or developer's), the user's and the assistant's; a content is a text, or",
        "  parts with a text. Loss is on every answer of the assistant and the token that ends its turn, but for those",
        '  with `"weight": 0`; what follows the last one is not read. `system` beside ShareGPT and Alpaca rows is a',
        "  system turn. Calls of tools, images and other roles are bad rows, each named by file and line; `tools` that",
        "  are only offered are keys that are not read.",
        "- **Alpaca.** `input` follows `instruction` after a blank line, where there is one.",
        "- **Prompts and completions, preferences.** Each is a text or turns; of turns, a completion's are learnt. A",
        "  prompt may also stand in the turns of both answers. One answer is compared with one.",
        "- **A teacher's answers.** Where rows have `teacher_output`, `kd_train.py` and `distill_train.py` learn that,",
        "  else the answer that the rows have.",
        "- Keys that are not read are named in one warning. A file of rows for another trainer is refused by its name;",
        "  so are unpaired preferences (`prompt`, `completion` and a `label` that is true or false).",
        "",
        "What a file becomes under a model's template, and what it takes to train on it, shows `--dry_run`",
        "([training](training.md#before-you-train)).",
    ]


def _trainers(shape: shapes.Shape) -> str:
    return ", ".join(f"`{trainer}`" for trainer, kinds in shapes.TAKES.items() if shape.kind in kinds)


def _files_section() -> list[str]:
    return [
        "## Files",
        "",
        "All text is UTF-8, a byte-order mark is dropped, and a gzip or Parquet file is known by its bytes, whatever",
        "its name. The cells of CSV are separated by commas, semicolons or tabs, as the header shows. Excel, Arrow,",
        "Avro, ORC and SQLite files are refused by name: save their rows in one of these forms.",
        "",
        "| script | takes |",
        "| --- | --- |",
        *(f"| {script} | {files} |" for script, files in FILES),
        "",
        "What is written for label tasks has the form of its ending: `infer_creditmix.py --output answers.csv` or",
        "`answers.parquet`, `teacher_generate.py --out rows.csv`, and `creditmix_prepare.py --format",
        "csv|parquet|jsonl` for the rows that the trainers take. In a table each entry of an object has a column of",
        "its own (`scores.Good`, `probabilities.Good`).",
    ]


ROWS = "JSONL, a JSON list, CSV or Parquet"
FILES = (
    ("`sft_train.py`, `kd_train.py`, `dpo_train.py`", f"{ROWS} of [training rows](#training-rows)"),
    ("`distill_train.py`", "the same; SQuAD's JSON; text (`.txt`); `--dataset`: the Hub, or a folder"),
    (
        "`distill_train.py --labels`",
        f"{ROWS}; in a table each label's probability has a column",
    ),
    ("`creditmix_prepare.py`, `infer_creditmix.py`, `eval_creditmix.py`", ROWS),
    ("`idp_prepare.py`, `eval_idp.py`", "JSONL or a JSON list; a folder of PDF or text files with JSON beside them"),
    ("`codegen_prepare.py`, `eval_codegen.py`", "JSONL or a JSON list: MBPP, HumanEval, own rows"),
    ("`teacher_generate.py`", ROWS),
    ("`infer_idp.py`, `infer_codegen.py`", "JSONL"),
    ("`infer_creditmix.py --engine ray`", "JSONL, CSV or Parquet: files, folders, patterns, `s3://` and the like"),
    ("`infer_idp.py --document_file`", "PDF, image or text; `--input` takes JSONL or a folder of such files"),
    ("`eval_distill.py`", "SQuAD's JSON, JSONL, text (`.txt`), or a label task's rows"),
)


def _date(form: str) -> str:
    parsed = field_metrics.date(form)
    if parsed is None:
        return "no date"
    if parsed[0] == "day or month":
        return f"{parsed[1]}, day and month not told apart"
    return "-".join(f"{part:02}" for part in parsed)


def _amount(form: str) -> str:
    parsed = field_metrics.amount(form)
    return "no amount" if parsed is None else f"{parsed:.10g}"
