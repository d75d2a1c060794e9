"""Retention, the gap closed, and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support.inputs import LABELS

from common.comparison import retention
from common.tasks.ranking import metrics as label_metrics
from common.tasks.ranking.calibration import Scores


def test_retention_and_gap_of_a_mean_by_hand():
    teacher, base, student = [1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0]
    features = {"teacher": teacher, "base": base, "student": student}
    found = retention.figures(
        retention.ACCURACY, {role: retention.means(each * 50) for role, each in features.items()}, list(range(200))
    )
    assert found["teacher"]["value"]["value"] == 0.75
    assert found["student"]["retention"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["base"]["retention"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["student"]["gap_closed"]["value"] == pytest.approx((0.5 - 0.25) / (0.75 - 0.25))
    assert found["student"]["difference"]["value"] == -0.25 and found["student"]["gain"]["value"] == 0.25
    assert all(
        interval["low"] < interval["value"] < interval["high"]
        for interval in (found["student"][name] for name in ("value", "retention", "gap_closed", "difference"))
    )


def test_macro_f1_and_its_interval_are_those_of_the_other_evaluators():
    rng = np.random.default_rng(0)
    y, predictions = rng.integers(0, 3, 200), rng.integers(0, 3, 200)
    groups = [str(row // 3) for row in range(200)]
    features = {role: retention.hits(predictions, y, 3) for role in ("teacher", "student")}
    found = retention.figures(retention.MACRO_F1, features, groups)["student"]["value"]
    assert found == label_metrics.evaluate(Scores.of(np.eye(3)[predictions]), y, LABELS, groups=groups)["macro_f1"]


def test_perplexity_counts_tokens_alike_and_less_is_better():
    nll = {"teacher": [2.0, 6.0], "base": [6.0, 18.0], "student": [3.0, 9.0]}
    tokens = [2.0, 6.0]  # a token's surprise is 1, 3 and 1.5 in either row
    features = {role: np.stack([each, tokens], axis=1) for role, each in nll.items()}
    found = retention.figures(retention.PERPLEXITY, features, ["a", "b"])
    assert found["student"]["value"]["value"] == pytest.approx(math.exp(1.5), abs=1e-5)
    assert found["student"]["retention"] == pytest.approx(dict.fromkeys(("value", "low", "high"), math.exp(-0.5)))
    assert found["student"]["gap_closed"] == pytest.approx(dict.fromkeys(("value", "low", "high"), 0.75))


def test_equal_models_retain_everything_exactly():
    features = retention.means([0, 1, 1, 0, 1] * 20)
    found = retention.figures(retention.F1, {"teacher": features, "student": features}, list(range(100)))["student"]
    assert set(found["retention"].values()) == {1.0} and set(found["difference"].values()) == {0.0}


def test_a_share_of_nothing_is_undefined():
    features = {"teacher": [0, 0, 0, 1], "base": [0, 0, 1, 0], "student": [0, 1, 0, 1]}
    found = retention.figures(
        retention.F1, {role: retention.means(each) for role, each in features.items()}, list("abcd")
    )
    assert found["student"]["retention"] is None and found["student"]["gap_closed"] is None
