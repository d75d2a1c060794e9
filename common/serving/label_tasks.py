"""Which label task a run is asked for: one server has runs of several."""

from __future__ import annotations

import json
from functools import lru_cache

from common.cli import UserError
from common.data import task_record
from common.serving.run_registry import Version
from common.tasks.ranking import loading
from common.tasks.ranking.calibration import Calibration
from common.tasks.ranking.classifier import CALIBRATION
from common.tasks.ranking.task import LabelTask


class OtherTask(UserError):
    """A run that was trained for another task than it is asked for."""


def task_of(version: Version, default: LabelTask) -> LabelTask:
    """The label task of a run: the one that it was trained for.

    Args:
        default: of runs that do not say, and of a base.

    Raises:
        OtherTask: the run was trained for something else than labels.
        UserError: its record is broken.
    """
    if version.task is None:
        return default
    own = loading.from_text(version.task, version.model_dir)
    if own:
        return own
    if fault := loading.mismatch(default, json.loads(version.task)):
        raise OtherTask(f"the run {version.name} {fault}; send its requests to its own route")
    return default


def calibration_fault(version: Version, default: LabelTask) -> str | None:
    """Why the calibration that a run's folder keeps cannot be used; None where it can, or there is none; blocking."""
    try:
        task = task_of(version, default)
        path = task.kept_file(version.model_dir, CALIBRATION)
        if path.is_file():
            Calibration.load(path, task.labels)
    except OtherTask:
        return None
    except UserError as error:
        return str(error)
    return None


def check(version: Version, kind: str, instruction: str | None, asked: str) -> None:
    """Refuse a run that was trained for another kind of task.

    Args:
        asked: the task, in words.

    Raises:
        OtherTask: it was.
    """
    record = json.loads(version.task) if version.task else None
    if not task_record.admits(record, kind, instruction):
        raise OtherTask(
            f"the run {version.name} was trained for {task_record.described(record)}, not for {asked}; name another run"
        )


@lru_cache(maxsize=64)
def read(text: str) -> LabelTask:
    """The task of a `LabelTask.text`."""
    task = loading.from_text(text, "the server")
    assert task is not None  # it is one of a label task
    return task
