"""What a label-ranking task is: its labels, its question and its content-free inputs. CreditMix is the built-in one.

Any other is described by a YAML file (`--task FILE.yaml`); recipes/ticket_severity.yaml is a complete one:

    name: ticket_severity            # part of the file names; default: the name of the YAML file
    labels: [Low, Medium, High]      # in the order of every table and matrix
    instruction: Rate this ticket.   # what stands before the text in every prompt
    text_field: ticket               # where rows have their text; default: text
    label_field: severity            # where rows have their label; default: label
    group_key: customer              # rows of one value stay on one side of the split; default: the text itself
    verbalizers: {Medium: [Normal]}  # other words for a label; default: none
    aggregate: max                   # a label scores as its best word (max) or as their mean; default: max
    null_inputs: [N/A, "?"]          # content-free texts, whose scores are the prior; default: three such
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from common.cli import UserError
from common.data import splits
from common.files import read_text

AGGREGATES = ("max", "mean")


@dataclass(frozen=True)
class LabelTask:
    """A fixed label set and the question that is put to the model.

    Attributes:
        name: short name, part of file names (`<name>_sft.jsonl`).
        labels: the answers, in the order every table and matrix uses.
        instruction: the text before the row's text in every prompt.
        null_inputs: content-free texts whose scores are the prior.
        verbalizers: further words per label, e.g. {"Standard": ["Average"]}.
        aggregate: "max" or "mean": what a label with several words makes of their scores.
        text_field: the key of a row's text.
        label_field: the key of a row's label.
        group_key: the key whose value names a row's group; None: the text itself does.
    """

    name: str
    labels: tuple[str, ...]
    instruction: str
    null_inputs: tuple[str, ...] = ("N/A", "Unknown", "No information.")
    verbalizers: dict[str, list[str]] = field(default_factory=dict)
    aggregate: str = "max"
    text_field: str = "text"
    label_field: str = "label"
    group_key: str | None = None

    def prompt(self, text: str) -> str:
        """The user turn for one row's text; prepare, train, infer, eval and serve all build it here."""
        return f"{self.instruction}\n\n{text}"

    def words(self, label: str) -> list[str]:
        """The words that mean `label`: itself and its verbalizers."""
        return [label, *self.verbalizers.get(label, [])]

    @property
    def group_name(self) -> str:
        """What a group of rows is, for the sentences of a report."""
        return (self.group_key or self.text_field).replace("_", " ")


CREDITMIX = LabelTask(
    name="creditmix",
    labels=("Good", "Standard", "Bad"),
    instruction="Classify the credit mix of this customer as Good, Standard or Bad. Return only the label.",
    null_inputs=(
        "N/A",
        "Unknown",
        "No information.",
        "Age: N/A, Occupation: N/A, Annual Income: N/A, Outstanding Debt: N/A, "
        "Credit Utilization Ratio: N/A, Payment Behaviour: N/A",
        "Age: , Occupation: , Annual Income: , Outstanding Debt: , Credit Utilization Ratio: , Payment Behaviour: ",
    ),
    text_field="question",
    label_field="answer",
    group_key="customer",
)


def label_fault(key: str, task: LabelTask, unlabelled: Sequence[str] = ()) -> Callable[[dict], str | None]:
    """A check for `records.check_rows`: why a row's label (under `key`) or group hash cannot be used; None when it can.

    Args:
        unlabelled: what stands in a row without a label.
    """
    allowed = {*task.labels, *unlabelled}

    def fault(row: dict) -> str | None:
        if row[key].strip() not in allowed:
            return f"{key} '{row[key]}' is not one of {', '.join(task.labels)}"
        if "group" in row and not splits.GROUP_HASH.fullmatch(str(row["group"])):
            return f"group '{row['group']}' is not the 16 hex digits that creditmix_prepare.py writes"
        return None

    return fault


def load(path: str | None) -> LabelTask:
    """The task of a YAML file; CreditMix for None.

    Raises:
        UserError: unreadable, an unknown key, or a value that cannot work; names the key.
    """
    if path is None:
        return CREDITMIX
    try:
        found = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"--task {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UserError(
            f"--task {path} must be a mapping with labels and instruction; see recipes/ticket_severity.yaml"
        )

    def refuse(key: str, what: str) -> UserError:
        return UserError(f"--task {path}: {key} {what}")

    known = [each.name for each in fields(LabelTask)]
    for key in found:
        if key not in known:
            raise refuse(f"unknown key '{key}';", f"the keys are {', '.join(known)}")
    for key in ("labels", "instruction"):
        if key not in found:
            raise refuse(key, "is missing; see recipes/ticket_severity.yaml")
    task = {"name": Path(path).stem, **found}
    for key in ("labels", "null_inputs"):
        if key in task:
            task[key] = tuple(_texts(task[key], lambda what, key=key: refuse(key, what)))
    for key in ("name", "instruction", "text_field", "label_field", "group_key"):
        if key in task and not (isinstance(task[key], str) and task[key].strip()):
            raise refuse(key, f"must be a text, not {task[key]!r}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", task["name"]):
        raise refuse("name", f"'{task['name']}' is part of file names; use letters, digits, - and _")
    if len(task["labels"]) < 2:
        raise refuse("labels", "must name at least two labels")
    if task.get("aggregate", "max") not in AGGREGATES:
        raise refuse("aggregate", f"must be max or mean, not {task['aggregate']!r}")
    words = task.get("verbalizers", {})
    if not isinstance(words, dict) or not set(words) <= set(task["labels"]):
        raise refuse("verbalizers", f"must map labels to lists of words; the labels are {', '.join(task['labels'])}")
    task["verbalizers"] = {
        label: _texts(listed, lambda what, label=label: refuse(f"verbalizers of {label}", what))
        for label, listed in words.items()
    }
    owners: dict[str, str] = {}
    for label in task["labels"]:
        for word in (label, *task["verbalizers"].get(label, [])):
            if word in owners:
                raise refuse("labels", f"have '{word}' twice; every word means one label")
            owners[word] = label
    return LabelTask(**task)


def _texts(value: Any, refuse: Callable[[str], UserError]) -> list[str]:
    """`value` as a list of texts that are not empty. YAML reads a bare Yes, No, On, Off or 3 as something else."""
    if not isinstance(value, list) or not value:
        raise refuse("must be a list of texts")
    for text in value:
        if isinstance(text, bool | int | float):
            raise refuse(f'hold {text!r}, which YAML does not read as a text; put it in quotes ("Yes", "3")')
        if not isinstance(text, str) or not text.strip():
            raise refuse("hold an empty text; give every one some letters")
    return value
