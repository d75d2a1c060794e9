"""What a student keeps of its teacher: figures of several models on the same rows, with paired bootstrap intervals.

Every figure is a function of sums over rows, as in `common.evaluation.bootstrap`: the same resamples serve all models,
so retention (student / teacher) and the share of the gap closed ((student - base) / (teacher - base)) are paired, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from common.evaluation import bootstrap
from common.evaluation.bootstrap import Interval


@dataclass(frozen=True)
class Measure:
    """One figure of quality.

    Attributes:
        key, heading, meaning: its name in results, in tables and in words.
        value: sums of a model's features over rows [R, F] -> the figure [R].
        lower_is_better: as perplexity.
        linear: the scale on which a gap has a meaningful share: the figure itself, for perplexity its logarithm.
    """

    key: str
    heading: str
    meaning: str
    value: Callable[[np.ndarray], np.ndarray]
    lower_is_better: bool = False
    linear: Callable[[np.ndarray], np.ndarray] = np.asarray


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


ACCURACY = Measure("accuracy", "accuracy", "share of rows labelled correctly", _ratio)
EXACT_MATCH = Measure("exact_match", "exact match", "share of answers that are a gold answer", _ratio)
F1 = Measure("f1", "F1", "of the words shared with the nearest gold answer, averaged over questions", _ratio)
PERPLEXITY = Measure(
    "perplexity",
    "perplexity",
    "exp of the mean surprise at a token of the text, every token counting alike; lower is better",
    lambda sums: np.exp(_ratio(sums)),
    lower_is_better=True,
    linear=np.log,
)
BITS_PER_BYTE = Measure(
    "bits_per_byte",
    "bits/byte",
    "surprise at the text by its length in bytes, whatever the tokenizer; lower is better",
    lambda sums: _ratio(sums) / math.log(2),
    lower_is_better=True,
)


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    hits, predicted, true = np.split(sums, 3, axis=1)
    either = predicted + true
    return np.divide(2 * hits, either, out=np.zeros_like(hits), where=either > 0).mean(axis=1)


MACRO_F1 = Measure("macro_f1", "macro-F1", "F1 averaged over the labels", _macro_f1)


def means(scores: Sequence[float]) -> np.ndarray:
    """[n, 2] features of a mean over rows (accuracy, exact match, F1)."""
    return np.stack([np.asarray(scores, dtype=np.float64), np.ones(len(scores))], axis=1)


def hits(predictions: Sequence[int], y: Sequence[int], classes: int) -> np.ndarray:
    """[n, 3 classes] features of macro-F1: right, predicted and true labels."""
    one_hot = np.eye(classes)
    predicted, true = one_hot[np.asarray(predictions)], one_hot[np.asarray(y)]
    return np.concatenate([predicted * true, predicted, true], axis=1)


def figures(
    measure: Measure, features: Mapping[str, np.ndarray], groups: Sequence[str], seed: int = 0
) -> dict[str, dict[str, Any]]:
    """A measure of all models.

    Args:
        features: by role ("teacher", "student" and perhaps "base") [n, F], what each row adds to the sums.
        groups: of each row; whole groups are resampled.

    Returns:
        By role "value"; of all but the teacher "difference" to the teacher and "retention", the figure as a share of
        the teacher's (the other way round where lower is better); with a base, of the student and the teacher "gain",
        the difference to the base, and of the student "gap_closed". All are intervals; a share is None where some
        resample leaves nothing to take a share of.
    """
    units, count = bootstrap.unit_of_rows(groups, len(groups))
    point, samples = {}, {}
    for role, of_rows in features.items():
        sums = bootstrap.sum_units(sparse.csr_matrix(of_rows), units, count)
        point[role] = measure.value(np.asarray(sums.sum(axis=0)).reshape(1, -1))
        samples[role] = measure.value(bootstrap.resample(sums, seed, bootstrap.REPLICATES))

    def interval(of: Callable[[dict[str, np.ndarray]], np.ndarray]) -> Interval:
        return bootstrap.interval(of(point)[0], of(samples))

    def difference(one: str, other: str) -> Interval:
        return interval(lambda values: values[one] - values[other])

    def share(part: Callable[[dict], np.ndarray], whole: Callable[[dict], np.ndarray]) -> Interval | None:
        return interval(lambda values: part(values) / whole(values)) if (whole(samples) > 0).all() else None

    def lead(values: dict[str, np.ndarray], role: str) -> np.ndarray:
        """How much better than the base, on the linear scale."""
        ahead = measure.linear(values[role]) - measure.linear(values["base"])
        return -ahead if measure.lower_is_better else ahead

    intervals: dict[str, dict[str, Any]] = {
        role: {"value": interval(lambda v, role=role: v[role])} for role in features
    }
    for role in features.keys() - {"teacher"}:
        part, whole = ("teacher", role) if measure.lower_is_better else (role, "teacher")
        intervals[role]["difference"] = difference(role, "teacher")
        intervals[role]["retention"] = share(lambda v, part=part: v[part], lambda v, whole=whole: v[whole])
    if "base" in features:
        intervals["student"]["gain"] = difference("student", "base")
        intervals["teacher"]["gain"] = difference("teacher", "base")
        intervals["student"]["gap_closed"] = share(lambda v: lead(v, "student"), lambda v: lead(v, "teacher"))
    return intervals


def worse(measure: Measure, difference: Interval) -> bool:
    """Whether a difference's whole interval is a loss."""
    return difference["low"] > 0 if measure.lower_is_better else difference["high"] < 0
