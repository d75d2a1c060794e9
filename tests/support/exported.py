"""What the tests of exports share: rows to prove on, and the command itself."""

from __future__ import annotations

import json
from pathlib import Path

import export_model
from common import cli
from common.export import pipeline as export
from common.tasks.ranking.task import LabelTask
from support.inputs import CORPUS, LABELS, SHARED, write_rows

LINES = [text.partition("\n\n")[2] for text in CORPUS]
AWKWARD = LabelTask("awkward", ("Bad", "Bad debt", "Bad debt, unpaid for very long", "größe"), "Which one?", ("N/A",))
STORIES = SHARED / "models" / "stories260k"  # a pretrained model that nobody here made
TOLD = (
    "Tim had a red ball. He liked to play with it in the park. One day the ball went into the water.",
    "The little dog was sad. He could not find his bone. A bird saw him and wanted to help.",
    "Lily and her mom went to the shop. They wanted to buy a cake. The cake was big and sweet.",
)


def labelled_rows(folder: Path) -> str:
    """48 rows with a label and a group."""
    rows = [{"question": line, "answer": LABELS[i % 3], "group": f"{i:016x}"} for i, line in enumerate(LINES[:48])]
    return write_rows(folder / "dev.jsonl", rows)


def stories(folder: Path) -> str:
    """Three short stories, as rows of text."""
    return write_rows(folder / "stories.jsonl", [{"input": "Once upon a time,", "output": text} for text in TOLD])


def export_run(model_dir: str, form: str, save_dir: Path, rows: str, *more: str) -> dict:
    """The export.json of an export that passes."""
    argv = ["--model_dir", model_dir, "--format", form, "--save_dir", str(save_dir), "--proof_data", rows]
    assert export_model.main([*argv, *more]) == cli.DONE
    return json.loads((save_dir / export.RECORD).read_text())
