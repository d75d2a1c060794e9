"""What a cascade costs and brings: figures that can be counted by hand, in text, plot and page."""

from __future__ import annotations

import numpy as np
import pytest

from common.tasks.ranking import cascade_curve
from common.tasks.ranking.calibration import Scores
from common.tasks.ranking.cascade_curve import NO_ANSWER

N = 200


@pytest.fixture(scope="module")
def case():
    """A student that is right where it is sure, by half where it is not; a teacher that is right on nine of ten."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, N)
    confidence = np.linspace(0.5, 0.999, N)
    right = rng.random(N) < np.where(confidence < 0.75, 0.5, 1.0)
    predictions = np.where(right, y, 1 - y)
    probabilities = np.where(np.arange(2) == predictions[:, None], confidence[:, None], 1 - confidence[:, None])
    teacher = np.where(rng.random(N) < 0.9, y, 1 - y)
    teacher[:20:2] = NO_ANSWER
    return Scores.of(probabilities), teacher, y


def test_the_curve_is_what_can_be_counted(case):
    scores, teacher, y = case
    curve, in_use = cascade_curve.points(scores, teacher, y, None, price=0.002)
    assert in_use is None
    assert [point["share"] for point in curve] == pytest.approx(cascade_curve.SHARES)
    alone = scores.predictions == y
    assert curve[0]["accuracy"]["value"] == pytest.approx(alone.mean())
    joined = np.where(teacher == NO_ANSWER, scores.predictions, teacher) == y
    for point in (curve[6], curve[20]):
        handed = round(point["share"] * N)  # the rows are in the order of their confidence
        assert point["accuracy"]["value"] == pytest.approx((joined[:handed].sum() + alone[handed:].sum()) / N)
        assert point["accuracy"]["low"] <= point["accuracy"]["value"] <= point["accuracy"]["high"]
        assert point["price_per_1000"] == pytest.approx(2 * point["share"])
    assert curve[10]["below"] == pytest.approx(scores.probabilities.max(axis=1)[100])
    assert max(point["accuracy"]["value"] for point in curve) > curve[20]["accuracy"]["value"]


def test_the_threshold_in_use_is_a_point(case):
    scores, teacher, y = case
    answered = scores.probabilities.max(axis=1) >= 0.75
    used = Scores(scores.scores, scores.probabilities, scores.predictions, answered, scores.top2_margin)
    _, point = cascade_curve.points(used, teacher, y, None, price=None)
    assert point["share"] == pytest.approx((~answered).mean())
    assert point["below"] == pytest.approx(0.75, abs=0.01)
    assert point["price_per_1000"] is None


def test_text_plot_and_page(case):
    scores, teacher, y = case
    told = cascade_curve.measured("big <model>", teacher, [("runs/a", scores)], y, None, price=0.002,
                                  tokens={"prompt": 100.0, "completion": 2.0})  # fmt: skip
    assert (told["answered"], told["of"]) == (N - 10, N)
    text = cascade_curve.text(told, ["a"])
    assert text.startswith("cascade to big <model> alone: 0.")
    assert "it answered 190 of 200 rows" in text
    assert [line.split()[1] for line in text.splitlines()[3:]] == ["0%", "20%", "40%", "60%", "80%", "100%"]
    assert text.splitlines()[-1].endswith("2.00")
    png = cascade_curve.plot(told, ["a"])
    assert png.startswith(b"\x89PNG")
    page = cascade_curve.section(told, ["a"], png)
    assert "big &lt;model&gt;" in page
    assert page.count("<tr>") == 7
