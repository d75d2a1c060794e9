"""The label task that a command names, or that a model was trained for."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import lru_cache

from common import run_record
from common.cli import UserError, log
from common.data import task_record
from common.files import parse_json
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.task import LabelTask, from_settings, from_yaml


def load_task(path: str | None) -> LabelTask:
    """The task of a YAML file; CreditMix for None, or by its name.

    Raises:
        UserError: see `task.from_yaml`.
    """
    return CREDITMIX if path in (None, CREDITMIX.name) else from_yaml(path)


def task_of_rows(path: str | None, data: str | None) -> LabelTask:
    """The task of prepared rows: the one that is named, else the one of the manifest beside them, else CreditMix.

    Raises:
        UserError: see `task.from_yaml`.
    """
    record = task_record.beside(data) if path is None and data else None
    return (record and from_record(record, data)) or load_task(path)


def task_for(path: str | None, *model_dirs: str) -> LabelTask:
    """The task that models are asked for: the one that is named, else the one that they were trained for, else
    CreditMix.

    Raises:
        UserError: one of them was trained for another task; see also `task.from_yaml`.
    """
    trained = {model_dir: trained_for(model_dir) for model_dir in model_dirs} if path is None else {}
    model_dir, task = next(((name, own) for name, own in trained.items() if own), (None, load_task(path)))
    if path is None and task != CREDITMIX:
        log(f"the labels are those of {task.name}, which {model_dir} was trained for; --task names others")
    for model_dir in model_dirs:
        check(task, model_dir)
    return task


def check(task: LabelTask, model_dir: str) -> None:
    """Refuse a model that was trained for another task.

    Raises:
        UserError: names both.
    """
    if fault := mismatch(task, task_record.read(model_dir)):
        raise UserError(f"{model_dir} {fault}; name the label set that it was trained for with --task")


def trained_on(task: LabelTask, model_dir: str) -> bool:
    """Whether a model was trained for a task: by its record, or, of before there were any, because it was trained.

    Raises:
        UserError: the record is broken.
    """
    record = task_record.read(model_dir)
    if record is None:
        return run_record.was_trained(model_dir)
    if record["kind"] != task_record.LABELS:
        return False
    return set(record["labels"]) == set(task.labels) and record["instruction"] == task.instruction


def mismatch(task: LabelTask, record: task_record.Record | None) -> str | None:
    """Why a model with this record cannot be asked for a task ("was trained for ..."); None where it can.

    Verbalizers, null inputs and fields decide how answers are read, so they may differ from those of the training.
    """
    asked = f"not for {task.name} ({', '.join(task.labels)})"
    if not task_record.admits(record, task_record.LABELS, task.instruction):
        return f"was trained for {task_record.described(record)}, {asked}"
    if record is None or record["kind"] != task_record.LABELS:
        return None
    if set(record["labels"]) != set(task.labels):
        return f"was trained for {task_record.described(record)}, {asked}"
    if record["instruction"] != task.instruction:
        return f'was trained with the instruction "{record["instruction"]}", not with "{task.instruction}"'
    return None


def trained_for(model_dir: str) -> LabelTask | None:
    """The label task that a model was trained for; None where its record names none.

    Raises:
        UserError: the record is broken.
    """
    record = task_record.read(model_dir)
    return from_record(record, model_dir) if record else None


def from_record(record: task_record.Record, source: str) -> LabelTask | None:
    """The label task of a record; None where it is of another kind.

    Args:
        source: where it comes from, for errors.

    Raises:
        UserError: a value that cannot work.
    """
    if record["kind"] != task_record.LABELS:
        return None
    known = [item.name for item in fields(LabelTask)]
    settings = {name: record[name] for name in known if record.get(name) is not None}
    task = from_settings(settings, f"{source}/{task_record.FILE}")
    if task.name != CREDITMIX.name:
        return task
    return replace(CREDITMIX, **{name: getattr(task, name) for name in known})  # reads rows in CreditMix's own way


@lru_cache(maxsize=64)
def from_text(text: str, source: str) -> LabelTask | None:
    """`from_record` of a record as `task_record.text_of` gives it; raises as that does."""
    return from_record(parse_json(text), source)
