"""From label log-likelihoods to probabilities and decisions: prior, batch and fitted calibration, abstention.

    raw[n, K]      label log-likelihoods, in nats
    score          raw - prior + bias
    probabilities  softmax(score / temperature)
    prediction     argmax of the probabilities, unless a `Decision` says otherwise
    top2_margin    best score minus second-best score

Everything that is fitted here is fitted on dev rows, never on rows that a result is reported for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax

from common.cli import UserError
from common.files import read_json, write_json

METHODS = ("none", "prior", "batch", "fitted")
OBJECTIVES = ("accuracy", "macro_f1", "cost")
FORMAT_VERSION = 1

PRIOR_SD = 10.0  # nats: how far a fit may drift from "no change" when the rows alone would let it go to infinity
MIN_SCALE = 0.01  # of a score's spread: keeps the temperature positive and finite when the scores say nothing
MIN_ANSWERED = 30  # a precision measured on fewer answers than this is no ground for a threshold


@dataclass(frozen=True)
class Scores:
    """What a calibration makes of `raw[n, K]`.

    Attributes:
        scores: [n, K] calibrated scores in nats.
        probabilities: [n, K], rows sum to 1.
        predictions: [n] label indices, filled for every row.
        answered: [n] False where the decision abstains.
        top2_margin: [n] best minus second-best score in nats.
    """

    scores: np.ndarray
    probabilities: np.ndarray
    predictions: np.ndarray
    answered: np.ndarray
    top2_margin: np.ndarray


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

    def choose(self, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(predictions[n], answered[n]) for probabilities[n, K].

        With costs this is Elkan (2001), eq. 1: the argmin over predictions j of sum_i p(i) costs[i][j].
        """
        if self.costs is not None:
            predictions = (probabilities @ np.asarray(self.costs)).argmin(axis=1)
        else:
            predictions = (_log(probabilities) + np.asarray(self.offsets or 0.0)).argmax(axis=1)
        confidence = np.take_along_axis(probabilities, predictions[:, None], axis=1)[:, 0]
        return predictions, confidence >= (self.abstain_below or 0.0)


@dataclass(frozen=True)
class Calibration:
    """The map from raw label log-likelihoods to scores and probabilities, and how they are decided on.

    Attributes:
        labels: the K labels, in the order of raw's columns.
        method: one of `METHODS`.
        prior: [K] what the model gives each label before it sees the row; zeros for "none".
        bias: [K] fitted or hand-set offset of each label.
        temperature: above 0.
        decision: how a label is chosen.
        fitted_on: provenance of a fit (file, rows, likelihoods), None where nothing was fitted.
    """

    labels: tuple[str, ...]
    method: str = "none"
    prior: tuple[float, ...] = ()
    bias: tuple[float, ...] = ()
    temperature: float = 1.0
    decision: Decision = field(default_factory=Decision)
    fitted_on: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        for name in ("prior", "bias"):
            vector = tuple(float(value) for value in getattr(self, name)) or (0.0,) * len(self.labels)
            if len(vector) != len(self.labels) or not np.isfinite(vector).all():
                raise ValueError(f"{name} must be {len(self.labels)} finite numbers, one per label")
            object.__setattr__(self, name, vector)
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}")
        if not (0 < self.temperature < np.inf):
            raise ValueError("temperature must be a number above 0")

    def apply(self, raw: np.ndarray) -> Scores:
        """Scores, probabilities and decisions for raw[n, K].

        Raises:
            UserError: a log-likelihood is not a finite number.
        """
        raw = np.asarray(raw, dtype=np.float64)
        broken = np.flatnonzero(~np.isfinite(raw).all(axis=1))
        if broken.size:
            raise UserError(
                f"row {broken[0] + 1} has a label score that is not a finite number; "
                "the weights are damaged or overflow in this precision, so try the model in float32 or train it again"
            )
        scores = raw - np.asarray(self.prior) + np.asarray(self.bias)
        probabilities = softmax(scores / self.temperature, axis=1)
        predictions, answered = self.decision.choose(probabilities)
        best_two = np.partition(scores, -2, axis=1)[:, -2:]
        return Scores(scores, probabilities, predictions, answered, best_two[:, 1] - best_two[:, 0])

    def with_label_bias(self, offsets: Mapping[str, float]) -> Calibration:
        """This calibration with hand-set offsets (nats) on top of its bias. Raises UserError for an unknown label."""
        unknown = sorted(set(offsets) - set(self.labels))
        if unknown:
            raise UserError(f"--label_bias: unknown label '{unknown[0]}'; the labels are {', '.join(self.labels)}")
        bias = [value + offsets.get(label, 0.0) for label, value in zip(self.labels, self.bias, strict=True)]
        return replace(self, bias=tuple(bias))

    def save(self, path: str | Path) -> None:
        """Write JSON, atomically."""
        content = {"version": FORMAT_VERSION, **asdict(self), "labels": list(self.labels)}
        for name in ("prior", "bias"):
            content[name] = dict(zip(self.labels, getattr(self, name), strict=True))
        write_json(path, content)

    @classmethod
    def load(cls, path: str | Path, labels: Sequence[str] | None = None) -> Calibration:
        """Read what `save` wrote.

        Args:
            labels: the labels of the task at hand, in order.

        Raises:
            UserError: missing, broken, of another version, or fitted for other labels.
        """
        remedy = "fit it again with eval_creditmix.py --fit_calibration DEV.jsonl, or pass --calibration prior"
        content = read_json(path)
        try:
            if content.pop("version") != FORMAT_VERSION:
                raise ValueError("another version")
            for name in ("prior", "bias"):
                content[name] = tuple(content[name][label] for label in content["labels"])
            decision = content.pop("decision")
            if decision["costs"] is not None:
                decision["costs"] = tuple(map(tuple, decision["costs"]))
            if decision["offsets"] is not None:
                decision["offsets"] = tuple(decision["offsets"])
            calibration = cls(**content, decision=Decision(**decision))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a calibration file of this version ({error}); {remedy}") from error
        if labels is not None and calibration.labels != tuple(labels):
            raise UserError(
                f"{path} was fitted for the labels {', '.join(calibration.labels)}, not {', '.join(labels)}; {remedy}"
            )
        return calibration


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.clip(probabilities, np.finfo(np.float64).tiny, None))


