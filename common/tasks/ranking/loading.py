"""The label task that a command names."""

from __future__ import annotations

from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.task import LabelTask, from_yaml


def load_task(path: str | None) -> LabelTask:
    """The task of a YAML file; CreditMix for None, or by its name.

    Raises:
        UserError: see `task.from_yaml`.
    """
    return CREDITMIX if path in (None, CREDITMIX.name) else from_yaml(path)
