"""From probabilities to labels: argmax, offsets tuned for a metric, the least expected cost, abstention.

What is fitted here is fitted on dev rows, never on rows that a result is reported for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from common.cli import UserError
from common.evaluation.guarantee import GUARANTEE, guaranteed_threshold, independent_rows

OBJECTIVES = ("accuracy", "macro_f1", "cost")
MAX_OFFSET = 1e6  # nats, or units of cost; beyond, a file is damaged


@dataclass(frozen=True)
class Decision:
    """How probabilities become a label; the default is argmax and an answer for every row.

    Attributes:
        optimize: what the choice was tuned for (`OBJECTIVES`); None is plain argmax.
        offsets: per label, added to the log-probabilities before the argmax.
        costs: costs[true][predicted]; the label with the least expected cost is chosen.
        abstain_below: answer only where the probability of the chosen label is at least this.
        fitted_on: where offsets and threshold come from.
    """

    optimize: str | None = None
    offsets: tuple[float, ...] | None = None
    costs: tuple[tuple[float, ...], ...] | None = None
    abstain_below: float | None = None
    fitted_on: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.optimize is not None and self.optimize not in OBJECTIVES:
            raise ValueError(f"optimize must be one of {', '.join(OBJECTIVES)}")
        for name in ("offsets", "costs"):
            value = getattr(self, name)
            if value is not None and not (np.abs(np.asarray(value, dtype=np.float64)) <= MAX_OFFSET).all():
                raise ValueError(f"{name} must be numbers between -{MAX_OFFSET:g} and {MAX_OFFSET:g}")
        if self.abstain_below is not None and not 0 <= self.abstain_below <= 1:
            raise ValueError("abstain_below must be a probability")

    def check_labels(self, count: int) -> None:
        """Raises ValueError where it was made for another number of labels."""
        if self.offsets is not None and np.shape(self.offsets) != (count,):
            raise ValueError(f"offsets must be {count} numbers, one per label")
        if self.costs is not None and np.shape(self.costs) != (count, count):
            raise ValueError(f"costs must be {count} times {count} numbers")

    def choose(self, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(predictions[n], answered[n]) for probabilities[n, K].

        With costs this is Elkan (2001), eq. 1: the argmin over predictions j of sum_i p(i) costs[i][j].
        """
        if self.costs is not None:
            predictions = (probabilities @ np.asarray(self.costs)).argmin(axis=1)
        else:
            predictions = (log_probabilities(probabilities) + np.asarray(self.offsets or 0.0)).argmax(axis=1)
        confidence = np.take_along_axis(probabilities, predictions[:, None], axis=1)[:, 0]
        return predictions, confidence >= (self.abstain_below or 0.0)


@dataclass(frozen=True)
class Goal:
    """What a decision is to be fitted for.

    Attributes:
        optimize: "accuracy" or "macro_f1" search offsets for each label (`fit_offsets`); "cost" needs `costs`; None:
            argmax.
        costs: costs[true][predicted], K x K.
        abstain_below: a threshold given by hand.
        target_precision: or the lowest threshold that is shown to have this precision (`guaranteed_threshold`).
        guarantee: the probability, over draws of the dev rows, with which fresh answers have it.
    """

    optimize: str | None = None
    costs: Sequence[Sequence[float]] | None = None
    abstain_below: float | None = None
    target_precision: float | None = None
    guarantee: float = GUARANTEE

    def __post_init__(self) -> None:
        """Raises UserError for an unknown objective, costs without "cost" or the reverse, and for both thresholds."""
        if self.abstain_below is not None and self.target_precision is not None:
            raise UserError("--abstain_below and --target_precision exclude each other; give one of them")
        if self.optimize not in (None, *OBJECTIVES):
            raise UserError(f"unknown objective '{self.optimize}'; choose one of {', '.join(OBJECTIVES)}")
        if (self.optimize == "cost") != (self.costs is not None):
            raise UserError("--optimize cost and a cost matrix (--costs) belong together; give both or neither")


