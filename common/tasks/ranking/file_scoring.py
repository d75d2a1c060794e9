"""Label ranking of a file's rows into a file of answers, in windows, going on where an interrupted run stopped.

`ray_scoring` does the same for many files, on many machines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import UserError, log
from common.data import tables
from common.data.resumable import write_answers
from common.data.rows import iter_rows
from common.files import sha256_file, write_jsonl
from common.models import adapters
from common.models.source import ModelSource
from common.tasks.ranking.classifier import CALIBRATION, Classifier
from common.tasks.ranking.row_check import PromptRoom, RowCheck
from common.tasks.ranking.settings import ScoringSettings
from common.tasks.ranking.task import LabelTask

WINDOW = 4096  # rows in memory at a time
ANSWER_TEXTS = ("model_name", "prediction")  # of an answer; a label may look like a date
HANDED_ON_TEXTS = ("answered_by", "cascade")  # of one that may have been handed on
HANDED_ON = 256  # rows at a time where some are handed on, since those are paid for
HandOn = Callable[[list[str], list[dict]], list[dict]]
NEAR = 0.05  # nats: more than bfloat16 makes of a score in another batch


@dataclass(frozen=True)
class FileScoring:
    """Rows that are to be classified, and how.

    Attributes:
        source: the model.
        input: a file of rows; for `ray_scoring` also a folder, a pattern or an address.
        output: a JSONL, CSV or Parquet file, by its ending; for `ray_scoring` a folder.
        skip_bad_rows: list bad rows (see `check`), and go on; else the first one is an error.
        strict: rows whose text is not of the task (see `LabelTask.warning`) are bad ones, too.
        handed_on: what decides which rows are handed on, and to whom, as JSON; None where none are.
    """

    source: ModelSource
    task: LabelTask
    settings: ScoringSettings
    input: str
    output: str
    skip_bad_rows: bool = False
    strict: bool = False
    handed_on: Any = None

    @cached_property
    def check(self) -> RowCheck:
        """Of the rows."""
        room = PromptRoom.of(self.source, self.task, self.settings.max_batch_tokens)
        return RowCheck(self.task, room, self.strict)

    def decided_by(self) -> dict[str, Any]:
        """All that decides the answers but the rows themselves, as JSON."""
        calibration = self.task.kept_file(self.source.model_dir, CALIBRATION)
        facts = {
            "model_dir": self.source.model_dir,
            "base": self.source.base,
            "load_in_4bit": self.source.load_in_4bit,
            "dtype": self.source.dtype,
            "num_null_prompts": self.settings.num_null_prompts,
            "calibration": self.settings.calibration,
            "skip_bad_rows": self.skip_bad_rows,
            "model_hash": adapters.adapter_hash(self.source.model_dir),
            "fitted": sha256_file(calibration) if calibration.is_file() else None,
            "label_bias": dict(self.settings.label_bias),
            "task": asdict(self.task),
        }
        if self.strict:  # left out without it, so that files of before go on
            facts["strict"] = True
        if self.handed_on is not None:
            facts["handed_on"] = self.handed_on
        return json.loads(json.dumps(facts))


def check_input(path: str, check: RowCheck, skip_bad_rows: bool) -> None:
    """Read the file once, before a model loads: a bad row is found now, not in the middle of a night's work.

    Raises:
        UserError: a row that `check` refuses (unless `skip_bad_rows`), or no other row.
    """
    rows = good = 0
    unit, numbered, _ = iter_rows(path)
    for rows, (number, row) in enumerate(numbered, start=1):  # noqa: B007 (counted to the end)
        _, fault = check.read(row)
        if fault is None:
            good += 1
        elif not skip_bad_rows:
            raise UserError(f"{path}, {unit} {number}: {fault}; mend the row, or pass --skip_bad_rows")
    if not good:
        have = "usable rows" if rows else "rows"
        raise UserError(f"{path} has no {have}; each needs its text under '{check.task.text_field}'")


def good_texts(path: str, check: RowCheck, bad: list[dict]) -> Iterator[str]:
    """The text of each good row; the bad ones are added to `bad`, with why."""
    unit, numbered, _ = iter_rows(path)
    for number, row in numbered:
        text, fault = check.read(row)
        if text is None:
            bad.append({unit: number, "fault": fault, "row": str(row) if isinstance(row, ValueError) else row})
        else:
            yield text


def classify_file(scoring: FileScoring, classifier: Classifier, hand_on: HandOn | None = None) -> None:
    """Write an answer for each good row, in order, and the bad ones into OUTPUT.rejects.jsonl.

    Args:
        hand_on: makes of texts and their answers what is written; None: the answers as they are.
    """
    settings, check = scoring.settings, scoring.check
    # "batch" estimates from the first window, also where the answers of that window are there already
    first = list(islice(good_texts(scoring.input, check, []), WINDOW)) if settings.calibration == "batch" else []
    first_raw = classifier.raw_scores(first) if first else None
    known = dict(zip(first, first_raw, strict=True)) if first else {}
    calibration = classifier.calibration(settings.calibration, first_raw, settings.label_bias)

    def own(texts: list[str]) -> list[dict]:
        raw = np.stack([known[text] for text in texts]) if known.keys() >= set(texts) else None
        return classifier.answers(texts, calibration, raw)

    def answers(window: list[str]) -> list[dict]:
        return hand_on(window, own(window)) if hand_on else own(window)

    def takes_over(count: int, last: dict) -> bool:
        """Whether the last of `count` answers is what is answered to that row now."""
        text = next(islice(good_texts(scoring.input, check, []), count - 1, None), None)
        return text is not None and same_answer(last, own([text])[0])

    texts = (*ANSWER_TEXTS, *HANDED_ON_TEXTS) if hand_on else ANSWER_TEXTS
    bad: list[dict] = []
    decided_by = [scoring.decided_by(), sha256_file(scoring.input)]
    for _ in write_answers(
        scoring.output,
        good_texts(scoring.input, check, bad),
        answers,
        window=HANDED_ON if hand_on else WINDOW,
        decided_by=decided_by,
        takes_over=None if hand_on else takes_over,
        put_in_place=lambda answers, output: tables.put_in_place(answers, output, texts),
    ):
        pass
    rejects = Path(scoring.output + ".rejects.jsonl")
    rejects.unlink(missing_ok=True)
    if bad:
        write_jsonl(rejects, bad)
        log(f"{len(bad)} bad rows of {scoring.input} skipped; they are in {rejects}")


def same_answer(one: dict, other: dict) -> bool:
    """Whether two answers are the same but for the last digits, which depend on the batch."""
    try:
        near = all(
            abs(one[key][label] - value) < NEAR for key in ("scores", "prior") for label, value in other[key].items()
        )
        return near and one["model_name"] == other["model_name"]
    except (KeyError, TypeError):
        return False
