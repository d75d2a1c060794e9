"""Classification metrics with bootstrap intervals, differences between models, and drift between two results.

Every metric is a function of sums over rows (hits per class, rows per confidence bin, squared error, ...). The sums
are taken once per unit of resampling; a bootstrap replicate is then a weighted sum of those, so a thousand replicates
of all metrics are one sparse matrix product, and point values and replicates come from the same formulas. They equal
scikit-learn's (accuracy, precision, recall, F1 with zero_division=0, multi-class Brier, log loss).

Intervals are 95 % percentile intervals (for ECE see `_centred`). Rows of one customer (document, article) are not
independent: when `groups` are given, whole groups are resampled with replacement (cluster bootstrap), otherwise rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse, stats

from common.cli import UserError
from common.evaluation.bootstrap import (
    REPLICATES,
    Interval,
    interval,
    resample,
    safe_ratio,
    sum_units,
    unit_of_rows,
)
from common.tasks.ranking.calibration import Scores

BINS = 15
SIGNIFICANCE = 0.05
_TOTALS = ("n", "brier", "nll", "margin", "answered", "answered_wrong", "cost")


def evaluate(
    probabilities: np.ndarray,
    y: np.ndarray,
    labels: Sequence[str],
    predictions: np.ndarray | None = None,
    margins: np.ndarray | None = None,
    answered: np.ndarray | None = None,
    groups: Sequence[str] | None = None,
    costs: Sequence[Sequence[float]] | None = None,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> dict[str, Any]:
    """All metrics of one model on one set of rows, ready for JSON.

    Accuracy, F1 and the confusion matrix judge `predictions` on every row, abstained or not. ECE, Brier and NLL judge
    the probabilities, whatever was decided on them:
    ECE = sum over 15 equal-width bins of (share of rows) x |accuracy - mean confidence|, confidence and accuracy being
    those of the most probable label (Guo et al. 2017, eq. 3); Brier = mean of sum_k (p_k - [y = k])^2, from 0 to 2
    (Brier 1950); NLL = mean of -log p_y, in nats.

    Args:
        probabilities: [n, K].
        y: [n] true label indices.
        predictions: [n] label indices; argmax when None.
        margins: [n] top-2 margins, in nats; those of the log-probabilities when None.
        answered: [n] False where the model abstains; adds `coverage` and `selective_risk` (error rate among answers).
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
    rows, classes = probabilities.shape
    if not rows:
        raise UserError("there is no row to evaluate; give a file with rows")
    top = probabilities.argmax(axis=1)
    predictions = top if predictions is None else np.asarray(predictions)
    margins = _log_margins(probabilities) if margins is None else margins
    features = _row_features(probabilities, y, predictions, margins, answered, costs)
    units, count = unit_of_rows(groups, rows)
    sums = sum_units(features, units, count)
    values = _metrics(np.asarray(sums.sum(axis=0)).reshape(1, -1), classes)
    samples = _metrics(resample(sums, seed, replicates), classes)
    if answered is None or np.all(answered):
        del values["coverage"], values["selective_risk"]
    if costs is None:
        del values["mean_cost"]

    result: dict[str, Any] = {"n": rows, "groups": None if groups is None else count, "replicates": replicates}
    per_class = {name: values.pop(name) for name in ("precision", "recall", "f1")}
    samples["ece"] = np.maximum(_centred(samples["ece"], values["ece"][0]), 0.0)
    for name, value in values.items():
        result[name] = interval(value[0], samples[name])
    support = np.bincount(y, minlength=classes)
    result["per_class"] = {
        label: {
            **{name: interval(value[0, k], samples[name][:, k]) for name, value in per_class.items()},
            "support": int(support[k]),
        }
        for k, label in enumerate(labels)
    }
    pairs = np.bincount(y * classes + predictions, minlength=classes * classes)
    result["confusion_matrix"] = pairs.reshape(classes, classes).tolist()
    confidence = probabilities[np.arange(rows), predictions]
    result["curves"] = {
        "reliability": reliability_bins(probabilities, y),
        "margins": margin_histogram(margins, predictions == y),
        "risk_coverage": risk_coverage(confidence, predictions == y),
    }
    return result


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
        features = _row_features(model.probabilities, y, model.predictions, model.top2_margin, None, None)
        sums = sum_units(features, units, count)
        values.append(_metrics(np.asarray(sums.sum(axis=0)).reshape(1, -1), classes))
        samples.append(_metrics(resample(sums, seed, replicates), classes))
    differences = {}
    for name in ("accuracy", "macro_f1", "ece", "brier", "nll"):
        value = values[0][name][0] - values[1][name][0]
        replicas = samples[0][name] - samples[1][name]
        differences[name] = interval(value, _centred(replicas, value) if name == "ece" else replicas)
    return differences


