"""What a run was trained for: `task.json` beside its weights, and the same under "task" in run.json and export.json.

    {"kind": "labels", "name": "ticket_severity", "labels": [...], "instruction": ..., ...}    a `LabelTask`
    {"kind": "idp", "name": "idp", "instruction": ..., "schema": {...}, "typed_fields": "written"}
    {"kind": "codegen", "name": "codegen"}
    {"kind": "squad", "name": "squad", "instruction": ...}
    {"kind": "rows", "name": "rows"}                                                          rows of none of these

Each also has "beginnings" and "prompt_endings": the first and the last paragraphs that many of its training prompts
share; where the answers are JSON it also has "json_spacing", "compact" or "spaced". A run from before there was such a
record has none, and may be asked anything.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.files import parse_json, sha256_file, write_json

FILE = "task.json"
RUN_FILE = "run.json"  # `run_record.FILE`
KEY = "task"  # in run.json and export.json
MANIFEST_KEY = "task_record"  # in the manifest that lies beside prepared rows
LABELS, IDP, CODEGEN, SQUAD, ROWS = KINDS = ("labels", "idp", "codegen", "squad", "rows")
MAX_SHOWN = 80  # characters of a prompt in a sentence

Record = dict[str, Any]


def read(folder: str | Path) -> Record | None:
    """What the model in a folder was trained for; None where nothing says so, as of a base model.

    Raises:
        UserError: its task.json is broken.
    """
    path = Path(folder) / FILE
    try:
        if path.is_file():
            return _checked(parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is broken ({str(error)[:200]}); train again, or remove it") from error
    try:
        return _checked(parse_json((Path(folder) / RUN_FILE).read_text(encoding="utf-8"))[KEY])
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or a broken one, which others complain of
        return None


def write(folder: str | Path, record: Record) -> None:
    """Keep a record beside the weights."""
    write_json(Path(folder) / FILE, record)


def of_prompts(kind: str, name: str, prompts: Iterable[str], **facts: Any) -> Record:
    """A record of the kind, with what the training prompts share."""
    prompts = list(prompts)
    shared = {"beginnings": beginnings(prompts), "prompt_endings": prompt_endings(prompts)}
    return {"kind": kind, "name": name, **facts, **shared}


def beginnings(prompts: Iterable[str]) -> list[str]:
    """What many prompts begin with, the commonest first: their first paragraph, where another one follows.

    One in fifty has to share it, and at least two: rows of several tasks have several.
    """
    prompts = list(prompts)
    counts = Counter(first for first, blank, _ in (text.partition("\n\n") for text in prompts) if blank)
    least = max(2, len(prompts) / 50)
    return [first for first, count in counts.most_common() if count >= least]


def prompt_endings(prompts: Iterable[str]) -> list[str]:
    """What many prompts end with, the commonest first: their last paragraph, with the blank line before it.

    That is how a model was asked in its training, where a request follows what the rows are about. One in fifty has to
    share it, and at least two.
    """
    prompts = list(prompts)
    endings = Counter(f"\n\n{ending}" for _, blank, ending in (text.rpartition("\n\n") for text in prompts) if blank)
    least = max(2, len(prompts) / 50)
    return [ending for ending, count in endings.most_common() if count >= least]


def json_spacing(answers: Iterable[str]) -> str | None:
    """Whether most of the JSON objects among answers have a space after the first colon, "spaced", or are "compact".

    None where there are no JSON objects.
    """
    colons = (re.match(r'\{"(?:[^"\\]|\\.)*":( ?)', answer) for answer in answers)
    counts = Counter("spaced" if colon[1] else "compact" for colon in colons if colon)
    return max(counts, key=counts.__getitem__, default=None)


def beside(data: str | Path) -> Record | None:
    """What the manifest says that prepared rows are of, if it lies beside them and vouches for this very file."""
    path, digest = Path(data), None
    for manifest in sorted(path.parent.glob("*_manifest.json")):
        try:
            content = parse_json(manifest.read_text(encoding="utf-8"))
            wanted = content["files"][path.name]["sha256"]
            digest = digest or sha256_file(path)
            if wanted == digest:
                return _checked(content[MANIFEST_KEY])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no manifest of these rows, or one that knows no record
    return None


def admits(record: Record | None, kind: str, instruction: str | None = None) -> bool:
    """Whether a model may be asked for a task.

    Args:
        record: of what it was trained for; None: nothing is known.
        kind: one of `KINDS`.
        instruction: what the task's prompts begin with; None where they share nothing.
    """
    if record is None or record["kind"] == kind:
        return True
    if instruction is not None and instruction.partition("\n\n")[0] in record["beginnings"]:
        return True
    return record["kind"] == ROWS and (instruction is None or not record["beginnings"])


def check(folder: str, kind: str, instruction: str | None, asked: str) -> Record | None:
    """The record of a model that is about to be asked for a task.

    Args:
        asked: the task, in words.

    Raises:
        UserError: the model was trained for another one.
    """
    record = read(folder)
    if not admits(record, kind, instruction):
        raise UserError(
            f"{folder} was trained for {described(record)}, not for {asked}; take a run that was trained for that"
            + (f", or ask this one with infer_creditmix.py --task {record['name']}" if record["kind"] == LABELS else "")
        )
    return record


def check_prompts(folder: str, prompts: Iterable[str], source: str) -> None:
    """Refuse rows that ask a model for something else than it was trained for.

    Args:
        source: the rows' file.

    Raises:
        UserError: none of them begins as its training prompts did.
    """
    record = read(folder)
    if not record or not record["beginnings"]:
        return
    if not any(prompt.startswith(tuple(record["beginnings"])) for prompt in prompts):
        raise UserError(
            f"{folder} was trained for {described(record)}, and no row of {source} asks for that; give rows like those "
            "that it was trained on with --proof_data, or with --task the label set that they are of"
        )


def described(record: Mapping[str, Any]) -> str:
    """A record in the words of a sentence."""
    if record["kind"] == LABELS:
        return f"{record['name']} ({', '.join(record['labels'])})"
    if record["kind"] == IDP:
        return "extracting fields from documents"
    if record["kind"] == CODEGEN:
        return "writing code"
    if record["kind"] == SQUAD:
        return "answering questions on a passage (SQuAD)"
    first = record["beginnings"][0] if record["beginnings"] else ""
    return f'prompts that begin "{first[:MAX_SHOWN]}"' if first else "rows of its own"


def text_of(record: Record) -> str:
    """A record as a text that is the same for equal records."""
    return json.dumps(record, sort_keys=True, ensure_ascii=False)


def of_text(text: str) -> Record:
    """The record that a text tells. Raises ValueError, RecursionError for any other text."""
    return _checked(parse_json(text))


def _checked(record: Any) -> Record:
    """The record, with the keys that every one has. Raises ValueError for anything else."""
    if not isinstance(record, dict) or record.get("kind") not in KINDS or not isinstance(record.get("name"), str):
        raise ValueError("it names no kind of task")
    for key in ("beginnings", "prompt_endings"):
        texts = record.setdefault(key, [])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{key} is no list of texts")
    if record["kind"] == LABELS and not (
        isinstance(record.get("labels"), list) and all(isinstance(label, str) for label in record["labels"])
    ):
        raise ValueError("labels is no list of texts")
    return record
