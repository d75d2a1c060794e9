"""Whether confidences are what they say: bins of confidence, the error that they leave, and the diagram of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from common.evaluation import plots

BINS = 15


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """Bin m of `BINS` holds confidences in ((m - 1) / BINS, m / BINS]."""
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


def reliability_bins(confidence: np.ndarray, right: np.ndarray) -> dict[str, list]:
    """Per confidence bin: rows, mean confidence and accuracy (None where the bin is empty).

    Args:
        confidence: [n], between 0 and 1.
        right: [n], whether the answer is.
    """
    bins = bin_of(confidence)
    count = np.bincount(bins, minlength=BINS)

    def means(values: np.ndarray) -> list[float | None]:
        totals = np.bincount(bins, values, minlength=BINS)
        return [round(total / rows, 6) if rows else None for total, rows in zip(totals, count, strict=True)]

    return {
        "count": count.tolist(),
        "confidence": means(confidence),
        "accuracy": means(np.asarray(right, dtype=np.float64)),
    }


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean distance of confidence and accuracy over bins, by their rows (Guo et al. 2017, arXiv:1706.04599)."""
    gaps = np.bincount(bin_of(confidence), np.asarray(right, dtype=np.float64) - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / max(1, len(confidence)))


def auroc(confidence: np.ndarray, right: np.ndarray) -> float | None:
    """The chance that a right answer has more confidence than a wrong one; None where there are not both."""
    right = np.asarray(right, dtype=bool)
    positive, negative = int(right.sum()), int((~right).sum())
    if not positive or not negative:
        return None
    ranks = rankdata(confidence)[right].sum()
    return float((ranks - positive * (positive + 1) / 2) / (positive * negative))


@dataclass(frozen=True)
class Curve:
    """What a diagram shows of one set of confidences: `reliability_bins`, and how it is drawn."""

    bins: dict[str, list]
    label: str
    colour: str
    marker: str
    filled: bool = True


def diagram(curves: Sequence[Curve], what: str, rows: str = "rows") -> bytes:
    """Accuracy against confidence over the number of rows in each bin, as a PNG.

    Args:
        what: the label of the confidence axis.
        rows: what is counted.
    """
    figure = plots.new_figure(plots.HEIGHT, plots.NARROW)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    axes.plot([0, 1], [0, 1], color=plots.INK, linewidth=1, linestyle=(0, (4, 4)), alpha=0.6)
    for curve in curves:
        bins = curve.bins
        filled = [i for i, count in enumerate(bins["count"]) if count]
        total = sum(bins["count"])
        confidence = [bins["confidence"][i] for i in filled]
        accuracy = [bins["accuracy"][i] for i in filled]
        sizes = [12 + 170 * bins["count"][i] / total for i in filled]  # a dot of few rows should not shout
        axes.plot(confidence, accuracy, color=curve.colour, linewidth=1.4)
        axes.scatter(
            confidence, accuracy, s=sizes, color=curve.colour, marker=curve.marker, label=curve.label, zorder=3
        )
        width = 1 / len(bins["count"])
        lefts = [i * width for i in range(len(bins["count"]))]
        below.stairs(bins["count"], [*lefts, 1.0], color=curve.colour, fill=curve.filled, alpha=0.75, linewidth=1.4)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    legend = figure.legend(frameon=False, loc="outside upper left", labelcolor=plots.INK, fontsize=9)
    for handle in legend.legend_handles:
        handle.set_sizes([36])
    plots.tidy(axes, "", "share that is right")
    plots.tidy(below, what, rows)
    return plots.png(figure)
