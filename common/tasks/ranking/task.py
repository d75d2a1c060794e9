"""What a label-ranking task is: its labels, its question, its content-free inputs and how its rows are read.

CreditMix is the built-in one (`creditmix`). Any other is described by a YAML file (`--task FILE.yaml`);
recipes/ticket_severity.yaml is a complete one:

    name: ticket_severity            # part of the file names; default: the name of the YAML file
    labels: [Low, Medium, High]      # in the order of every table and matrix
    instruction: Rate this ticket.   # what stands before the text in every prompt
    text_field: ticket               # where rows have their text; default: text
    text_columns: [subject, body]    # rows without that field: the columns that make it; default: none
    label_field: severity            # where rows have their label; default: label
    group_key: customer              # rows of one value stay on one side of the split; default: the text itself
    verbalizers: {Medium: [Normal]}  # other words for a label; default: none
    aggregate: max                   # a label scores as its best word (max) or as their mean; default: max
    null_inputs: [N/A, "?"]          # content-free texts, whose scores are the prior; default: three such
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import yaml

from common.cli import UserError
from common.data import rows as records
from common.data import splits, task_record
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
        text_columns: the keys that make the text of a row that has no `text_field`, as a line "Key: value, ...".
        label_field: the key of a row's label.
        group_key: the key whose value names a row's group; None: the text itself does.
        unlabelled: what stands for a label in a row that has none, in a teacher's file.
    """

    unlabelled: ClassVar[tuple[str, ...]] = ()

    name: str
    labels: tuple[str, ...]
    instruction: str
    null_inputs: tuple[str, ...] = ("N/A", "Unknown", "No information.")
    verbalizers: dict[str, list[str]] = field(default_factory=dict)
    aggregate: str = "max"
    text_field: str = "text"
    text_columns: tuple[str, ...] = ()
    label_field: str = "label"
    group_key: str | None = None

    def prompt(self, text: str) -> str:
        """The user turn for one row's text; prepare, train, infer, eval and serve all build it here."""
        return f"{self.instruction}\n\n{text}"

    def record(self) -> task_record.Record:
        """What a run that was trained for this task keeps of it; `loading.from_record` reads it."""
        facts = json.loads(json.dumps(asdict(self)))  # tuples are lists there
        first = self.instruction.partition("\n\n")[0]
        return {"kind": task_record.LABELS, **facts, "beginnings": [first], "prompt_endings": []}

    @cached_property
    def text(self) -> str:
        """The record as a text, the same for equal tasks."""
        return task_record.text_of(self.record())

    def words(self, label: str) -> list[str]:
        """The words that mean `label`: itself and its verbalizers."""
        return [label, *self.verbalizers.get(label, [])]

    @property
    def group_name(self) -> str:
        """What a group of rows is, for the sentences of a report."""
        return (self.group_key or self.text_field).replace("_", " ")

    @property
    def group_rule(self) -> str:
        """What makes rows one group, for the manifest of a split."""
        return self.group_key or self.text_field

    @property
    def text_keys(self) -> tuple[str, ...]:
        """Where a row that is to be labelled may have its text; the first that is there counts."""
        return (self.text_field,)

    def clean(self, text: str, tally: Counter[str] | None = None) -> str:
        """A row's text as the model is to see it, in training and in use alike.

        Args:
            tally: counts what was done, by rule.
        """
        return text.strip()

    def file_in(self, folder: str | Path, kind: str) -> Path:
        """Where a model's folder keeps this task's `kind` ("calibration" or "prior"), beside those of other tasks."""
        return Path(folder) / f"{kind}.{self.name}.json"

    def kept_file(self, folder: str | Path, kind: str) -> Path:
        """The file to read: `file_in`, or, where there is none, the one of a folder that keeps a single task's, if its
        labels are these."""
        own, single = self.file_in(folder, kind), Path(folder) / f"{kind}.json"
        return single if not own.is_file() and single.is_file() and self._is_of(single) else own

    def _is_of(self, file: Path) -> bool:
        try:
            content = json.loads(file.read_text())
            return set(content.get("labels") or content["prior"]) == set(self.labels)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False

    def warning(self, text: str) -> str | None:
        """Why an answer to a text says little, in a sentence: the text is not of this task. None where it may be."""
        return None

    def hint(self, text: str) -> str | None:
        """What is said of a text that names no column, where rows without a text are lines of columns; else None.

        Such a text may be right, as that of a row under the `text_field` is, of which nothing is said.
        """
        titles = [_title(name) for name in self.text_columns]
        if not titles or any(re.search(rf"(?<!\w){re.escape(title)}:", text, re.IGNORECASE) for title in titles):
            return None
        line = ", ".join(f"{title}: ..." for title in titles)
        remedy = f'if the model was trained on columns, give a line such as "{line}"'
        return f"no column of {self.name} is in the text; {remedy}"

    def as_texts(self, row: Any) -> Any:
        """A row as a table would have it: with its text, where it has columns instead that make one, and with a label
        that is a number, true or false as its text; any other as it is."""
        if not isinstance(row, dict):
            return row
        if isinstance(label := row.get(self.label_field), bool | int | float):
            row = row | {self.label_field: str(label)}
        if self.text_field in row or not set(self.text_columns) & set(row):
            return row
        return row | {self.text_field: ", ".join(_named_cells(row, self.text_columns))}

    def text_of(self, row: Any) -> str | None:
        """The clean text of a row without a label; None where it has none."""
        row = self.as_texts(row)
        for key in self.text_keys:
            if records.row_fault(row, (key,)) is None:
                return self.clean(row[key])
        return None

    def group_of(self, row: dict) -> str:
        """The group hash of a row, whose text need not be clean, from its group key or its text."""
        return splits.group_hash(self._named_group(row) or self.text_of(row) or "")

    def _named_group(self, row: dict) -> str:
        """What a row has under the group key, which may be the number 0; "" for nothing."""
        value = row.get(self.group_key)
        return "" if value is None else str(value).strip()

    def label_fault(self, key: str, unlabelled: Sequence[str] = ()) -> Callable[[dict], str | None]:
        """A check for `records.check_rows`: why a row's label (under `key`) or group hash cannot be used, or None.

        Args:
            unlabelled: what stands in a row without a label.
        """
        allowed = {*self.labels, *unlabelled}

        def fault(row: dict) -> str | None:
            if row[key].strip() not in allowed:
                return f"{key} '{row[key]}' is not one of {', '.join(self.labels)}"
            return splits.group_fault(row, "creditmix_prepare.py")

        return fault

    def _check_columns(self, path: str | Path, columns: Collection[str]) -> None:
        """Raise UserError where the task names a column that no row has: it is spelled otherwise, or the task's is."""
        named = {"label_field": [self.label_field], "text_field": [self.text_field], "group_key": [self.group_key]}
        if self.text_columns and self.text_field not in columns:
            named |= {"text_field": [], "text_columns": self.text_columns}
        if "group" in columns or not self.group_key:
            named["group_key"] = []
        for key, names in named.items():
            for name in names:
                if columns and name not in columns:
                    raise UserError(
                        f"{path}: no row has '{name}', the task's {key}; it has {', '.join(columns)}; mend the name"
                    )

    def read(
        self,
        path: str | Path,
        features: str = "six",
        skip_bad_rows: bool = False,
        text_fault: Callable[[str], str | None] = lambda text: None,
    ) -> tuple[list[dict], dict[str, int]]:
        """Labelled rows of a JSON list, JSONL or CSV file (also gzipped) or of Parquet, and what was done to get them.

        Args:
            features: of CreditMix's raw CSV (see `creditmix.read_labelled`).
            skip_bad_rows: go on without bad rows, which are then named and counted, instead of stopping.
            text_fault: a further check of a clean text: why its row is bad, or None.

        Returns:
            Rows {text_field: text, label_field: label, "group": group hash}, and counts: "rows read", "rows kept",
            "rows unlabelled", "rows bad", "rows synthetic", for CreditMix also what each cleaning rule changed.

        Raises:
            UserError: by file and line, whatever makes the file unusable.
        """
        if features != "six":
            raise UserError(f"--features {features} is for CreditMix's CSV; leave it out with --task")
        unit, numbered, _ = records.numbered_rows(path)
        self._check_columns(path, {name: None for _, row in numbered if isinstance(row, dict) for name in row})
        numbered = [(number, self.as_texts(row)) for number, row in numbered]
        label_fault = self.label_fault(self.label_field)

        def fault(row: dict) -> str | None:
            if self.group_key and row.get("group") is None and not self._named_group(row):
                return f"the group key '{self.group_key}' is missing or empty"
            return label_fault(row) or text_fault(self.clean(row[self.text_field]))

        good = records.check_rows(path, numbered, (self.text_field, self.label_field), skip_bad_rows, unit, fault).rows
        rows = [
            {
                self.text_field: self.clean(row[self.text_field]),
                self.label_field: row[self.label_field].strip(),
                "group": row.get("group") or self.group_of(row),
            }
            for row in good
        ]
        counts = {
            "rows read": len(numbered),
            "rows kept": len(rows),
            "rows unlabelled": 0,
            "rows bad": len(numbered) - len(rows),
            "rows synthetic": sum(row.get("synthetic") in (True, "true", "True") for row in good),
        }
        return rows, counts

    def read_teacher(self, path: str | Path, skip_bad_rows: bool = False) -> dict[str, str]:
        """A teacher's labels by clean text, from the CSV or JSON(L) that a teacher run wrote.

        The text is under the task's text field or "input" (which may be the whole prompt), the label under
        "teacher_label" or "teacher_output". Where a text occurs twice, the first answer counts.
        """
        unit, numbered, _ = records.numbered_rows(path)
        numbered = [(number, self.as_texts(row)) for number, row in numbered]
        keys = set().union(*(row for _, row in numbered if isinstance(row, dict)))
        key = self.text_field if self.text_field in keys else "input"
        answer = "teacher_label" if "teacher_label" in keys else "teacher_output"
        if numbered and not {key, answer} <= keys:
            raise UserError(
                f"{path} needs a {self.text_field} (or input) and a teacher_label (or teacher_output) in every row"
            )
        fault_of = self.label_fault(answer, self.unlabelled)
        labels: dict[str, str] = {}
        for row in records.check_rows(path, numbered, (key, answer), skip_bad_rows, unit, fault_of).rows:
            text = self.clean(row[key].removeprefix(self.prompt("")))
            if (label := row[answer].strip()) not in self.unlabelled:
                labels.setdefault(text, label)
        return labels


