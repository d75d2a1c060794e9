"""Judging models on labelled rows, and fitting calibration and decision on dev rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from common import run_record
from common.cli import UserError, log
from common.data import splits
from common.data.resumable import AnswerStore
from common.evaluation.guarantee import check_count, independent_rows
from common.files import read_json, sha256_file
from common.models import adapters
from common.models.source import ModelSource
from common.tasks.ranking import baseline, metrics
from common.tasks.ranking import decision_json as decision_file
from common.tasks.ranking.baseline import TrainingRows
from common.tasks.ranking.calibration import Calibration, Scores, fit_vector_scaling
from common.tasks.ranking.classifier import CALIBRATION, Classifier
from common.tasks.ranking.decision import Goal, check_costs, check_labels, fit_decision
from common.tasks.ranking.settings import ScoringSettings
from common.tasks.ranking.task import LabelTask

KEPT = 512  # rows whose scores are kept together


@dataclass(frozen=True)
class Draw:
    """Which labelled rows of a file are judged on: as many of each label.

    Attributes:
        split: "validation", "dev" or "all" (see `splits.part_of`).
        per_class: rows of each label; None: as many as the rarest label has.
        fraction: or this share of the rarest label's rows.
        seed: of the draw.
    """

    split: str = "validation"
    per_class: int | None = None
    fraction: float | None = None
    seed: int = 0

    def rows(self, task: LabelTask, rows: Sequence[dict], source: str) -> tuple[list[dict], dict[str, int]]:
        """The balanced draw from `rows`, and the class counts of the part that it was drawn from.

        Raises:
            UserError: there are too few rows of a label in the part of `source`.
        """

        def label(row: dict) -> str:
            return row[task.label_field]

        what = source
        if self.split != "all":
            rows = [row for row in rows if splits.part_of(row["group"]) == self.split]
            what = f"the {self.split} part of {source}"
        counts = splits.class_counts(rows, label, task.labels)
        per_class = self.per_class
        if self.fraction:
            per_class = max(1, round(self.fraction * min(counts.values())))
        return splits.balanced(rows, label, task.labels, per_class, self.seed, what), counts


def true_labels(task: LabelTask, rows: Sequence[dict]) -> list[int]:
    """Label indices of rows."""
    return [task.labels.index(row[task.label_field]) for row in rows]


def row_facts(task: LabelTask, rows: Sequence[dict]) -> dict[str, list]:
    """What tells the rows of one evaluation from another's: hashes of their texts, their labels, their groups."""
    return {
        "ids": [splits.group_hash(row[task.text_field]) for row in rows],
        "y": true_labels(task, rows),
        "groups": [row["group"] for row in rows],
    }


def cost_matrix(path: str, labels: Sequence[str]) -> tuple[tuple[float, ...], ...]:
    """costs[true][predicted] from a JSON file of named labels; a pair that is left out costs 0.

    Raises:
        UserError: another form, a label that is none, or a cost that is no number.
    """
    named = read_json(path)
    if not isinstance(named, dict) or not all(isinstance(row, dict) for row in named.values()):
        raise UserError(f'{path} must be {{"true label": {{"predicted label": cost, ...}}, ...}}')
    unknown = sorted(({*named} | {label for row in named.values() for label in row}) - {*labels})
    if unknown:
        raise UserError(f"{path}: unknown label '{unknown[0]}'; the labels are {', '.join(labels)}")
    return check_costs([[named.get(true, {}).get(label, 0.0) for label in labels] for true in labels], len(labels))


