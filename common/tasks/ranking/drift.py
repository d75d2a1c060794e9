"""Drift: whether a stored result of an evaluator and a new one differ significantly."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy import stats

from common.cli import UserError
from common.evaluation.bootstrap import Interval
from common.tasks.ranking.calibration import Scores
from common.tasks.ranking.metrics import compare

SIGNIFICANCE = 0.05


def drift(baseline: dict[str, Any], now: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Compare two results of an evaluator (the content of two `metrics.json`), model by model.

    Where both hold the same rows (`rows.ids`, and each model's `predictions`) the differences are paired; else each
    result's interval gives its standard error and the two are taken as independent. A drop is significant when the
    95 % interval of (now - before) lies below 0. Label shift is a chi-square test on the class counts (`class_counts`
    of the file where the result has them, else the evaluated rows, which say nothing if they were drawn balanced);
    margin shift is a two-sample Kolmogorov-Smirnov test on the stored histograms, conservative because binned. Shifts
    are reported; only a drop counts as drift.

    Models are matched by `model_dir`; a single model on both sides is matched whatever it is called. Controls are left
    out.

    Returns:
        {"drifted": bool, "label_shift": {statistic, p_value, shifted}, "models": [{"model_dir", "paired",
        "accuracy" and "macro_f1": {"before", "now", "difference": {value, low, high}, "dropped"}, "margin_shift"}]}

    Raises:
        UserError: the results have different labels, no model in common, or `baseline` is not a result.
    """
    with _of_this_evaluator():
        pairs = _matched(baseline, now)
        order = _same_rows(baseline, now)
        models = [_model_drift(before, after, baseline, now, order, seed) for before, after in pairs]
        label_shift = _label_shift(_class_counts(baseline), _class_counts(now))
    dropped = any(model[name]["dropped"] for model in models for name in ("accuracy", "macro_f1"))
    return {"drifted": dropped, "label_shift": label_shift, "models": models}


def check_baseline(baseline: Any, labels: Sequence[str], model_dirs: Sequence[str]) -> None:
    """Refuse, before any scoring, a baseline that a result of these models on these labels cannot be compared with.

    It is compared with itself, which finds what it lacks.

    Raises:
        UserError: see `drift`.
    """
    with _of_this_evaluator():
        pairs = _matched(baseline, {"labels": list(labels), "models": [{"model_dir": name} for name in model_dirs]})
        for order in (None, _same_rows(baseline, baseline)):  # as other rows and as the same
            for before, _ in pairs:
                _model_drift(before, before, baseline, baseline, order, seed=0)
        _label_shift(_class_counts(baseline), _class_counts(baseline))


@contextlib.contextmanager
def _of_this_evaluator() -> Iterator[None]:
    """Raises UserError where a baseline lacks what is read of it, or has something else there."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the baseline is not a metrics.json of this evaluator ({error}); write one with --report_dir"
        ) from error


def _matched(baseline: dict[str, Any], now: dict[str, Any]) -> list[tuple[dict, dict]]:
    """Each model of `now` with what `baseline` has of it. Raises UserError where labels or all models are others."""
    if baseline["labels"] != now["labels"]:
        raise UserError(
            f"the baseline has the labels {', '.join(baseline['labels'])}, this result {', '.join(now['labels'])}; "
            "compare results of the same task"
        )
    models_now = [model for model in now["models"] if not model.get("control")]
    before_models = {model["model_dir"]: model for model in baseline["models"] if not model.get("control")}
    if len(before_models) == len(models_now) == 1:
        return [(next(iter(before_models.values())), models_now[0])]
    pairs = [(before_models[m["model_dir"]], m) for m in models_now if m["model_dir"] in before_models]
    if not pairs:
        raise UserError(f"the baseline has other models ({', '.join(before_models)}); evaluate one of them")
    return pairs


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
    report["margin_shift"] = margin_shift(before["curves"]["margins"], after["curves"]["margins"])
    return report


def _same_rows(baseline: dict, now: dict) -> np.ndarray | None:
    """For each row of `now` its place in `baseline`; None unless both hold the same ids with the same labels."""
    if not (baseline.get("rows") and now.get("rows")):
        return None
    index_of = {key: index for index, key in enumerate(_keys(baseline["rows"]))}
    keys = _keys(now["rows"])
    return np.array([index_of[key] for key in keys]) if index_of.keys() == set(keys) else None


def _keys(rows: dict) -> list[tuple[str, int, int]]:
    """(id, label, how many of both were before) of each row: a text that occurs twice is two rows."""
    seen: Counter[tuple[str, int]] = Counter()
    keys = []
    for pair in zip(rows["ids"], rows["y"], strict=True):
        keys.append((*pair, seen[pair]))
        seen[pair] += 1
    return keys


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


def margin_shift(before: dict, after: dict) -> dict[str, Any]:
    """A two-sample Kolmogorov-Smirnov test of two histograms of `metrics.margin_histogram`, brought to the same bins.

    Returns:
        {"statistic", "p_value", "shifted"}.
    """
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
