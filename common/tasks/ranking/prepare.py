"""Labelled rows to training files: a split by group, a balanced draw, and the rows of SFT, KD and DPO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.data import splits
from common.files import sha256_file
from common.tasks.ranking.task import LabelTask


def split_by_group(task: LabelTask, rows: Sequence[dict], source: str) -> dict[str, list[dict]]:
    """Rows of each part (`splits.PARTS`), in their order.

    Args:
        source: the name of the rows in an error.

    Raises:
        UserError: a part has no row of some label.
    """
    _need_every_class(task, rows, source)
    parts: dict[str, list[dict]] = {part: [] for part in splits.PARTS}
    for row in rows:
        parts[splits.part_of(row["group"])].append(row)
    for part, members in parts.items():
        _need_every_class(task, members, f"the {part} part of {source}")
    return parts


def _need_every_class(task: LabelTask, rows: Sequence[dict], what: str) -> None:
    counts = splits.class_counts(rows, lambda row: row[task.label_field], task.labels)
    if not all(counts.values()):
        empty = ", ".join(label for label, count in counts.items() if not count)
        listed = ", ".join(f"{label} {count:,}" for label, count in counts.items())
        raise UserError(f"{what} has no row of class {empty} ({listed}); give more {task.group_name}s of that class")


def _with_prompt(task: LabelTask, row: dict, key: str, **answers: str) -> dict:
    return {key: task.prompt(row[task.text_field]), **answers, "group": row["group"]}


def sft_rows(task: LabelTask, train: Sequence[dict]) -> list[dict]:
    """{"input", "output": the label, "group"} of each row."""
    return [_with_prompt(task, row, "input", output=row[task.label_field]) for row in train]


def gold_rows(task: LabelTask, train: Sequence[dict]) -> tuple[list[dict], dict[str, Any]]:
    """KD rows {"input", "teacher_output", "group"} with the gold label, and what the manifest says of that teacher."""
    rows = [_with_prompt(task, row, "input", teacher_output=row[task.label_field]) for row in train]
    return rows, {"name": "gold labels"}


def teacher_rows(
    task: LabelTask, parts: Mapping[str, Sequence[dict]], teacher_file: str, skip_bad_rows: bool
) -> tuple[list[dict], dict[str, Any]]:
    """KD rows of every training row that a teacher answered, and what the manifest says of the teacher.

    All of them, not only those of the balanced draw: answers are scarce.

    Args:
        parts: as `split_by_group` gives them.
        teacher_file: see `LabelTask.read_teacher`.

    Raises:
        UserError: the teacher answers no training row.
    """
    text, label = task.text_field, task.label_field
    answers = task.read_teacher(teacher_file, skip_bad_rows)
    matched = {part: [row for row in members if row[text] in answers] for part, members in parts.items()}
    questions = {row[text] for members in matched.values() for row in members}
    taught = matched["train"]
    if not taught:
        raise UserError(
            f"--teacher_file {teacher_file} answers no training row ({len(questions):,} of its {len(answers):,} "
            "questions are in the source); give the answers to this source's questions, with the same --features"
        )
    teacher = {
        "name": Path(teacher_file).name,
        "sha256": sha256_file(teacher_file),
        "answers": len(answers),
        "answers_without_row": len(answers) - len(questions),
        "rows_taught": len(taught),
        "rows_agreeing_with_gold": sum(answers[row[text]] == row[label] for row in taught),
        "rows_left_out_dev": len(matched["dev"]),
        "rows_left_out_validation": len(matched["validation"]),
    }
    return [_with_prompt(task, row, "input", teacher_output=answers[row[text]]) for row in taught], teacher


def dpo_rows(task: LabelTask, train: Sequence[dict]) -> list[dict]:
    """{"prompt", "chosen", "rejected", "group"}, one pair a row; for each chosen label the others take turns."""
    others = {label: cycle([other for other in task.labels if other != label]) for label in task.labels}
    labels = [row[task.label_field] for row in train]
    return [
        _with_prompt(task, row, "prompt", chosen=label, rejected=next(others[label]))
        for row, label in zip(train, labels, strict=True)
    ]


def describe_parts(
    task: LabelTask, parts: Mapping[str, Sequence[dict]], train: Sequence[dict]
) -> dict[str, dict[str, Any]]:
    """Groups, rows of each label and rows written, of each part; of "train" the balanced draw `train` is written."""

    def counts(rows: Sequence[dict]) -> dict[str, int]:
        return splits.class_counts(rows, lambda row: row[task.label_field], task.labels)

    return {
        part: {
            "groups": len(splits.groups_of(rows)),
            "rows": counts(rows),
            "rows_written": counts(train if part == "train" else rows),
        }
        for part, rows in parts.items()
    }
