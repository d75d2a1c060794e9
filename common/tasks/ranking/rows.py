"""The rows of any label task: CreditMix's own sources for the built-in one, rows of a text and a label for others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.data import rows as records
from common.data import splits
from common.tasks.ranking import creditmix
from common.tasks.ranking.task import CREDITMIX, LabelTask, label_fault


def clean(task: LabelTask, text: str, tally: Counter[str] | None = None) -> str:
    """A row's text as the model is to see it, in training and in use alike."""
    return creditmix.clean_features(text, tally) if task == CREDITMIX else text.strip()


def text_of(task: LabelTask, row: Any) -> str | None:
    """The clean text of a row without a label; None where it has none. CreditMix rows may have it under "features"."""
    for key in ("features", task.text_field) if task == CREDITMIX else (task.text_field,):
        if records.row_fault(row, (key,)) is None:
            return clean(task, row[key])
    return None


def read(
    path: str | Path, task: LabelTask, features: str = "six", skip_bad_rows: bool = False
) -> tuple[list[dict], dict[str, int]]:
    """Labelled rows of a JSON list, JSONL or CSV file (also gzipped), and what was done to get them.

    Args:
        features: of CreditMix's raw CSV (see `creditmix.read_labelled`).
        skip_bad_rows: go on without bad rows, which are then named and counted, instead of stopping.

    Returns:
        Rows {task.text_field: text, task.label_field: label, "group": group hash}, and counts: "rows read", "rows
        kept", "rows unlabelled", "rows bad", "rows synthetic", for CreditMix also what each cleaning rule changed.

    Raises:
        UserError: by file and line, whatever makes the file unusable.
    """
    if task == CREDITMIX:
        return creditmix.read_labelled(path, features, skip_bad_rows)
    if features != "six":
        raise UserError(f"--features {features} is for CreditMix's CSV; leave it out with --task")
    unit, numbered, _ = records.numbered_rows(path)
    keys = (task.text_field, task.label_field)
    fault_of = label_fault(task.label_field, task)

    def fault(row: dict) -> str | None:
        if task.group_key and "group" not in row and not str(row.get(task.group_key) or "").strip():
            return f"the group key '{task.group_key}' is missing or empty"
        return fault_of(row)

    good = records.check_rows(path, numbered, keys, skip_bad_rows, unit, fault)
    rows = []
    for row in good:
        text = clean(task, row[task.text_field])
        group = row.get("group") or splits.group_hash(str(row[task.group_key]).strip() if task.group_key else text)
        rows.append({task.text_field: text, task.label_field: row[task.label_field].strip(), "group": group})
    counts = {
        "rows read": len(numbered),
        "rows kept": len(rows),
        "rows unlabelled": 0,
        "rows bad": len(numbered) - len(rows),
        "rows synthetic": sum(row.get("synthetic") in (True, "true", "True") for row in good),
    }
    return rows, counts


def read_teacher(path: str | Path, task: LabelTask, skip_bad_rows: bool = False) -> dict[str, str]:
    """A teacher's labels by clean text, from the CSV or JSON(L) that a teacher run wrote.

    The text is under the task's text field or "input" (which may be the whole prompt), the label under "teacher_label"
    or "teacher_output". Where a text occurs twice, the first answer counts.
    """
    unit, numbered, header = records.numbered_rows(path)
    keys = set(header or ()).union(*(row for _, row in numbered if isinstance(row, dict)))
    key = task.text_field if task.text_field in keys else "input"
    answer = "teacher_label" if "teacher_label" in keys else "teacher_output"
    if not {key, answer} <= keys:
        raise UserError(
            f"{path} needs a {task.text_field} (or input) and a teacher_label (or teacher_output) in every row"
        )
    unlabelled = creditmix.UNLABELLED if task == CREDITMIX else ()
    fault_of = label_fault(answer, task, unlabelled)
    labels: dict[str, str] = {}
    for row in records.check_rows(path, numbered, (key, answer), skip_bad_rows, unit, fault_of):
        text = clean(task, row[key].removeprefix(task.prompt("")))
        if (label := row[answer].strip()) not in unlabelled:
            labels.setdefault(text, label)
    return labels
