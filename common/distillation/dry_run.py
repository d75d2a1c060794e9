"""What distill_train.py would do, without the weights of student or teacher (see `common.training.dry_run`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.data import squad
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
    parts = [part_of(settings, task, "training rows", settings.data_name, "train")]
    if settings.eval_data:
        parts.append(part_of(settings, task, "held out", settings.eval_data, "dev"))
    if settings.labels:
        distill_rows.check_fed(settings, parts[0].rows)
    sides_of = label_sides if settings.labels else preview.completion_sides
    readers = [settings.teacher] if settings.teacher else []
    reserved = settings.max_new_tokens if settings.on_policy else 0
    return dry_run.report(settings, parts, sides_of, reserved, readers)


def part_of(settings: DistillSettings, task: LabelTask, name: str, path: str, part: str) -> Part:
    """The rows of a file, with all that is wrong with them where it has rows of its own, or of the data set."""
    of_dataset = part == "train" and settings.dataset
    if settings.labels or of_dataset or Path(path).suffix == ".txt" or squad.is_squad(path):
        return Part(name, path, distill_rows.read_part(settings, task, part))
    return dry_run.part_of(name, path, distill_rows.takes_of(settings, part))


def label_sides(row: dict[str, Any]) -> list[Side]:
    """The prompt with the label that is right, or that the teacher thinks likeliest."""
    known = row.get(distill_rows.PROBABILITIES)
    return [Side(row["input"], row.get("output") or max(known, key=known.get))]
