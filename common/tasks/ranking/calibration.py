"""From label log-likelihoods to scores and probabilities: prior, batch and fitted calibration.

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
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax

from common.cli import UserError
from common.files import read_json, write_json
from common.tasks.ranking.decision import MAX_OFFSET, Decision, check_labels, log_probabilities, row_weights

METHODS = ("none", "prior", "batch", "fitted")
FORMAT_VERSION = 1

PRIOR_SD = 10.0  # nats: how far a fit may drift from "no change" when the rows alone would let it go to infinity
MIN_SCALE = 0.01  # of a score's spread: keeps the temperature positive and finite when the scores say nothing


def default_method(trained: bool) -> str:
    """What is subtracted where nothing was fitted: nothing of a model that was trained for the task, else its prior.

    A base says some labels sooner than others whatever it is asked, and content-free prompts show which; training
    removes that, and makes of such prompts rows like none that were trained on. docs/calibration.md has the figures.
    """
    return "none" if trained else "prior"


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

    @classmethod
    def of(cls, probabilities: np.ndarray) -> Scores:
        """Those of probabilities[n, K] alone: their logarithms, their argmax, an answer for every row."""
        log_p = log_probabilities(probabilities)
        return cls(log_p, probabilities, probabilities.argmax(axis=1), np.ones(len(log_p), dtype=bool), margins(log_p))


def margins(scores: np.ndarray) -> np.ndarray:
    """[n] best minus second-best of scores[n, K]."""
    best_two = np.partition(scores, -2, axis=1)[:, -2:]
    return best_two[:, 1] - best_two[:, 0]


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
            if len(vector) != len(self.labels) or not (np.abs(vector) <= MAX_OFFSET).all():
                raise ValueError(f"{name} must be {len(self.labels)} finite numbers, one per label")
            object.__setattr__(self, name, vector)
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}")
        if not (1 / MAX_OFFSET <= self.temperature <= MAX_OFFSET):
            raise ValueError(f"temperature must be a number above 0, from {1 / MAX_OFFSET:g} to {MAX_OFFSET:g}")
        if self.fitted_on is not None and not isinstance(self.fitted_on, dict):
            raise ValueError("fitted_on must be a mapping")
        self.decision.check_labels(len(self.labels))

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
        return Scores(scores, probabilities, predictions, answered, margins(scores))

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
        remedy = "fit it again with eval_creditmix.py --fit_calibration DEV.jsonl, or pass --calibration none"
        content = read_json(path)
        try:
            if content.pop("version") != FORMAT_VERSION:
                raise ValueError("another version")
            if not all(isinstance(label, str) for label in content["labels"]):
                raise ValueError("its labels are no texts")
            for name in ("prior", "bias"):
                content[name] = tuple(content[name][label] for label in content["labels"])
            decision = content.pop("decision")
            if decision["costs"] is not None:
                decision["costs"] = tuple(map(tuple, decision["costs"]))
            if decision["offsets"] is not None:
                decision["offsets"] = tuple(decision["offsets"])
            calibration = cls(**content, decision=Decision(**decision))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path} is not a calibration file of this version ({error}); {remedy}") from error
        if labels is not None and calibration.labels != tuple(labels):
            raise UserError(
                f"{path} was fitted for the labels {', '.join(calibration.labels)}, not {', '.join(labels)}; {remedy}"
            )
        return calibration


def fit_vector_scaling(
    raw: np.ndarray,
    y: np.ndarray,
    labels: Sequence[str],
    class_weight: bool = True,
    prior: Sequence[float] = (),
    fitted_on: Mapping[str, Any] | None = None,
    before: str = "prior",
) -> Calibration:
    """Per-class bias and one shared temperature by maximum likelihood (Guo et al. 2017, section 4.2).

    Vector scaling with the diagonal matrix tied to one number: probabilities = softmax(raw / T + c). In 1/T and c the
    negative log-likelihood is convex. A wide Gaussian (sd `PRIOR_SD`) centred on the calibration `before` keeps
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
        before: "none" or "prior": what the fit begins from, and is compared with.

    Raises:
        UserError: a label has no row.
    """
    y = check_labels(y, labels)
    raw = np.asarray(raw, dtype=np.float64)
    rows, classes = raw.shape
    weights = row_weights(y, classes, class_weight) / rows
    prior_vector = np.asarray(prior if len(prior) else np.zeros(classes), dtype=np.float64)
    centred = raw - raw.mean(axis=1, keepdims=True)  # softmax ignores what all labels share
    scale = max(float(centred.std()), 1e-6)  # so that the same step and the same sd suit sharp and flat models
    centred /= scale
    begin = Calibration(tuple(labels), before, tuple(prior_vector) if before == "prior" else ())
    start = np.concatenate([[scale], np.mean(begin.prior) - begin.prior])
    slope, *offsets = _most_likely(centred, y, weights, start)
    temperature = scale / float(slope)
    bias = np.array(offsets) * temperature + prior_vector  # from the softmax argument to score units
    bias -= bias.mean()
    calibration = Calibration(tuple(labels), "fitted", tuple(prior_vector), tuple(bias), temperature)

    def likelihood(calibration: Calibration) -> float:
        return float(-(weights * log_probabilities(calibration.apply(raw).probabilities)[np.arange(rows), y]).sum())

    counts = np.bincount(y, minlength=classes)
    provenance = {
        **(fitted_on or {}),
        "rows": rows,
        "rows_per_class": {label: int(count) for label, count in zip(labels, counts, strict=True)},
        "class_weight": class_weight,
        "before": before,
        "nll_before": round(likelihood(begin), 6),
        "nll_after": round(likelihood(calibration), 6),
    }
    return replace(calibration, fitted_on=provenance)


def _most_likely(scores: np.ndarray, y: np.ndarray, weights: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The slope (1/T, first) and offsets of the labels that explain `y` best, with the Gaussian centred on `start`.

    Args:
        scores: [n, K], of mean 0 in each row and of one scale.
        weights: [n], which sum to 1.
    """
    rows, classes = scores.shape
    targets = np.eye(classes)[y]

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean weighted negative log-likelihood plus the Gaussian's pull, and the gradient."""
        slope, offsets = parameters[0], parameters[1:]
        log_p = log_softmax(slope * scores + offsets, axis=1)
        residual = (np.exp(log_p) - targets) * weights[:, None]
        pull = (parameters - start) / (PRIOR_SD**2 * rows)
        value = -(weights * log_p[np.arange(rows), y]).sum() + 0.5 * float(pull @ (parameters - start))
        return value, np.concatenate([[(residual * scores).sum()], residual.sum(axis=0)]) + pull

    bounds = [(min(MIN_SCALE, float(start[0])), None)] + [(None, None)] * classes
    options = {"ftol": 1e-12, "maxiter": 1000}
    return minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x


def fit_temperature(raw: np.ndarray, y: np.ndarray, class_weight: bool = True) -> float:
    """The temperature of softmax(raw / T) alone that explains `y` best, from 1/1000 to 1000 (Guo et al. 2017).

    Args:
        raw: [n, K] label log-likelihoods, in nats.
        y: [n] label indices.
        class_weight: as in `fit_vector_scaling`.
    """
    raw = np.asarray(raw, dtype=np.float64)
    rows, classes = raw.shape
    weights = row_weights(y, classes, class_weight)

    def loss(log_temperature: float) -> float:
        log_p = log_softmax(raw / np.exp(log_temperature), axis=1)
        return -float(weights @ log_p[np.arange(rows), y])

    limit = float(np.log(1000))
    return float(np.exp(minimize_scalar(loss, bounds=(-limit, limit), method="bounded").x))


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
        raise UserError("--calibration batch needs at least two rows to estimate from; leave --calibration out for one")
    prior = logsumexp(log_softmax(raw, axis=1), axis=0) - np.log(len(raw))
    return Calibration(tuple(labels), "batch", tuple(prior), fitted_on={"rows": len(raw), "labelled": False})
