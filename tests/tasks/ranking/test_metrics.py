"""Metrics equal scikit-learn's, intervals behave as intervals, drift is called when it is there."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import softmax
from sklearn import metrics as sk

from common.cli import UserError
from common.evaluation import bootstrap
from common.tasks.ranking import metrics
from common.tasks.ranking.calibration import Calibration, Scores
from common.tasks.ranking.decision import Decision
from common.tasks.ranking.drift import check_baseline, drift, margin_shift

LABELS = ("Good", "Standard", "Bad")


def draw(rows: int, seed: int = 0, skill: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """(raw scores, true labels)"""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, rows)
    return rng.normal(size=(rows, 3)) + skill * np.eye(3)[y], y


def scores(raw: np.ndarray) -> Scores:
    return Calibration(LABELS).apply(raw)


def evaluate(raw: np.ndarray, y: np.ndarray, **kwargs) -> dict:
    return metrics.evaluate(scores(raw), y, LABELS, **kwargs)


def width(interval: dict) -> float:
    return interval["high"] - interval["low"]


def test_point_values_equal_scikit_learn():
    raw, y = draw(700)
    raw[:, 1] -= 2.0  # a label that is hardly given
    p = scores(raw).probabilities
    predictions = p.argmax(axis=1)
    result = metrics.evaluate(Scores.of(p), y, LABELS)
    assert result["n"] == 700
    assert result["accuracy"]["value"] == pytest.approx(sk.accuracy_score(y, predictions), abs=1e-6)
    assert result["macro_f1"]["value"] == pytest.approx(sk.f1_score(y, predictions, average="macro"), abs=1e-6)
    assert result["nll"]["value"] == pytest.approx(sk.log_loss(y, p), abs=1e-6)
    brier = sk.brier_score_loss(y, p, labels=[0, 1, 2], scale_by_half=False)
    assert result["brier"]["value"] == pytest.approx(brier, abs=1e-6)
    assert result["confusion_matrix"] == sk.confusion_matrix(y, predictions).tolist()
    parts = sk.precision_recall_fscore_support(y, predictions)
    for k, label in enumerate(LABELS):
        row = result["per_class"][label]
        for name, expected in zip(("precision", "recall", "f1"), parts, strict=False):
            assert row[name]["value"] == pytest.approx(expected[k], abs=1e-6)
        assert row["support"] == parts[3][k]


def test_a_label_without_rows_or_answers_counts_as_zero_like_scikit_learn():
    p = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    result = metrics.evaluate(Scores.of(p), np.array([0, 0]), LABELS)
    expected = sk.f1_score([0, 0], [0, 1], labels=[0, 1, 2], average="macro", zero_division=0)
    assert result["macro_f1"]["value"] == pytest.approx(expected, abs=1e-6)


def test_ece_of_a_hand_made_case():
    # (0.8, right), (0.8, wrong) share a bin: |0.5 - 0.8| x 2/4; (1.0, right): 0; (0.5, wrong): |0 - 0.5| x 1/4
    p = np.array([[0.8, 0.2], [0.8, 0.2], [1.0, 0.0], [0.5, 0.5]])
    y = np.array([0, 1, 0, 1])
    result = metrics.evaluate(Scores.of(p), y, ("a", "b"))
    assert result["ece"]["value"] == pytest.approx(0.5 * 0.3 + 0.25 * 0.5, abs=1e-6)
    bins = result["curves"]["reliability"]
    assert (bins["count"][11], bins["confidence"][11], bins["accuracy"][11]) == (
        2,
        0.8,
        0.5,
    )  # (11/15, 12/15] holds 0.8
    assert bins["count"][14] == 1 and bins["accuracy"][0] is None


def test_perfect_predictions():
    y = np.arange(30) % 3
    result = metrics.evaluate(Scores.of(np.eye(3)[y]), y, LABELS)
    for name in ("accuracy", "macro_f1"):
        assert result[name] == {"value": 1.0, "low": 1.0, "high": 1.0}
    for name in ("ece", "brier", "nll"):
        assert result[name] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert result["curves"]["risk_coverage"]["risk"][-1] == 0


def test_decisions_change_accuracy_but_not_the_probabilities_metrics():
    raw, y = draw(300)
    argmax, other = (
        evaluate(raw, y),
        metrics.evaluate(replace(scores(raw), predictions=np.zeros(300, dtype=int)), y, LABELS),
    )
    assert other["accuracy"]["value"] == pytest.approx((y == 0).mean(), abs=1e-6)
    assert [other[name] for name in ("ece", "brier", "nll")] == [argmax[name] for name in ("ece", "brier", "nll")]


def test_same_seed_same_intervals():
    raw, y = draw(300)
    assert evaluate(raw, y) == evaluate(raw, y)
    assert evaluate(raw, y, seed=1)["accuracy"] != evaluate(raw, y)["accuracy"]
    json.dumps(evaluate(raw, y))  # plain numbers only


def test_chunks_do_not_change_the_replicates(monkeypatch):
    raw, y = draw(64)
    whole = evaluate(raw, y, replicates=200)
    monkeypatch.setattr(bootstrap, "DRAWS_AT_ONCE", 64 * 50)
    assert evaluate(raw, y, replicates=200) == whole


def test_interval_width_matches_theory():
    raw, y = draw(2_000)
    interval = evaluate(raw, y)["accuracy"]
    error = np.sqrt(interval["value"] * (1 - interval["value"]) / 2_000)
    assert width(interval) == pytest.approx(2 * 1.96 * error, rel=0.08)


@pytest.mark.processes
def test_intervals_cover_the_truth_about_95_times_in_100():
    truth = evaluate(*draw(400_000, seed=999), replicates=2)
    covered = {"accuracy": 0, "macro_f1": 0, "nll": 0}
    for seed in range(200):
        result = evaluate(*draw(300, seed=seed), replicates=300)
        for name in covered:
            covered[name] += result[name]["low"] <= truth[name]["value"] <= result[name]["high"]
    assert all(180 <= count <= 199 for count in covered.values()), covered


def test_ece_lies_within_its_own_interval_even_when_well_calibrated():
    rng = np.random.default_rng(0)
    p = softmax(rng.normal(scale=1.5, size=(800, 3)), axis=1)
    y = np.array([rng.choice(3, p=row) for row in p])
    ece = metrics.evaluate(Scores.of(p), y, LABELS)["ece"]
    assert 0 <= ece["low"] <= ece["value"] <= ece["high"]


def test_cluster_bootstrap_sees_through_duplicated_rows():
    raw, y = draw(300)
    single = evaluate(raw, y)
    raw3, y3, groups = np.repeat(raw, 3, axis=0), np.repeat(y, 3), [f"g{i:03}" for i in np.repeat(np.arange(300), 3)]
    naive, clustered = evaluate(raw3, y3), evaluate(raw3, y3, groups=groups)
    for name in ("accuracy", "macro_f1", "ece", "nll"):
        assert clustered[name] == single[name]
    assert width(naive["accuracy"]) < 0.7 * width(single["accuracy"])
    assert (clustered["n"], clustered["groups"], single["groups"]) == (900, 300, None)


def test_paired_difference():
    raw, y = draw(1_000)
    worse = raw + np.random.default_rng(1).normal(scale=0.5, size=raw.shape)
    a, b = scores(raw), scores(worse)
    difference = metrics.compare(a, b, y)
    for name, interval in difference.items():
        expected = evaluate(raw, y)[name]["value"] - evaluate(worse, y)[name]["value"]
        assert interval["value"] == pytest.approx(expected, abs=2e-6)
    assert metrics.compare(a, a, y)["accuracy"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    unpaired = np.hypot(width(evaluate(raw, y)["accuracy"]), width(evaluate(worse, y)["accuracy"]))
    assert width(difference["accuracy"]) < 0.8 * unpaired  # what is hard for both cancels


def test_coverage_and_selective_risk():
    raw, y = draw(500)
    result = Calibration(LABELS, decision=Decision(abstain_below=0.7)).apply(raw)
    report = metrics.evaluate(result, y, LABELS)
    kept = result.answered
    assert report["coverage"]["value"] == pytest.approx(kept.mean(), abs=1e-6)
    assert report["selective_risk"]["value"] == pytest.approx((result.predictions != y)[kept].mean(), abs=1e-6)
    assert report["accuracy"] == evaluate(raw, y)["accuracy"]
    curve = report["curves"]["risk_coverage"]
    place = np.searchsorted(curve["coverage"], kept.mean())
    assert curve["risk"][place] == pytest.approx(report["selective_risk"]["value"], abs=0.02)
    assert curve["risk"][-1] == pytest.approx(1 - report["accuracy"]["value"], abs=2e-6)
    assert "coverage" not in evaluate(raw, y)


def test_mean_cost():
    p, y = np.eye(3)[[0, 1, 2, 2]], np.array([0, 2, 2, 0])
    result = metrics.evaluate(Scores.of(p), y, LABELS, costs=((0, 1, 4), (1, 0, 1), (10, 2, 0)))
    assert result["mean_cost"]["value"] == pytest.approx((0 + 2 + 0 + 4) / 4)


def test_mean_interval():
    values = np.arange(200) % 2
    interval = bootstrap.mean_interval(values)
    assert interval["value"] == 0.5 and width(interval) == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 200), rel=0.1)
    with pytest.raises(UserError, match="no row"):
        bootstrap.mean_interval([])


def result_of(raw: np.ndarray, y: np.ndarray, ids=None, model_dir: str = "runs/x") -> dict:
    made = scores(raw)
    model = {"model_dir": model_dir, **metrics.evaluate(made, y, LABELS)}
    result = {"labels": list(LABELS), "models": [model]}
    if ids is not None:
        result["rows"] = {"ids": list(ids), "y": y.tolist()}
        model["predictions"] = made.predictions.tolist()
    return json.loads(json.dumps(result))


def test_no_drift_on_a_fresh_slice():
    report = drift(result_of(*draw(2_000)), result_of(*draw(2_000, seed=1)))
    assert not report["drifted"]
    assert not report["label_shift"]["shifted"]
    assert not report["models"][0]["margin_shift"]["shifted"] and not report["models"][0]["paired"]


def test_a_large_drop_is_drift():
    report = drift(result_of(*draw(2_000)), result_of(*draw(2_000, seed=1, skill=1.0)))
    model = report["models"][0]
    assert report["drifted"] and model["accuracy"]["dropped"] and model["macro_f1"]["dropped"]
    assert model["accuracy"]["difference"]["high"] < 0
    assert model["margin_shift"]["shifted"]
    assert not drift(result_of(*draw(2_000, skill=1.0)), result_of(*draw(2_000, seed=1)))["drifted"]


def test_label_shift():
    raw, y = draw(3_000)
    kept = (y != 2) | (np.arange(3_000) % 2 == 0)
    shift = drift(result_of(raw, y), result_of(raw[kept], y[kept]))["label_shift"]
    assert shift["shifted"] and shift["p_value"] < 1e-6


def test_paired_drift_sees_what_unpaired_cannot():
    raw, y = draw(1_500)
    worse = raw.copy()
    flipped = np.flatnonzero(raw.argmax(axis=1) == y)[:25]
    worse[flipped] = np.roll(raw[flipped], 1, axis=1)
    order = np.random.default_rng(0).permutation(1_500)
    ids = np.array([f"row{i}" for i in range(1_500)])
    ids[1] = ids[0]  # a text that occurs twice
    before = result_of(raw, y, ids)
    unpaired = drift(result_of(raw, y), result_of(worse, y))
    paired = drift(before, result_of(worse[order], y[order], ids[order]))
    assert not unpaired["drifted"]
    assert paired["drifted"] and paired["models"][0]["paired"]
    assert paired["models"][0]["accuracy"]["difference"]["value"] == pytest.approx(-25 / 1_500, abs=1e-6)


def test_margin_histograms_of_different_width_are_comparable():
    rng = np.random.default_rng(0)
    margins, right = rng.exponential(size=5_000), rng.random(5_000) < 0.7
    fine = metrics.margin_histogram(margins, right)
    coarse = metrics.margin_histogram(np.append(margins, [40.0] * 100), np.append(right, [True] * 100))
    assert coarse["width"] > fine["width"]
    assert sum(fine["right"]) == right.sum() and sum(fine["wrong"]) == (~right).sum()
    assert not margin_shift(fine, coarse)["shifted"]
    exact = np.abs(np.mean(margins <= 1.0) - np.mean(2 * margins <= 1.0))
    doubled = margin_shift(fine, metrics.margin_histogram(2 * margins, right))
    assert doubled["shifted"] and doubled["statistic"] >= exact - 0.01


def test_baselines_that_do_not_fit():
    now = result_of(*draw(50))
    with pytest.raises(UserError, match="compare results of the same task"):
        drift({**now, "labels": ["a", "b"]}, now)
    with pytest.raises(UserError, match=r"not a metrics.json"):
        drift({"accuracy": 0.5}, now)
    two = {**now, "models": [{**now["models"][0], "model_dir": name} for name in ("runs/a", "runs/b")]}
    with pytest.raises(UserError, match=r"other models .runs/a, runs/b."):
        drift(two, now)


@pytest.mark.parametrize("rows", [None, [f"row{i}" for i in range(50)]])
def test_a_baseline_is_checked_before_there_is_a_result(rows):
    stored = result_of(*draw(50), rows)
    check_baseline(stored, LABELS, ["runs/y"])  # one model, whatever it is called
    with pytest.raises(UserError, match=r"other models .runs/x."):
        check_baseline(stored, LABELS, ["runs/y", "runs/z"])
    check_baseline(stored, LABELS, ["runs/x", "runs/z"])
    model = stored["models"][0]
    for broken in ({**model, "curves": {}}, {**model, "macro_f1": 0.5}, {**model, "accuracy": {"value": "high"}}):
        with pytest.raises(UserError, match=r"not a metrics\.json"):
            check_baseline({**stored, "models": [broken]}, LABELS, ["runs/x"])
    if rows:
        with pytest.raises(UserError, match=r"not a metrics\.json"):
            check_baseline({**stored, "models": [{**model, "predictions": [0]}]}, LABELS, ["runs/x"])