def from_yaml(path: str) -> LabelTask:
    """The task of a YAML file.

    Raises:
        UserError: unreadable, or as `from_settings`.
    """
    try:
        settings = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"--task {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(
            f"--task {path} must be a mapping with labels and instruction; see recipes/ticket_severity.yaml"
        )
    task = from_settings({"name": Path(path).stem, **settings}, f"--task {path}")
    if task.text_field in task.text_columns:
        raise UserError(
            f"--task {path}: text_columns make the text of rows without the text_field, and '{task.text_field}' is "
            "among them, so that it would be the whole text; give text_field a name that is no column's"
        )
    return task


def from_settings(settings: dict[str, Any], source: str) -> LabelTask:
    """The task of a mapping of `LabelTask`'s fields.

    Args:
        source: where they come from, for errors.

    Raises:
        UserError: an unknown key, or a value that cannot work; names the key.
    """

    def refuse(key: str, what: str) -> UserError:
        return UserError(f"{source}: {key} {what}")

    known = [item.name for item in fields(LabelTask)]
    for key in settings:
        if key not in known:
            raise refuse(f"unknown key '{key}';", f"the keys are {', '.join(known)}")
    for key in ("labels", "instruction"):
        if key not in settings:
            raise refuse(key, "is missing; see recipes/ticket_severity.yaml")
    task = dict(settings)
    for key in ("labels", "null_inputs", "text_columns"):
        if key == "text_columns" and not task.get(key):
            task[key] = ()
        elif key in task:
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
    task["verbalizers"] = _verbalizers(task.get("verbalizers", {}), task["labels"], refuse)
    return LabelTask(**task)