def fit_calibration(
    source: ModelSource,
    task: LabelTask,
    settings: ScoringSettings,
    dev: Sequence[dict],
    dev_file: str,
    goal: Goal,
    decision_json: bool = False,
) -> Calibration:
    """Fit bias, temperature and decision on dev rows, and keep them in the model's folder.

    Args:
        dev: rows as `LabelTask.read` gives them, of `dev_file`.
        decision_json: also write what transformers reads (see `decision_json.write`).

    Raises:
        UserError: the model was trained on groups of the dev rows; see also `fit_vector_scaling` and `fit_decision`.
    """
    model_dir = source.model_dir
    y, groups = np.array(true_labels(task, dev)), [row["group"] for row in dev]
    rows = f"rows of {dev_file} are of {task.group_name}s"
    run_record.check_unseen(model_dir, groups, rows, "the dev rows that creditmix_prepare.py wrote")
    check_labels(y, task.labels)
    if goal.target_precision is not None:
        check_count(len(independent_rows(y, groups, balance=True)), goal.target_precision, goal.guarantee)
    classifier = Classifier.load(source, task, settings)
    raw = classifier.raw_scores([row[task.text_field] for row in dev])
    provenance = {
        "file": dev_file,
        "sha256": sha256_file(dev_file),
        "adapter_sha256": adapters.adapter_hash(model_dir),
    }
    before = classifier.default_method
    fitted = fit_vector_scaling(raw, y, task.labels, prior=classifier.prior, fitted_on=provenance, before=before)
    decision = fit_decision(fitted.apply(raw).probabilities, y, task.labels, goal, groups=groups)
    fitted = replace(fitted, decision=decision)
    fitted.save(task.file_in(model_dir, CALIBRATION))
    if decision_json:
        decision_file.write(model_dir, classifier.ranker, [row[task.text_field] for row in dev], y)
    facts = fitted.fitted_on or {}
    log(
        f"{model_dir}: fitted on {len(dev):,} dev rows, temperature {fitted.temperature:.3f}, "
        f"NLL {facts['nll_before']:.4f} -> {facts['nll_after']:.4f}"
    )
    return fitted


def evaluate_models(
    sources: Sequence[ModelSource],
    task: LabelTask,
    settings: ScoringSettings,
    rows: Sequence[dict],
    seed: int = 0,
    training: TrainingRows | str = "",
    store: AnswerStore | None = None,
) -> tuple[list[dict], list[dict], list[Scores]]:
    """One entry per model, the paired differences of every later model to the earlier ones (see `report`), and the
    calibrated scores of each.

    Args:
        seed: of the bootstrap and of the controls.
        training: what the controls, which come last, learn from; a text: there are none.
        store: scores that are there are not computed again; None: none are kept.
    """
    entries, scores = [], []
    for source in sources:
        log(f"{source.model_dir}: scoring {len(rows):,} rows")
        entry, calibrated = evaluate_model(source, task, settings, rows, seed, store)
        entries.append(entry)
        scores.append(calibrated)
    if isinstance(training, TrainingRows):
        for entry, control in baseline.evaluate(training, task, rows, seed):
            entries.append(entry)
            scores.append(control)
    y, groups = np.array(true_labels(task, rows)), [row["group"] for row in rows]
    differences = [
        {
            "a": entries[later]["model_dir"],
            "b": entries[earlier]["model_dir"],
            **metrics.compare(scores[later], scores[earlier], y, groups, seed),
        }
        for later in range(len(scores))
        for earlier in range(later)
    ]
    return entries, differences, scores


def evaluate_model(
    source: ModelSource,
    task: LabelTask,
    settings: ScoringSettings,
    rows: Sequence[dict],
    seed: int = 0,
    store: AnswerStore | None = None,
) -> tuple[dict[str, Any], Scores]:
    """The entry for the result (see `report`) and the calibrated scores of one model; `store` as `evaluate_models`."""
    classifier = Classifier.load(source, task, settings)
    texts = [row[task.text_field] for row in rows]
    scored = (store or AnswerStore(None)).windows(
        texts, KEPT, [*adapters.identity(source), task.record()], lambda batch: classifier.raw_scores(batch).tolist()
    )
    windows, times = zip(*scored, strict=True)
    raw, seconds = np.array([row for window in windows for row in window], dtype=np.float32), sum(times)
    calibration = classifier.calibration(settings.calibration, raw, settings.label_bias)
    calibrated = calibration.apply(raw)
    y, groups = np.array(true_labels(task, rows)), [row["group"] for row in rows]

    def measured(scores: Scores) -> dict[str, Any]:
        return metrics.evaluate(scores, y, task.labels, groups=groups, costs=calibration.decision.costs, seed=seed)

    entry: dict[str, Any] = {
        "model_dir": source.model_dir,
        "calibration": calibration.method,
        "contamination": run_record.contamination(source.model_dir, groups),
        **measured(calibrated),
        "decision": asdict(calibration.decision),
        "predictions": calibrated.predictions.tolist(),
        "rows_per_s": round(len(rows) / seconds, 1),
    }
    if calibration.method == "fitted":  # of the others there is no before: nothing was learnt on other rows
        default = classifier.calibration(classifier.default_method)
        entry["uncalibrated"] = {"calibration": default.method, **measured(default.apply(raw))}
    return entry, calibrated
