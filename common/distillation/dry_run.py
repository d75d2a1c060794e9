"""What distill_train.py would do, without the weights of student or teacher (see `common.training.dry_run`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.data import shapes, squad
from common.distillation import rows as distill_rows
from common.distillation.settings import DistillSettings
from common.tasks.ranking.task import LabelTask
from common.training import dry_run, preview
from common.training.preview import Part, Side


def show(settings: DistillSettings, task: LabelTask) -> int:
    """Print it; the exit code.

    Raises:
        UserError: as `distill_rows.read_both`.
    """
    named = (("training rows", settings.data or settings.dataset, "train"), ("held out", settings.eval_data, "dev"))
    parts = [part_of(settings, task, *file) for file in named if file[1]]
    sides_of = label_sides if settings.labels else preview.completion_sides
    readers = [settings.teacher] if settings.teacher else []
    reserved = settings.max_new_tokens if settings.on_policy else 0
    return dry_run.report(settings, parts, sides_of, reserved, readers)


def part_of(settings: DistillSettings, task: LabelTask, name: str, path: str, part: str) -> Part:
    """The rows of a file, or of the data set."""
    if settings.dataset and part == "train":
        source = (settings.dataset, settings.subset, settings.split, settings.text_column)
        return Part(name, path, distill_rows.read_dataset(*source, settings.skip_bad_rows))
    if settings.labels:
        return Part(name, path, distill_rows.read_labelled(path, task, settings.skip_bad_rows))
    answered = part == "dev" or settings.needs_completions
    if Path(path).suffix == ".txt" or squad.is_squad(path):
        return Part(name, path, distill_rows.read(path, part, settings.skip_bad_rows, answered=answered))
    return dry_run.part_of(name, path, shapes.DISTILL if answered else shapes.ON_POLICY)


def label_sides(row: dict[str, Any]) -> list[Side]:
    """The prompt with the label that is right, or that the teacher thinks likeliest."""
    known = row.get(distill_rows.PROBABILITIES)
    return [Side(row["input"], row.get("output") or max(known, key=known.get))]