def _verbalizers(words: Any, labels: Sequence[str], refuse: Callable[[str, str], UserError]) -> dict[str, list[str]]:
    """Further words by label, of which none means two labels."""
    if not isinstance(words, dict) or not set(words) <= set(labels):
        raise refuse("verbalizers", f"must map labels to lists of words; the labels are {', '.join(labels)}")
    checked = {
        label: _texts(listed, lambda what, label=label: refuse(f"verbalizers of {label}", what))
        for label, listed in words.items()
    }
    owners: dict[str, str] = {}
    for label in labels:
        for word in (label, *checked.get(label, [])):
            if word in owners:
                raise refuse("labels", f"have '{word}' twice; every word means one label")
            owners[word] = label
    return checked


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


def _named_cells(row: dict, columns: Sequence[str]) -> Iterator[str]:
    """ "Key: value" of each cell that is not empty, the key as its `_title`, as in CreditMix's lines."""
    for name in columns:
        if (value := row.get(name)) is not None and (text := str(value).strip()):
            yield f"{_title(name)}: {text}"


def _title(name: str) -> str:
    """What a column is called in a line."""
    title = name.strip().replace("_", " ")
    return f"{title[:1].upper()}{title[1:]}"


def warned(task: LabelTask, text: str, answer: dict) -> dict:
    """An answer, with a warning where the text is not of the task."""
    warning = task.warning(text)
    return answer | {"warning": warning} if warning else answer


def hinted(task: LabelTask, text: str, answer: dict) -> dict:
    """The answer to a text of which no row is known, with `LabelTask.hint` as its warning where there is one."""
    hint = task.hint(text)
    return answer | {"warning": hint} if hint else answer