def _check_labels(y: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    y = np.asarray(y, dtype=np.int64)
    missing = [label for label, count in zip(labels, np.bincount(y, minlength=len(labels)), strict=True) if not count]
    if missing:
        raise UserError(
            f"the calibration rows have no row of class {', '.join(missing)}; give dev rows that cover every label"
        )
    return y


def _row_weights(y: np.ndarray, classes: int, class_weight: bool) -> np.ndarray:
    """[n], summing to n: all 1, or such that every class counts the same."""
    if not class_weight:
        return np.ones(len(y))
    counts = np.bincount(y, minlength=classes)
    return (len(y) / (np.count_nonzero(counts) * counts[y])).astype(np.float64)


def fit_vector_scaling(
    raw: np.ndarray,
    y: np.ndarray,
    labels: Sequence[str],
    class_weight: bool = True,
    prior: Sequence[float] = (),
    fitted_on: Mapping[str, Any] | None = None,
) -> Calibration:
    """Per-class bias and one shared temperature by maximum likelihood (Guo et al. 2017, section 4.2).

    Vector scaling with the diagonal matrix tied to one number: probabilities = softmax(raw / T + c). In 1/T and c the
    negative log-likelihood is convex. A wide Gaussian (sd `PRIOR_SD`) centred on the calibration by `prior` alone keeps
    separable rows finite; because it is centred there, the fit never has a lower likelihood than where it started.

    The prior cancels: whatever it is, the fitted bias takes it back, so probabilities and decisions do not depend on
    it. It is stored all the same, because answers show it.

    Args:
        raw: [n, K] label log-likelihoods, in nats.
        y: [n] label indices.
        class_weight: weigh the classes equally (results are reported on balanced draws); False keeps the classes as
            frequent as they are in `y`, for use on rows like those.
        prior: [K] the null-prompt prior that answers will show.
        fitted_on: provenance to store, e.g. file and SHA-256; rows and likelihoods are added.

    Raises:
        UserError: a label has no row.
    """
    y = _check_labels(y, labels)
    raw = np.asarray(raw, dtype=np.float64)
    rows, classes = raw.shape
    weights = _row_weights(y, classes, class_weight) / rows
    prior_vector = np.asarray(prior if len(prior) else np.zeros(classes), dtype=np.float64)
    centred = raw - raw.mean(axis=1, keepdims=True)  # softmax ignores what all labels share
    scale = max(float(centred.std()), 1e-6)  # so that the same step and the same sd suit sharp and flat models
    centred /= scale
    targets = np.eye(classes)[y]
    start = np.concatenate([[scale], -prior_vector + prior_vector.mean()])

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean weighted negative log-likelihood plus the Gaussian's pull, and the gradient."""
        slope, offsets = parameters[0], parameters[1:]
        log_p = log_softmax(slope * centred + offsets, axis=1)
        residual = (np.exp(log_p) - targets) * weights[:, None]
        pull = (parameters - start) / (PRIOR_SD**2 * rows)
        value = -(weights * log_p[np.arange(rows), y]).sum() + 0.5 * float(pull @ (parameters - start))
        return value, np.concatenate([[(residual * centred).sum()], residual.sum(axis=0)]) + pull

    bounds = [(min(MIN_SCALE, scale), None)] + [(None, None)] * classes
    fit = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-12, "maxiter": 1000})
    temperature = scale / float(fit.x[0])
    bias = fit.x[1:] * temperature + prior_vector  # from the softmax argument to score units
    bias -= bias.mean()
    calibration = Calibration(tuple(labels), "fitted", tuple(prior_vector), tuple(bias), temperature)

    def likelihood(some: Calibration) -> float:
        return float(-(weights * _log(some.apply(raw).probabilities)[np.arange(rows), y]).sum())

    before = Calibration(tuple(labels), "prior", tuple(prior_vector))
    counts = np.bincount(y, minlength=classes)
    provenance = {
        **(fitted_on or {}),
        "rows": rows,
        "rows_per_class": {label: int(count) for label, count in zip(labels, counts, strict=True)},
        "class_weight": class_weight,
        "nll_before": round(likelihood(before), 6),
        "nll_after": round(likelihood(calibration), 6),
    }
    return replace(calibration, fitted_on=provenance)


