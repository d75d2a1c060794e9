"""Classification metrics with bootstrap intervals, and differences between models.

Every metric is a function of sums over rows (hits per class, rows per confidence bin, squared error, ...). The sums
are taken once per unit of resampling; a bootstrap replicate is then a weighted sum of those, so a thousand replicates
of all metrics are one sparse matrix product, and point values and replicates come from the same formulas. They equal
scikit-learn's (accuracy, precision, recall, F1 with zero_division=0, multi-class Brier, log loss).

Intervals are 95 % percentile intervals (for ECE see `bootstrap.centred`). Rows of one customer (document, article) are
not independent: when `groups` are given, whole groups are resampled with replacement (cluster bootstrap), otherwise
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse

from common.cli import UserError
from common.evaluation.bootstrap import (
    REPLICATES,
    Interval,
    centred,
    interval,
    resample,
    safe_ratio,
    sum_units,
    unit_of_rows,
)
from common.evaluation.reliability import BINS, bin_of, reliability_bins
from common.tasks.ranking.calibration import Scores

_TOTALS = ("n", "brier", "nll", "margin", "answered", "answered_wrong", "cost")


def evaluate(
    scores: Scores,
    y: np.ndarray,
    labels: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    costs: Sequence[Sequence[float]] | None = None,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> dict[str, Any]:
    """All metrics of one model on one set of rows, ready for JSON.

    Accuracy, F1 and the confusion matrix judge the predictions on every row, abstained or not. ECE, Brier and NLL judge
    the probabilities, whatever was decided on them:
    ECE = sum over 15 equal-width bins of (share of rows) x |accuracy - mean confidence|, confidence and accuracy being
    those of the most probable label (Guo et al. 2017, eq. 3); Brier = mean of sum_k (p_k - [y = k])^2, from 0 to 2
    (Brier 1950); NLL = mean of -log p_y, in nats.

    Args:
        scores: of n rows; where some are not answered, `coverage` and `selective_risk` (error rate among answers) are
            added.
        y: [n] true label indices.
        groups: [n] group of each row, for the cluster bootstrap.
        costs: costs[true][predicted]; adds `mean_cost`.

    Returns:
        `n`, `groups` (their number, or None), `replicates`; accuracy, macro_f1, ece, brier, nll, mean_margin and, where
        asked for, coverage, selective_risk, mean_cost as {"value", "low", "high"}; `per_class`: {label: {precision,
        recall, f1: as before, support: rows}}; `confusion_matrix` (rows: true, columns: predicted); `curves`:
        reliability bins, margin histogram and risk-coverage points for the plots.

    Raises:
        UserError: no rows.
    """
    y = np.asarray(y, dtype=np.int64)
    rows, classes = scores.probabilities.shape
    if not rows:
        raise UserError("there is no row to evaluate; give a file with rows")
    features = _row_features(scores, y, costs)
    units, count = unit_of_rows(groups, rows)
    sums = sum_units(features, units, count)
    values = _metrics(np.asarray(sums.sum(axis=0)).reshape(1, -1), classes)
    samples = _metrics(resample(sums, seed, replicates), classes)
    if scores.answered.all():
        del values["coverage"], values["selective_risk"]
    if costs is None:
        del values["mean_cost"]

    result: dict[str, Any] = {"n": rows, "groups": None if groups is None else count, "replicates": replicates}
    per_class = {name: values.pop(name) for name in ("precision", "recall", "f1")}
    samples["ece"] = np.maximum(centred(samples["ece"], values["ece"][0]), 0.0)
    for name, value in values.items():
        result[name] = interval(value[0], samples[name])
    result["per_class"] = _per_class(per_class, samples, y, labels)
    pairs = np.bincount(y * classes + scores.predictions, minlength=classes * classes)
    result["confusion_matrix"] = pairs.reshape(classes, classes).tolist()
    result["curves"] = _curves(scores, y)
    return result


def _per_class(
    values: dict[str, np.ndarray], samples: dict[str, np.ndarray], y: np.ndarray, labels: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """{label: its metrics with intervals, and its rows} of values [1, K] and bootstrap samples [replicates, K]."""
    support = np.bincount(y, minlength=len(labels))
    return {
        label: {
            **{name: interval(value[0, k], samples[name][:, k]) for name, value in values.items()},
            "support": int(support[k]),
        }
        for k, label in enumerate(labels)
    }


def _curves(scores: Scores, y: np.ndarray) -> dict[str, Any]:
    """What the plots show: reliability bins, margin histogram and risk-coverage points."""
    probabilities, predictions = scores.probabilities, scores.predictions
    correct = predictions == y
    return {
        "reliability": reliability_bins(probabilities.max(axis=1), probabilities.argmax(axis=1) == y),
        "margins": margin_histogram(scores.top2_margin, correct),
        "risk_coverage": risk_coverage(probabilities[np.arange(len(y)), predictions], correct),
    }


def compare(
    a: Scores,
    b: Scores,
    y: np.ndarray,
    groups: Sequence[str] | None = None,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> dict[str, Interval]:
    """a minus b in accuracy, macro_f1, ece, brier and nll on the same rows: paired, both see the same resamples."""
    y = np.asarray(y, dtype=np.int64)
    classes = a.probabilities.shape[1]
    units, count = unit_of_rows(groups, len(y))
    values, samples = [], []
    for model in (a, b):
        features = _row_features(model, y, None)
        sums = sum_units(features, units, count)
        values.append(_metrics(np.asarray(sums.sum(axis=0)).reshape(1, -1), classes))
        samples.append(_metrics(resample(sums, seed, replicates), classes))
    differences = {}
    for name in ("accuracy", "macro_f1", "ece", "brier", "nll"):
        value = values[0][name][0] - values[1][name][0]
        replicas = samples[0][name] - samples[1][name]
        differences[name] = interval(value, centred(replicas, value) if name == "ece" else replicas)
    return differences


# The bootstrap: rows -> features -> sums per unit -> replicates -> metrics.


def _row_features(scores: Scores, y: np.ndarray, costs: Sequence[Sequence[float]] | None) -> sparse.csr_matrix:
    """[n, 3K + 3 BINS + totals]: what a row adds to hits, predicted and true per class, to its bin and the totals."""
    probabilities, predictions, answered = scores.probabilities, scores.predictions, scores.answered
    rows, classes = probabilities.shape
    every = np.arange(rows)
    top = probabilities.argmax(axis=1)
    confidence = probabilities[every, top]
    bins = 3 * classes + bin_of(confidence)
    right = predictions == y
    of_truth = probabilities[every, y]
    totals = {
        "n": np.ones(rows),
        "brier": (probabilities**2).sum(axis=1) - 2 * of_truth + 1,
        "nll": -np.log(np.clip(of_truth, np.finfo(np.float64).tiny, None)),
        "margin": scores.top2_margin,
        "answered": answered,
        "answered_wrong": answered & ~right,
        "cost": np.zeros(rows) if costs is None else np.asarray(costs, dtype=np.float64)[y, predictions],
    }
    first_total = 3 * classes + 3 * BINS
    entries = [
        (predictions, right),
        (classes + predictions, 1.0),
        (2 * classes + y, 1.0),
        (bins, 1.0),
        (bins + BINS, confidence),
        (bins + 2 * BINS, top == y),
        *((np.full(rows, first_total + i), totals[name]) for i, name in enumerate(_TOTALS)),
    ]
    columns = np.concatenate([column for column, _ in entries])
    values = np.concatenate([np.broadcast_to(np.asarray(value, dtype=np.float64), rows) for _, value in entries])
    shape = (rows, first_total + len(_TOTALS))
    return sparse.csr_matrix((values, (np.tile(every, len(entries)), columns)), shape=shape)


def _metrics(sums: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """Metrics of sums[R, features]: [R] each, precision, recall and f1 [R, K]."""
    hits, predicted, true = (sums[:, i * classes : (i + 1) * classes] for i in range(3))
    first_total = 3 * classes + 3 * BINS
    _, confidence, right = (sums[:, 3 * classes + i * BINS : 3 * classes + (i + 1) * BINS] for i in range(3))
    total = {name: sums[:, first_total + i] for i, name in enumerate(_TOTALS)}
    n = total["n"]
    f1 = safe_ratio(2 * hits, predicted + true)
    return {
        "accuracy": hits.sum(axis=1) / n,
        "macro_f1": f1.mean(axis=1),
        "ece": np.abs(right - confidence).sum(axis=1) / n,
        "brier": total["brier"] / n,
        "nll": total["nll"] / n,
        "mean_margin": total["margin"] / n,
        "coverage": total["answered"] / n,
        "selective_risk": safe_ratio(total["answered_wrong"], total["answered"]),
        "mean_cost": total["cost"] / n,
        "precision": safe_ratio(hits, predicted),
        "recall": safe_ratio(hits, true),
        "f1": f1,
    }


# What the plots show, small enough to be stored with the result.


def margin_histogram(margins: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """64 bins from 0 for rows answered right and wrong; the last is open. The width is a power of two that fits the
    margins, so that two histograms can be brought to the same bins."""
    high = max(float(np.percentile(margins, 99)), 1e-6)
    width = 2.0 ** np.ceil(np.log2(high / 63))
    bins = np.minimum((np.asarray(margins) / width).astype(np.int64), 63)
    return {
        "width": float(width),
        "right": np.bincount(bins[right], minlength=64).tolist(),
        "wrong": np.bincount(bins[~np.asarray(right)], minlength=64).tolist(),
    }


def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> dict[str, list[float]]:
    """Error rate among the most confident share of rows, for shares of 1, 2, ... 100 % (El-Yaniv & Wiener 2010)."""
    order = np.argsort(-np.asarray(confidence), kind="stable")
    errors = np.cumsum(~np.asarray(right)[order])
    kept = np.unique(np.ceil(np.arange(1, 101) / 100 * len(order)).astype(np.int64))
    return {
        "coverage": (kept / len(order)).round(6).tolist(),
        "risk": (errors[kept - 1] / kept).round(6).tolist(),
        "threshold": np.asarray(confidence)[order][kept - 1].round(6).tolist(),
    }