def log_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Their logarithms, finite where a probability is 0."""
    return np.log(np.clip(probabilities, np.finfo(np.float64).tiny, None))


def check_labels(y: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """Label indices [n] as int64. Raises UserError where a label has no row."""
    y = np.asarray(y, dtype=np.int64)
    missing = [label for label, count in zip(labels, np.bincount(y, minlength=len(labels)), strict=True) if not count]
    if missing:
        raise UserError(
            f"the calibration rows have no row of class {', '.join(missing)}; give dev rows that cover every label"
        )
    return y


def row_weights(y: np.ndarray, classes: int, class_weight: bool) -> np.ndarray:
    """[n], summing to n: all 1, or such that every class counts the same."""
    if not class_weight:
        return np.ones(len(y))
    counts = np.bincount(y, minlength=classes)
    return (len(y) / (np.count_nonzero(counts) * counts[y])).astype(np.float64)


def fit_decision(
    probabilities: np.ndarray,
    y: np.ndarray,
    labels: Sequence[str],
    goal: Goal,
    class_weight: bool = True,
    groups: Sequence[str] | None = None,
) -> Decision:
    """Choose how to decide from calibrated dev probabilities[n, K].

    Args:
        y: [n] label indices.
        class_weight: weigh the classes equally, as in `calibration.fit_vector_scaling`.
        groups: [n], for `goal.target_precision`: rows of one group may be alike, and count as one.

    Raises:
        UserError: misshapen costs, a label without a dev row, or a precision that is out of reach.
    """
    if goal.optimize is None:
        decision = Decision()
    elif goal.optimize == "cost":
        decision = Decision("cost", costs=check_costs(goal.costs, len(labels)))
    else:
        offsets = fit_offsets(probabilities, check_labels(y, labels), goal.optimize, class_weight)
        decision = Decision(goal.optimize, offsets=tuple(map(float, offsets)))
    abstain_below = goal.abstain_below
    provenance: dict[str, Any] = {
        "rows": len(y),
        "class_weight": class_weight,
        "target_precision": goal.target_precision,
    }
    if goal.target_precision is not None:
        predictions, _ = decision.choose(probabilities)
        rows = independent_rows(y, groups, balance=class_weight)
        confidence = probabilities[np.arange(len(y)), predictions]
        abstain_below = guaranteed_threshold(
            confidence[rows], (predictions == y)[rows], goal.target_precision, goal.guarantee
        )
        provenance |= {"guarantee": goal.guarantee, "independent_rows": len(rows)}
    return replace(decision, abstain_below=abstain_below, fitted_on=provenance)


def check_costs(costs: Sequence[Sequence[float]], classes: int) -> tuple[tuple[float, ...], ...]:
    """A cost matrix as floats. Raises UserError unless it is K x K and finite."""
    try:
        matrix = np.asarray(costs, dtype=np.float64)
    except (TypeError, ValueError):
        matrix = np.empty(0)
    if matrix.shape != (classes, classes) or not np.isfinite(matrix).all():
        raise UserError(
            f"the cost matrix must be {classes} rows (true label) of {classes} numbers (predicted label); mend it"
        )
    return tuple(tuple(map(float, row)) for row in matrix)


def fit_offsets(probabilities: np.ndarray, y: np.ndarray, metric: str, class_weight: bool = True) -> np.ndarray:
    """[K] offsets on the log-probabilities that maximise accuracy or macro-F1 on the rows given.

    Coordinate ascent over K-1 offsets (the last stays 0), each step an exact line search: as the offset of one label
    rises, rows turn to it one after another, so all values that the metric can take are read off cumulative counts.
    Starts at argmax and only ever improves. Of equally good offsets the one nearest to the current is taken.

    Args:
        metric: "accuracy" or "macro_f1".
    """
    y = np.asarray(y, dtype=np.int64)
    log_p = log_probabilities(probabilities)
    rows, classes = log_p.shape
    weights = row_weights(y, classes, class_weight)
    truth = np.bincount(y, weights, minlength=classes)
    offsets = np.zeros(classes)
    for _ in range(20):
        improved = False
        for k in range(classes - 1):
            shifted = log_p + offsets
            shifted[:, k] = -np.inf
            rival = shifted.argmax(axis=1)
            turns = shifted[np.arange(rows), rival] - log_p[:, k]  # the row goes to k once offset k exceeds this
            order = np.argsort(turns)
            turns, rival, true, weight = turns[order], rival[order], y[order], weights[order]
            # row i of given and hits: answers and right answers per label when the first i rows have turned to k
            given = np.zeros((rows + 1, classes))
            hits = np.zeros((rows + 1, classes))
            given[np.arange(1, rows + 1), rival] = weight
            hits[np.arange(1, rows + 1), rival] = weight * (rival == true)
            given, hits = np.cumsum(given, axis=0), np.cumsum(hits, axis=0)
            given, hits = given[-1] - given, hits[-1] - hits
            given[1:, k] = np.cumsum(weight)
            hits[1:, k] = np.cumsum(weight * (true == k))
            if metric == "accuracy":
                value = hits.sum(axis=1) / weights.sum()
            else:
                value = (2 * hits / np.maximum(given + truth, 1e-12)).mean(axis=1)
            # an offset between two turning points; rows that turn at the same point cannot be told apart
            edges = np.concatenate([[turns[0] - 1], turns, [turns[-1] + 1]])
            value = np.where(edges[1:] > edges[:-1], value, -np.inf)
            if value.max() > value[np.searchsorted(turns, offsets[k])] + 1e-9:
                ties = np.flatnonzero(value >= value.max() - 1e-12)
                middle = (edges[ties] + edges[ties + 1]) / 2
                offsets[k] = middle[np.abs(middle - offsets[k]).argmin()]
                improved = True
        if not improved:
            break
    return offsets