# The bootstrap: rows -> features -> sums per unit -> replicates -> metrics.


def _row_features(
    probabilities: np.ndarray,
    y: np.ndarray,
    predictions: np.ndarray,
    margins: np.ndarray,
    answered: np.ndarray | None,
    costs: Sequence[Sequence[float]] | None,
) -> sparse.csr_matrix:
    """[n, 3K + 3 BINS + totals]: what a row adds to hits, predicted and true per class, to its bin and the totals."""
    rows, classes = probabilities.shape
    every = np.arange(rows)
    top = probabilities.argmax(axis=1)
    confidence = probabilities[every, top]
    bins = 3 * classes + _bin_of(confidence)
    right = predictions == y
    answered = np.ones(rows, dtype=bool) if answered is None else np.asarray(answered)
    of_truth = probabilities[every, y]
    totals = {
        "n": np.ones(rows),
        "brier": (probabilities**2).sum(axis=1) - 2 * of_truth + 1,
        "nll": -np.log(np.clip(of_truth, np.finfo(np.float64).tiny, None)),
        "margin": margins,
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


def _centred(samples: np.ndarray, value: float) -> np.ndarray:
    """Replicates of ECE shifted to have the value as their mean.

    ECE adds up absolute values, so resampling noise only ever adds to it: unshifted, the replicates of a well
    calibrated model all lie above its value, which would fall outside its own interval.
    """
    return samples - samples.mean() + value


# What the plots show, small enough to be stored with the result.


def _bin_of(confidence: np.ndarray) -> np.ndarray:
    """Bin m of `BINS` holds confidences in ((m - 1) / BINS, m / BINS]."""
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


def _log_margins(probabilities: np.ndarray) -> np.ndarray:
    log_p = np.log(np.clip(probabilities, np.finfo(np.float64).tiny, None))
    best_two = np.partition(log_p, -2, axis=1)[:, -2:]
    return best_two[:, 1] - best_two[:, 0]


def reliability_bins(probabilities: np.ndarray, y: np.ndarray) -> dict[str, list]:
    """Per confidence bin: rows, mean confidence and accuracy (None where the bin is empty)."""
    confidence = probabilities.max(axis=1)
    bins = _bin_of(confidence)
    count = np.bincount(bins, minlength=BINS)

    def means(values: np.ndarray) -> list[float | None]:
        totals = np.bincount(bins, values, minlength=BINS)
        return [round(total / rows, 6) if rows else None for total, rows in zip(totals, count, strict=True)]

    return {
        "count": count.tolist(),
        "confidence": means(confidence),
        "accuracy": means((probabilities.argmax(axis=1) == y).astype(np.float64)),
    }


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


# Drift: a stored result against a new one.


def drift(baseline: dict[str, Any], now: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Compare two results of an evaluator (the content of two `metrics.json`), model by model.

    Where both hold the same rows (`rows.ids`, and each model's `predictions`) the differences are paired; else each
    result's interval gives its standard error and the two are taken as independent. A drop is significant when the
    95 % interval of (now - before) lies below 0. Label shift is a chi-square test on the class counts (`class_counts`
    of the file where the result has them, else the evaluated rows, which say nothing if they were drawn balanced);
    margin shift is a two-sample Kolmogorov-Smirnov test on the stored histograms, conservative because binned. Shifts
    are reported; only a drop counts as drift.

    Models are matched by `model_dir`; a single model on both sides is matched whatever it is called.

    Returns:
        {"drifted": bool, "label_shift": {statistic, p_value, shifted}, "models": [{"model_dir", "paired",
        "accuracy" and "macro_f1": {"before", "now", "difference": {value, low, high}, "dropped"}, "margin_shift"}]}

    Raises:
        UserError: the results have different labels, no model in common, or `baseline` is not a result.
    """
    try:
        if baseline["labels"] != now["labels"]:
            raise UserError(
                f"the baseline has the labels {', '.join(baseline['labels'])}, this result {', '.join(now['labels'])}; "
                "compare results of the same task"
            )
        before_models = {model["model_dir"]: model for model in baseline["models"]}
        if len(before_models) == len(now["models"]) == 1:
            pairs = [(next(iter(before_models.values())), now["models"][0])]
        else:
            pairs = [(before_models[m["model_dir"]], m) for m in now["models"] if m["model_dir"] in before_models]
        if not pairs:
            raise UserError(f"the baseline has other models ({', '.join(before_models)}); evaluate one of them")
        order = _same_rows(baseline, now)
        models = [_model_drift(before, after, baseline, now, order, seed) for before, after in pairs]
        label_shift = _label_shift(_class_counts(baseline), _class_counts(now))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the baseline is not a metrics.json of this evaluator ({error}); write one with --report_dir"
        ) from error
    dropped = any(model[name]["dropped"] for model in models for name in ("accuracy", "macro_f1"))
    return {"drifted": dropped, "label_shift": label_shift, "models": models}


def _model_drift(before: dict, after: dict, baseline: dict, now: dict, order: np.ndarray | None, seed: int) -> dict:
    paired = order is not None and "predictions" in before and "predictions" in after
    if paired:
        y = np.asarray(now["rows"]["y"])
        onehot = np.eye(len(now["labels"]))

        def decided(predictions: np.ndarray) -> Scores:
            never = np.zeros(len(y))
            return Scores(onehot[predictions], onehot[predictions], predictions, never == 0, never)

        differences = compare(
            decided(np.asarray(after["predictions"])),
            decided(np.asarray(before["predictions"])[order]),
            y,
            now["rows"].get("groups"),
            seed,
        )
    report = {"model_dir": after["model_dir"], "paired": paired}
    for name in ("accuracy", "macro_f1"):
        difference = differences[name] if paired else _unpaired(before[name], after[name])
        report[name] = {
            "before": before[name]["value"],
            "now": after[name]["value"],
            "difference": difference,
            "dropped": difference["high"] < 0,
        }
    report["margin_shift"] = _margin_shift(before["curves"]["margins"], after["curves"]["margins"])
    return report


def _same_rows(baseline: dict, now: dict) -> np.ndarray | None:
    """For each row of `now` its place in `baseline`; None unless both hold the same ids, once each, and labels."""
    if not (baseline.get("rows") and now.get("rows")):
        return None
    place = {row: i for i, row in enumerate(baseline["rows"]["ids"])}
    ids = now["rows"]["ids"]
    if len(place) != len(baseline["rows"]["ids"]) or len(set(ids)) != len(ids) or place.keys() != set(ids):
        return None
    order = np.array([place[row] for row in ids])
    return order if np.array_equal(np.asarray(baseline["rows"]["y"])[order], now["rows"]["y"]) else None


def _unpaired(before: Interval, after: Interval) -> Interval:
    z = float(stats.norm.ppf(0.975))
    errors = [(interval["high"] - interval["low"]) / (2 * z) for interval in (before, after)]
    value, reach = after["value"] - before["value"], z * float(np.hypot(*errors))
    return {"value": round(value, 6), "low": round(value - reach, 6), "high": round(value + reach, 6)}


def _class_counts(result: dict) -> list[int]:
    per_class = result["models"][0]["per_class"]
    counts = result.get("class_counts") or {label: per_class[label]["support"] for label in result["labels"]}
    return [counts[label] for label in result["labels"]]


def _label_shift(before: Sequence[int], after: Sequence[int]) -> dict[str, Any]:
    table = np.array([before, after])
    table = table[:, table.sum(axis=0) > 0]
    statistic, p_value = stats.chi2_contingency(table)[:2] if table.shape[1] > 1 else (0.0, 1.0)
    return _shift(statistic, p_value)


def _margin_shift(before: dict, after: dict) -> dict[str, Any]:
    width = max(before["width"], after["width"])
    reach = min(before["width"], after["width"]) * 63  # above this one of the two no longer tells bins apart
    edges = int(reach / width)
    shares, sizes = [], []
    for histogram in (before, after):
        step = round(width / histogram["width"])
        counts = np.cumsum(np.asarray(histogram["right"]) + np.asarray(histogram["wrong"]))
        shares.append(counts[step - 1 :: step][:edges] / counts[-1])
        sizes.append(counts[-1])
    statistic = float(np.abs(shares[0] - shares[1]).max()) if edges else 1.0
    effective = np.sqrt(sizes[0] * sizes[1] / (sizes[0] + sizes[1]))
    return _shift(statistic, stats.kstwobign.sf(statistic * effective))


def _shift(statistic: float, p_value: float) -> dict[str, Any]:
    return {
        "statistic": round(float(statistic), 6),
        "p_value": round(float(p_value), 6),
        "shifted": bool(p_value < SIGNIFICANCE),
    }