def batch_calibration(raw: np.ndarray, labels: Sequence[str]) -> Calibration:
    """Batch Calibration (Zhou et al., ICLR 2024): the batch itself, unlabelled, is the content-free input.

    The contextual prior is the mean over rows of p(label | row), and p(label | row) is divided by it; in log space
    its logarithm takes the place of the null-prompt prior. The probabilities are normalised over the labels first.
    It evens out how often each label is given, so it suits batches in which labels are about equally frequent.

    Args:
        raw: [n, K] label log-likelihoods of the rows that are to be labelled.

    Raises:
        UserError: fewer than two rows.
    """
    raw = np.asarray(raw, dtype=np.float64)
    if len(raw) < 2:
        raise UserError("--calibration batch needs at least two rows to estimate from; use --calibration prior for one")
    prior = logsumexp(log_softmax(raw, axis=1), axis=0) - np.log(len(raw))
    return Calibration(tuple(labels), "batch", tuple(prior), fitted_on={"rows": len(raw), "labelled": False})


def fit_decision(
    probabilities: np.ndarray,
    y: np.ndarray,
    labels: Sequence[str],
    optimize: str | None = None,
    costs: Sequence[Sequence[float]] | None = None,
    abstain_below: float | None = None,
    target_precision: float | None = None,
    class_weight: bool = True,
) -> Decision:
    """Choose how to decide from calibrated dev probabilities[n, K].

    Args:
        optimize: "accuracy" or "macro_f1" search per-label offsets (`fit_offsets`); "cost" needs `costs`; None: argmax.
        costs: costs[true][predicted], K x K.
        abstain_below: a threshold given by hand.
        target_precision: or the threshold that reaches this precision on the dev rows (`threshold_for_precision`).
        class_weight: weigh the classes equally, as in `fit_vector_scaling`.

    Raises:
        UserError: unknown objective, costs missing or misshapen, both thresholds given, a label without a dev row, or
            a precision that is out of reach.
    """
    if abstain_below is not None and target_precision is not None:
        raise UserError("a threshold and a target precision exclude each other; give one of them")
    if (optimize == "cost") != (costs is not None):
        raise UserError("--optimize cost and a cost matrix belong together; give both or neither")
    if optimize is None:
        decision = Decision()
    elif optimize == "cost":
        decision = Decision("cost", costs=check_costs(costs, len(labels)))
    elif optimize in OBJECTIVES:
        offsets = fit_offsets(probabilities, _check_labels(y, labels), optimize, class_weight)
        decision = Decision(optimize, offsets=tuple(map(float, offsets)))
    else:
        raise UserError(f"unknown objective '{optimize}'; choose one of {', '.join(OBJECTIVES)}")
    if target_precision is not None:
        predictions, _ = decision.choose(probabilities)
        abstain_below = threshold_for_precision(probabilities, y, target_precision, predictions, class_weight)
    provenance = {"rows": len(y), "class_weight": class_weight, "target_precision": target_precision}
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
    log_p = _log(probabilities)
    rows, classes = log_p.shape
    weights = _row_weights(y, classes, class_weight)
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


def threshold_for_precision(
    probabilities: np.ndarray,
    y: np.ndarray,
    target: float,
    predictions: np.ndarray | None = None,
    class_weight: bool = True,
) -> float:
    """The lowest threshold on the chosen label's probability at which the answered rows are right `target` of the time.

    It holds for rows like those given, up to the noise of a sample; the evaluator reports what it does elsewhere.

    Args:
        probabilities: [n, K].
        target: precision over the answered rows, between 0 and 1.
        predictions: [n] chosen labels; argmax when None.

    Raises:
        UserError: no threshold with at least `MIN_ANSWERED` answers reaches it; says what is within reach.
    """
    y = np.asarray(y, dtype=np.int64)
    predictions = probabilities.argmax(axis=1) if predictions is None else predictions
    confidence = probabilities[np.arange(len(y)), predictions]
    order = np.argsort(-confidence, kind="stable")
    weights = _row_weights(y, probabilities.shape[1], class_weight)[order]
    precision = np.cumsum(weights * (predictions == y)[order]) / np.cumsum(weights)
    ranked = confidence[order]
    cut = np.append(ranked[1:] < ranked[:-1], True)  # equal confidences stand or fall together
    cut[: MIN_ANSWERED - 1] = False
    if not cut.any():
        raise UserError(f"a target precision needs at least {MIN_ANSWERED} dev rows, not {len(y)}; give more of them")
    reached = np.flatnonzero(cut & (precision >= target))
    if not reached.size:
        raise UserError(
            f"no threshold reaches a precision of {target:g} on the dev rows (the best is {precision[cut].max():.3f}); "
            "ask for less"
        )
    return float(ranked[reached[-1]])
