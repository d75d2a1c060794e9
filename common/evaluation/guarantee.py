"""A threshold of confidence at which answers are right so often, by a guarantee in place of a point estimate.

The lowest threshold that reaches a precision on some rows falls short of it on fresh ones about as often as not, since
the luckiest was chosen. Learn then Test (Angelopoulos et al. 2021, arXiv:2110.01052) tests thresholds of a list that is
fixed beforehand, from the surest down, and ends at the first that cannot be shown to hold: with the given probability
over the draw of the rows, the precision on fresh ones is then what was asked for. The walk begins at two places, where
just enough rows are above the threshold and where there are more, since the few surest rows alone show little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import betaincinv, expit

from common.cli import UserError

GUARANTEE = 0.95  # where nothing else is asked for
STARTS = 2  # of the walk down the thresholds, each with its share of the error
THRESHOLDS = expit(np.arange(100, -101, -1) / 10)  # in steps of 0.1 nats, from 0.99995 down


def lower_bound(right: int | np.ndarray, count: int | np.ndarray, guarantee: float) -> np.ndarray:
    """The one-sided lower Clopper-Pearson bound (1934) of a rate, `right` of `count`; 0 where nothing is right."""
    right, count = np.asarray(right), np.asarray(count)
    bound = betaincinv(np.maximum(right, 1), count - right + 1, 1 - guarantee)  # the quantile of a beta distribution
    return np.where(right > 0, bound, 0.0)


def rows_needed(target: float, guarantee: float) -> int:
    """The fewest answers, all of them right, that show a precision of `target`."""
    return math.ceil(math.log(1 - guarantee) / math.log(target))


def independent_rows(y: np.ndarray, groups: Sequence[str] | None, balance: bool, seed: int = 0) -> np.ndarray:
    """Indices of rows that are independent draws: one of each group, and with `balance` as many of each class.

    Args:
        y: [n] class of each row.
        groups: [n], rows of one of which may be alike; None: every row is its own.
    """
    y, rng = np.asarray(y), np.random.default_rng(seed)
    order = rng.permutation(len(y))
    if groups is not None:
        _, first = np.unique(np.asarray(groups)[order], return_index=True)
        order = order[np.sort(first)]
    if balance:
        classes, counts = np.unique(y[order], return_counts=True)
        order = np.concatenate([order[y[order] == one][: counts.min()] for one in classes])
    return np.sort(order)


def check_count(count: int, target: float, guarantee: float) -> None:
    """Refuse too few independent rows for `guaranteed_threshold`, however right their answers are.

    Raises:
        UserError: so many cannot show a precision of `target`; says which one they could.
    """
    level = _level(guarantee)
    needed = rows_needed(target, level)
    if count < needed:
        least = math.floor(100 * (1 - level) ** (1 / max(1, count))) / 100
        raise UserError(
            f"a precision of {target:g} with a guarantee of {guarantee:g} needs at least {needed:,} independent dev "
            f"rows, and there are {count:,} (one of each group counts); give more, or ask for {least:g} at most"
        )


def _level(guarantee: float) -> float:
    """At which each threshold is tested, so that all starts together keep the guarantee."""
    return 1 - (1 - guarantee) / STARTS


def guaranteed_threshold(confidence: np.ndarray, right: np.ndarray, target: float, guarantee: float) -> float:
    """The lowest threshold that is shown, with probability `guarantee`, to have a precision of `target` or more.

    Args:
        confidence: [n] of independent rows, between 0 and 1.
        right: [n] whether each row's answer is right.

    Raises:
        UserError: too few rows for that, however right they are, or none that can be shown; says what is within reach.
    """
    confidence, right = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=bool)
    check_count(len(right), target, guarantee)
    level = _level(guarantee)
    needed = rows_needed(target, level)
    above = confidence[None, :] >= THRESHOLDS[:, None]
    count, hits = above.sum(axis=1), (above & right).sum(axis=1)
    bound = lower_bound(hits, count, level)
    holds = bound >= target
    reached = -1
    for least in np.geomspace(needed, len(right), STARTS, endpoint=False):
        index = int(np.argmax(count >= least))
        while index < len(holds) and holds[index]:
            reached, index = max(reached, index), index + 1
    if reached < 0:
        raise UserError(
            f"no threshold has a precision of {target:g} with a guarantee of {guarantee:g} on these dev rows: at best "
            f"{bound.max():.3f} can be shown; ask for less, or give more rows"
        )
    return float(THRESHOLDS[reached])
