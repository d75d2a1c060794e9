"""Bootstrap intervals over rows or whole groups: sums per unit of resampling, replicates as weighted sums of those."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from common.cli import UserError

Interval = dict[str, float]

REPLICATES = 1000
DRAWS_AT_ONCE = 4_000_000  # bounds the memory of a bootstrap, whatever the number of rows


def mean_interval(
    values: Sequence[float], groups: Sequence[str] | None = None, seed: int = 0, replicates: int = REPLICATES
) -> Interval:
    """The mean of values[n] (0/1 for a rate) with its bootstrap interval: for any rate that is a mean over rows."""
    values = np.asarray(values, dtype=np.float64)
    return ratio_interval(np.stack([values, np.ones_like(values)], axis=1), groups, seed, replicates)


def ratio_interval(
    counts: np.ndarray, groups: Sequence[str] | None = None, seed: int = 0, replicates: int = REPLICATES
) -> Interval:
    """sum(counts[:, 0]) / sum(counts[:, 1]) over rows, 0 where there is nothing to divide by, with its interval.

    With four columns the ratio of the last two is taken off: a paired difference, both sides on the same resamples.
    """
    if not len(counts):
        raise UserError("there is no row to evaluate; give a file with rows")
    units, count = unit_of_rows(groups, len(counts))
    sums = sum_units(sparse.csr_matrix(np.asarray(counts, dtype=np.float64)), units, count)

    def ratio(sums: np.ndarray) -> np.ndarray:
        first = safe_ratio(sums[:, 0], sums[:, 1])
        return first - safe_ratio(sums[:, 2], sums[:, 3]) if sums.shape[1] == 4 else first

    return interval(ratio(np.asarray(sums.sum(axis=0)).reshape(1, -1))[0], ratio(resample(sums, seed, replicates)))


def unit_of_rows(groups: Sequence[str] | None, rows: int) -> tuple[np.ndarray, int]:
    """(unit of each row, number of units): its group, or itself."""
    if groups is None:
        return np.arange(rows), rows
    names, units = np.unique(np.asarray(groups), return_inverse=True)
    return units, len(names)


def sum_units(features: sparse.csr_matrix, units: np.ndarray, count: int) -> sparse.csr_matrix:
    """[units, features]."""
    rows = len(units)
    return sparse.csr_matrix((np.ones(rows), (units, np.arange(rows))), shape=(count, rows)) @ features


def resample(sums: sparse.csr_matrix, seed: int, replicates: int) -> np.ndarray:
    """[replicates, features]: sums over as many units as there are, drawn with replacement."""
    rng = np.random.default_rng(seed)
    units = sums.shape[0]
    at_once = max(1, DRAWS_AT_ONCE // units)
    parts = []
    for start in range(0, replicates, at_once):
        size = min(at_once, replicates - start)
        draws = rng.integers(0, units, (size, units)) + units * np.arange(size)[:, None]
        counts = np.bincount(draws.ravel(), minlength=size * units).reshape(size, units)
        parts.append(sums.T @ counts.T.astype(np.float64))
    return np.concatenate(parts, axis=1).T


def safe_ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """0 where the denominator is 0, as scikit-learn's zero_division=0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def interval(value: float, samples: np.ndarray) -> Interval:
    """Value and 2.5 and 97.5 % percentiles of its replicates, rounded to six digits."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return {"value": round(float(value), 6), "low": round(float(low), 6), "high": round(float(high), 6)}


def centred(samples: np.ndarray, value: float) -> np.ndarray:
    """Replicates of ECE shifted to have the value as their mean.

    ECE adds up absolute values, so resampling noise only ever adds to it: unshifted, the replicates of a well
    calibrated model all lie above its value, which would fall outside its own interval.
    """
    return samples - samples.mean() + value
