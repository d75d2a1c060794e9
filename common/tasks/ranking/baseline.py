"""A bag of words beside the models: what it learns from, its figures, and whether a model is any better.

By default it learns from the rows that one of the models was trained on, where its run's record still names them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import run_record
from common.cli import UserError, log
from common.data import rows as records
from common.data import splits
from common.files import sha256_file
from common.tasks.ranking import metrics
from common.tasks.ranking.calibration import Scores
from common.tasks.ranking.controls import TFIDF, controls, fault_of
from common.tasks.ranking.task import LabelTask

WITHOUT = "none"  # of --controls
MOST_ROWS = 50_000  # of a run's record that a bag of words learns from
PAIRS = (("input", "output"), ("input", "teacher_output"), ("prompt", "chosen"))  # where rows have prompt and label


@dataclass(frozen=True)
class TrainingRows:
    """Labelled rows that the models were trained on, as a control reads them.

    Attributes:
        source: the file.
        texts, y: clean texts and label indices.
        groups: group hashes; None for a row that has none.
        bag_of_words_alone: no other control is asked for.
    """

    source: str
    texts: list[str]
    y: list[int]
    groups: list[str | None]
    bag_of_words_alone: bool = False


def facts(training: TrainingRows | str) -> dict[str, Any]:
    """What the result says of the bag of words: what it learnt from, or why there is none."""
    if isinstance(training, str):
        return {"reason": training}
    return {"model_dir": TFIDF, "data": training.source, "rows": len(training.texts)}


def training_rows(asked: str | None, model_dirs: Sequence[str], task: LabelTask) -> TrainingRows | str:
    """What the controls learn from, or in a sentence why there are none.

    Args:
        asked: the value of --controls: a file, "none", or None for what the runs' records name.

    Raises:
        UserError: a row of the file that was asked for is none of the task's, or it has none to learn from.
    """
    if asked == WITHOUT:
        return "it was left out (--controls none)"
    if asked:
        return _read(asked, task)
    reasons = []
    for model_dir in model_dirs:
        for path, reason in _recorded(model_dir):
            try:
                if reason is None:
                    return _read(path, task, recorded=True)
            except UserError as error:
                reason = str(error)
            reasons.append(reason)
    return "; ".join(dict.fromkeys(reasons)) or "none of these models keeps a record of its training rows"


def _recorded(model_dir: str) -> Iterator[tuple[str, str | None]]:
    """Each file that a run was trained on, and why it cannot be read again, if it cannot."""
    record = run_record.read(model_dir) or {}
    data = record.get("data") or []
    for file in data if isinstance(data, list) else [data]:
        path = str(file.get("path"))
        if not Path(path).is_file():
            yield path, f"{path}, on which {model_dir} was trained, is not there"
        elif file.get("sha256") != sha256_file(path):
            yield path, f"{path} has changed since {model_dir} was trained on it"
        else:
            yield path, None


def _read(path: str, task: LabelTask, recorded: bool = False) -> TrainingRows:
    """The rows of a file of training rows.

    Args:
        recorded: of a run's record, which may have been trained on other rows too: those of the task are read.

    Raises:
        UserError: a row that is none of the task's, or rows that nothing can be learnt from: found before any scoring.
    """
    instruction = task.prompt("")
    texts, y, groups = [], [], []
    _, numbered, _ = records.numbered_rows(path)
    for number, row in numbered:
        keys = row.keys() if isinstance(row, dict) else ()
        prompt, label = next(((row[a], row[b]) for a, b in PAIRS if a in keys and b in keys), (None, None))
        if isinstance(prompt, str) and prompt.startswith(instruction) and str(label).strip() in task.labels:
            texts.append(task.clean(prompt.removeprefix(instruction)))
            y.append(task.labels.index(str(label).strip()))
            groups.append(row.get("group"))
        elif not recorded:
            raise UserError(
                f"--controls {path}, row {number} is no training row of {task.name}; give the _sft.jsonl file "
                "that creditmix_prepare.py wrote for this task"
            )
    most = MOST_ROWS if recorded else len(texts)
    rows = TrainingRows(path, texts[:most], y[:most], groups[:most], bag_of_words_alone=recorded)
    if fault := fault_of(rows.texts, rows.y):
        if recorded:
            raise UserError(f"{path} has {fault} of {task.name}")
        raise UserError(f"--controls {path} has {fault}; give a file with more rows, or --controls none")
    return rows


def evaluate(
    training: TrainingRows, task: LabelTask, rows: Sequence[dict], seed: int = 0
) -> list[tuple[dict[str, Any], Scores]]:
    """The entry (see `report`) and the scores of each control (see `controls`).

    Raises:
        UserError: see `controls`.
    """
    y = np.array([task.labels.index(row[task.label_field]) for row in rows])
    groups = [row["group"] for row in rows]
    log(f"controls: trained on {len(training.texts):,} rows of {training.source}")
    answers = controls(
        training.texts,
        training.y,
        [row[task.text_field] for row in rows],
        len(task.labels),
        groups=[group or str(number) for number, group in enumerate(training.groups)],
        seed=seed,
        bag_of_words_alone=training.bag_of_words_alone,
    )
    trained = set(filter(None, training.groups))
    seen, of = splits.overlap(groups, trained)
    evaluated = []
    for name, probabilities in answers.items():
        scores = Scores.of(probabilities)
        entry = {
            "model_dir": name,
            "control": True,
            "calibration": "none",
            "contamination": {"rows": seen, "of": of} if trained else None,
            **metrics.evaluate(scores, y, task.labels, groups=groups, seed=seed),
            "predictions": scores.predictions.tolist(),
        }
        evaluated.append((entry, scores))
    return evaluated


def comparisons(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each model against the bag of words: {"name", "model", "words" (accuracies), "difference"}, the latter words
    minus model; none where there is no bag of words."""
    entries = {model["model_dir"]: model for model in result["models"]}
    if TFIDF not in entries:
        return []
    return [
        {
            "model_dir": difference["b"],
            "model": entries[difference["b"]]["accuracy"],
            "words": entries[TFIDF]["accuracy"],
            "difference": difference["accuracy"],
        }
        for difference in result.get("differences") or []
        if difference["a"] == TFIDF and not entries[difference["b"]].get("control")
    ]
