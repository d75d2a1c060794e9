"""The precision that a threshold guarantees, on draws of which the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import binom

from common.cli import UserError
from common.evaluation.guarantee import guaranteed_threshold, independent_rows, lower_bound, rows_needed
from common.tasks.ranking.calibration import fit_vector_scaling
from common.tasks.ranking.decision import Goal, fit_decision

LABELS = ("a", "b", "c")


def draw(rng: np.random.Generator, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(raw[n, 3], y[n], group[n]): biased raw scores; the one to three rows of a group are the same."""
    logits = rng.normal(0, 1.6, (groups, 3))
    y = (rng.random(groups)[:, None] > softmax(logits, axis=1).cumsum(axis=1)).sum(axis=1).clip(max=2)
    group = np.repeat(np.arange(groups), rng.integers(1, 4, groups))
    return (2 * logits + (0.5, -1.0, 0.5))[group], y[group], group


def lowest_that_reaches(confidence: np.ndarray, right: np.ndarray, target: float) -> float:
    """The point estimate: the lowest threshold with this precision on the rows themselves."""
    order = np.argsort(-confidence)
    precision = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    return confidence[order][np.flatnonzero(precision[30:] >= target)[-1] + 30]


@pytest.mark.processes
@pytest.mark.parametrize(("draws", "fitted"), [(1000, False), (100, True)], ids=["calibrated", "whole fit"])
def test_a_guaranteed_precision_is_missed_in_one_draw_of_twenty_at_most(draws, fitted):
    """By group, over many draws; the point estimate is missed in every other one."""
    rng = np.random.default_rng(0)
    raw, truth, _ = draw(rng, 20_000)
    calibration = fit_vector_scaling(raw, truth, LABELS, class_weight=False)
    missed = missed_by_estimate = answered = 0
    for _ in range(draws):
        dev, y, groups = draw(rng, 600)
        if fitted:
            calibration = fit_vector_scaling(dev, y, LABELS, class_weight=False)
        if fitted or not answered:
            fresh = calibration.apply(raw).probabilities
            sure, right = fresh.max(axis=1), fresh.argmax(axis=1) == truth
        known = calibration.apply(dev).probabilities
        goal = Goal(target_precision=0.75)
        try:
            decision = fit_decision(known, y, LABELS, goal, class_weight=False, groups=groups)
        except UserError:  # it answers nothing, and breaks no promise
            continue
        answered += 1
        missed += right[sure >= decision.abstain_below].mean() < 0.75
        estimate = lowest_that_reaches(known.max(axis=1), known.argmax(axis=1) == y, 0.75)
        missed_by_estimate += right[sure >= estimate].mean() < 0.75
    assert answered > 0.95 * draws
    assert missed <= 0.05 * draws
    assert missed_by_estimate > 0.4 * draws


def test_the_bound_is_the_rate_at_which_as_many_are_right_so_seldom():
    for right, count in ((1, 10), (80, 100), (99, 100)):
        bound = float(lower_bound(right, count, 0.95))
        assert binom.sf(right - 1, count, bound) == pytest.approx(0.05)
    assert lower_bound(0, 10, 0.95) == 0
    assert lower_bound(10, 10, 0.95) == pytest.approx(0.05 ** (1 / 10))


def test_rows_needed_are_the_fewest_that_can_show_it():
    for target in (0.5, 0.9, 0.99):
        needed = rows_needed(target, 0.95)
        assert lower_bound(needed, needed, 0.95) >= target > lower_bound(needed - 1, needed - 1, 0.95)


def test_one_row_of_each_group_and_as_many_of_each_class():
    y = np.array([0] * 60 + [1] * 20 + [2] * 40)
    groups = [f"group {i // 2}" for i in range(120)]
    chosen = independent_rows(y, groups, balance=False)
    assert sorted(groups[i] for i in chosen) == sorted(set(groups))
    chosen = independent_rows(y, groups, balance=True)
    assert np.bincount(y[chosen]).tolist() == [10, 10, 10]
    assert len({groups[i] for i in chosen}) == 30
    assert independent_rows(y, None, balance=False).tolist() == list(range(120))
    assert independent_rows(y, groups, True, seed=1).tolist() != chosen.tolist()


def test_what_cannot_be_shown_is_refused_with_what_can():
    sure = np.linspace(0.5, 0.999, 400)
    with pytest.raises(UserError, match=r"needs at least 72 independent .*there are 50 .* ask for 0.92 at most"):
        guaranteed_threshold(sure[:50], np.ones(50), 0.95, 0.95)
    with pytest.raises(UserError, match=r"no threshold has a precision of 0.9 .*at best 0.[0-9]+ can be shown"):
        guaranteed_threshold(sure, np.arange(400) % 2, 0.9, 0.95)
    with pytest.raises(UserError, match="no threshold"):  # none is sure enough to be above any
        guaranteed_threshold(np.zeros(400), np.ones(400), 0.9, 0.95)


def test_the_threshold_is_the_lowest_that_is_shown():
    sure = np.linspace(0.4, 0.999, 1000)
    right = sure > 0.7
    threshold = guaranteed_threshold(sure, right, 0.9, 0.95)
    above = sure >= threshold
    assert lower_bound(right[above].sum(), above.sum(), 0.975) >= 0.9
    assert 0.6 < threshold < 0.7
    assert guaranteed_threshold(sure, np.ones(1000), 0.9, 0.95) < 0.4
