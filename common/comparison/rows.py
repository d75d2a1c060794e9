"""The rows that teacher, base and student are compared on, and the kinds of data that they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import cli
from common.comparison import perplexity
from common.data import splits, squad
from common.data.rows import SFT_KEYS, read_rows
from common.files import sha256_text
from common.tasks.ranking.task import LabelTask

LABELS, SQUAD, ROWS, TEXT = "labels", "squad", "rows", "text"  # kinds of data


@dataclass(frozen=True)
class RowSelection:
    """Which rows of a file are compared on.

    Attributes:
        data: SQuAD's JSON, rows (.jsonl), text (.txt), or rows of `task`.
        task: the label task that the rows belong to; None: the file's name says what it is (`kind`).
        split: "validation", "dev" or "all": parts by a hash of the group. A text file is taken whole.
        sample: only so many of the rows, chosen by a hash of their text; None: all.
        seed: of the balanced draw of a label task's rows.
        skip_bad_rows: go on without bad rows, and count them.
    """

    data: str
    task: LabelTask | None = None
    split: str = "validation"
    sample: int | None = None
    seed: int = 0
    skip_bad_rows: bool = False

    @property
    def kind(self) -> str:
        """LABELS with a task; else by the file's name SQUAD, TEXT or ROWS."""
        if self.task:
            return LABELS
        if squad.is_squad(self.data):
            return SQUAD
        return TEXT if ".txt" in Path(self.data).suffixes else ROWS

    def read(self) -> tuple[list[dict], int]:
        """The rows, each with its "group", and how many there were before `sample`.

        LABELS have "text" and "label", SQUAD "input" and "answers", ROWS "input" and "output", TEXT "text".

        Raises:
            UserError: bad rows, none of the split, or fewer than `sample`.
        """
        rows = self._read_all()
        if not self.sample:
            return rows, len(rows)
        if self.sample > len(rows):
            raise cli.UserError(
                f"--sample {self.sample} is more than the {len(rows):,} rows of {self.data}; ask for fewer"
            )
        order = sorted(range(len(rows)), key=lambda index: sha256_text(text_of(rows[index])))
        return [rows[index] for index in sorted(order[: self.sample])], len(rows)

    def _read_all(self) -> list[dict]:
        if self.kind == TEXT:
            return perplexity.passages(self.data)
        if self.kind == SQUAD:
            return squad.rows(self.data, self.split, self.skip_bad_rows)
        if self.kind == LABELS:
            return self._balanced()
        rows = read_rows(self.data, SFT_KEYS, self.skip_bad_rows, lambda row: splits.group_fault(row, "*_prepare.py"))
        rows = self._of_split([{**row, "group": row.get("group") or splits.group_hash(row["input"])} for row in rows])
        if not rows:
            raise cli.UserError(f"{self.data} has no row of the {self.split} part; for a new file pass --split all")
        return rows

    def _balanced(self) -> list[dict]:
        """As many rows of each label: the draw of eval_creditmix.py with the same seed."""
        task = self.task
        rows = self._of_split(task.read(self.data, skip_bad_rows=self.skip_bad_rows)[0])
        what = self.data if self.split == "all" else f"the {self.split} part of {self.data}"
        rows = splits.balanced(rows, lambda row: row[task.label_field], task.labels, None, self.seed, what)
        return [{"text": row[task.text_field], "label": row[task.label_field], "group": row["group"]} for row in rows]

    def _of_split(self, rows: Sequence[dict]) -> list[dict]:
        return [row for row in rows if self.split in ("all", splits.part_of(row["group"]))]


def text_of(row: dict) -> str:
    """What the model is given of a row."""
    return row["text"] if "text" in row else row["input"]
