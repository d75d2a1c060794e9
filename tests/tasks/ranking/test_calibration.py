"""Calibration: the published example, known parameters found again, decisions that differ from argmax."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import softmax

from common.cli import UserError
from common.tasks.ranking.calibration import (
    Calibration,
    batch_calibration,
    fit_vector_scaling,
)
from common.tasks.ranking.decision import Decision, Goal, fit_decision, fit_offsets

LABELS = ("Good", "Standard", "Bad")
PUBLISHED_RAW = np.array([[-3.78, -0.28, -1.52]])
PUBLISHED_PRIOR = (-2.44, -1.49, -0.62)


def draw(rows: int, seed: int = 0, bias=(0.0, 0.0, 0.0), temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Raw scores whose exact calibration is known: softmax((raw + bias) / temperature) is the truth."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=1.5, size=(rows, 3))
    y = np.array([rng.choice(3, p=p) for p in softmax(logits, axis=1)])
    return logits * temperature - np.asarray(bias), y


def nll(calibration: Calibration, raw: np.ndarray, y: np.ndarray) -> float:
    return float(-np.log(calibration.apply(raw).probabilities[np.arange(len(y)), y]).mean())


def test_published_example():
    result = Calibration(LABELS, "prior", PUBLISHED_PRIOR).apply(PUBLISHED_RAW)
    assert result.scores[0] == pytest.approx([-1.34, 1.21, -0.90])
    assert LABELS[result.predictions[0]] == "Standard"
    assert 2.11 <= round(result.top2_margin[0], 2) <= 2.12
    assert result.probabilities[0] == pytest.approx([0.0651, 0.8338, 0.1011], abs=1e-4)


def test_bias_and_temperature_enter_as_defined():
    calibration = Calibration(LABELS, "fitted", PUBLISHED_PRIOR, bias=(0.0, 0.0, 3.0), temperature=2.0)
    result = calibration.apply(PUBLISHED_RAW)
    assert result.scores[0] == pytest.approx([-1.34, 1.21, 2.10])
    assert result.probabilities[0] == pytest.approx(softmax(np.array([-1.34, 1.21, 2.10]) / 2))
    assert LABELS[result.predictions[0]] == "Bad"
    assert result.top2_margin[0] == pytest.approx(0.89)


def test_label_bias_adds_to_the_bias():
    calibration = Calibration(LABELS, bias=(0.1, 0.2, 0.3)).with_label_bias({"Standard": 0.5})
    assert calibration.bias == pytest.approx((0.1, 0.7, 0.3))
    with pytest.raises(UserError, match=r"unknown label 'Fair'.*Good, Standard, Bad"):
        calibration.with_label_bias({"Fair": 1.0})


def test_fit_recovers_known_bias_and_temperature():
    bias = np.array([0.7, -1.0, 0.3])
    raw, y = draw(20_000, bias=bias, temperature=2.0)
    fitted = fit_vector_scaling(raw, y, LABELS, class_weight=False)
    assert fitted.temperature == pytest.approx(2.0, rel=0.05)
    assert fitted.bias == pytest.approx(bias, abs=0.08)


def test_fitted_probabilities_do_not_depend_on_the_prior():
    raw, y = draw(2_000, bias=(0.5, -1.0, 0.5))
    without = fit_vector_scaling(raw, y, LABELS).apply(raw)
    with_prior = fit_vector_scaling(raw, y, LABELS, prior=PUBLISHED_PRIOR).apply(raw)
    assert with_prior.probabilities == pytest.approx(without.probabilities, abs=2e-3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("before", ["none", "prior"])
def test_fit_never_lowers_the_likelihood_of_its_rows(seed, before):
    raw, y = draw(60, seed=seed, temperature=0.01 * 10**seed)
    fitted = fit_vector_scaling(raw, y, LABELS, class_weight=False, prior=PUBLISHED_PRIOR, before=before)
    assert fitted.prior == PUBLISHED_PRIOR  # which answers show, whatever the fit began from
    begin = Calibration(LABELS, before, PUBLISHED_PRIOR if before == "prior" else ())
    assert nll(fitted, raw, y) <= nll(begin, raw, y) + 1e-9
    assert fitted.fitted_on["nll_after"] <= fitted.fitted_on["nll_before"]


def test_separable_and_useless_scores_stay_finite():
    y = np.arange(300) % 3
    separable = fit_vector_scaling(np.eye(3)[y], y, LABELS)
    assert 0 < separable.temperature < 1 and np.isfinite(separable.bias).all()
    useless = fit_vector_scaling(np.zeros((300, 3)) - 1.0, y, LABELS)
    assert useless.apply(np.zeros((1, 3))).probabilities[0] == pytest.approx([1 / 3] * 3, abs=1e-6)


def test_class_weight_makes_the_fit_independent_of_class_frequencies():
    raw, y = draw(30_000, bias=(0.5, -1.0, 0.5))
    common = fit_vector_scaling(raw, y, LABELS)
    kept = (y != 1) | (np.arange(len(y)) % 4 == 0)  # a quarter of the Standard rows
    rare = fit_vector_scaling(raw[kept], y[kept], LABELS)
    assert rare.bias == pytest.approx(common.bias, abs=0.12)


def test_missing_class_and_broken_scores_are_named():
    raw, y = draw(50)
    with pytest.raises(UserError, match="no row of class Bad"):
        fit_vector_scaling(raw, np.where(y == 2, 0, y), LABELS)
    raw[3, 1] = np.nan
    with pytest.raises(UserError, match=r"row 4 .*not a finite number"):
        Calibration(LABELS).apply(raw)


def test_batch_calibration_divides_by_the_mean_probability():
    raw, _ = draw(500, bias=(2.0, -2.0, 0.0))
    p = softmax(raw, axis=1)
    expected = p / p.mean(axis=0)
    expected /= expected.sum(axis=1, keepdims=True)
    assert batch_calibration(raw, LABELS).apply(raw).probabilities == pytest.approx(expected)
    with pytest.raises(UserError, match="at least two rows"):
        batch_calibration(raw[:1], LABELS)


def test_batch_calibration_takes_a_constant_bias_away():
    raw, y = draw(3_000, bias=(3.0, 0.0, -3.0))
    before = (Calibration(LABELS).apply(raw).predictions == y).mean()
    after = (batch_calibration(raw, LABELS).apply(raw).predictions == y).mean()
    unbiased = (Calibration(LABELS).apply(raw + np.array([3.0, 0.0, -3.0])).predictions == y).mean()
    assert before + 0.1 < after <= unbiased + 0.01


def test_cost_decision_differs_from_argmax():
    # calling a Bad customer Good costs 10: at 12 % Bad the safer answer is Bad (cost 0.88 against 1.2)
    probabilities = np.array([[0.88, 0.0, 0.12], [0.95, 0.0, 0.05]])
    costs = ((0, 1, 1), (1, 0, 1), (10, 1, 0))
    decision = fit_decision(probabilities, np.array([0, 2]), LABELS, Goal("cost", costs=costs))
    predictions, answered = decision.choose(probabilities)
    assert probabilities.argmax(axis=1).tolist() == [0, 0]
    # expected costs of Good, Standard, Bad: 1.2, 1.0, 0.88 and 0.5, 1.0, 0.95
    assert predictions.tolist() == [2, 0]
    assert answered.all()


def test_zero_one_cost_is_argmax():
    probabilities = softmax(draw(200)[0], axis=1)
    costs = tuple(map(tuple, 1.0 - np.eye(3)))
    assert (Decision("cost", costs=costs).choose(probabilities)[0] == probabilities.argmax(axis=1)).all()


@pytest.mark.parametrize("costs", [((0, 1), (1, 0)), ((0, 1, 1), (1, 0, 1), (1, 1, "x"))])
def test_bad_cost_matrix(costs):
    with pytest.raises(UserError, match=r"3 rows .true label. of 3 numbers"):
        fit_decision(np.eye(3), np.arange(3), LABELS, Goal("cost", costs=costs))


@pytest.mark.processes
@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_offsets_reach_the_best_of_a_grid(metric):
    from sklearn.metrics import accuracy_score, f1_score

    raw, y = draw(400, bias=(1.5, -1.5, 0.0))
    probabilities = softmax(raw, axis=1)

    def score(offsets) -> float:
        predictions = (np.log(probabilities) + offsets).argmax(axis=1)
        return accuracy_score(y, predictions) if metric == "accuracy" else f1_score(y, predictions, average="macro")

    grid = np.linspace(-4, 4, 21)
    best = max(score([a, b, 0]) for a in grid for b in grid)
    offsets = fit_offsets(probabilities, y, metric, class_weight=False)
    assert score(offsets) >= best - 0.01
    assert score(offsets) >= score([0, 0, 0])
    assert score([0, 0, 0]) < best - 0.05  # there was something to find


def test_macro_f1_brings_back_a_label_that_was_hardly_ever_given():
    raw, y = draw(2_000, bias=(0.0, 3.0, 0.0))
    calibration = Calibration(LABELS)
    decided = replace(
        calibration, decision=fit_decision(calibration.apply(raw).probabilities, y, LABELS, Goal("macro_f1"))
    )
    recall_before, recall_after = ((c.apply(raw).predictions == 1)[y == 1].mean() for c in (calibration, decided))
    assert recall_before < 0.1 and recall_after > 0.4


def test_abstention_keeps_everything_else():
    raw = np.log([[0.9, 0.05, 0.05], [0.4, 0.35, 0.25]])
    result = Calibration(LABELS, decision=Decision(abstain_below=0.5)).apply(raw)
    assert result.answered.tolist() == [True, False]
    assert result.predictions.tolist() == [0, 0]
    assert result.probabilities[1] == pytest.approx([0.4, 0.35, 0.25])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"optimize": "recall"}, "choose one of accuracy, macro_f1, cost"),
        ({"optimize": "cost"}, "give both or neither"),
        ({"abstain_below": 0.5, "target_precision": 0.9}, "give one of them"),
    ],
)
def test_decisions_that_make_no_sense(arguments, message):
    with pytest.raises(UserError, match=message):
        fit_decision(np.eye(3), np.arange(3), LABELS, Goal(**arguments))


def test_saved_calibration_comes_back_the_same(tmp_path):
    raw, y = draw(400, bias=(0.5, -1.0, 0.5))
    calibration = fit_vector_scaling(raw, y, LABELS, prior=PUBLISHED_PRIOR, fitted_on={"data": "dev.jsonl"})
    decision = fit_decision(calibration.apply(raw).probabilities, y, LABELS, Goal("macro_f1", target_precision=0.5))
    calibration = replace(calibration, decision=decision)
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json", LABELS) == calibration
    with_costs = Calibration(LABELS, decision=Decision("cost", costs=((0.0, 1.0, 1.0),) * 3))
    with_costs.save(tmp_path / "costs.json")
    assert Calibration.load(tmp_path / "costs.json") == with_costs


def test_unfit_calibration_files_are_refused(tmp_path):
    path = tmp_path / "calibration.json"
    Calibration(LABELS).save(path)
    with pytest.raises(
        UserError, match=r"fitted for the labels Good, Standard, Bad, not Bad, Good.*--calibration none"
    ):
        Calibration.load(path, ("Bad", "Good"))
    good = json.loads(path.read_text())
    for broken in (
        {**good, "temperature": -1.0},
        {**good, "version": 99},
        {**good, "prior": {"Good": 0.0}},
        {key: value for key, value in good.items() if key != "decision"},
        {**good, "temperature": float("nan")},
        {**good, "temperature": 1e300},
        {**good, "bias": dict.fromkeys(LABELS, float("inf"))},
        {**good, "bias": dict.fromkeys(LABELS, 1e9)},
        {**good, "prior": dict.fromkeys(LABELS, "x")},
        {**good, "decision": {**good["decision"], "offsets": [0.0, float("nan"), 0.0]}},
        {**good, "decision": {**good["decision"], "offsets": [0.0, 1.0]}},
        {**good, "decision": {**good["decision"], "costs": [[0.0, 1.0]] * 3}},
        {**good, "decision": {**good["decision"], "costs": [[0.0, 1.0, "x"]] * 3}},
        {**good, "decision": {**good["decision"], "abstain_below": 7}},
        {**good, "decision": {**good["decision"], "optimize": ["x"]}},
        {**good, "bias": dict.fromkeys(LABELS, 10**400)},
        {**good, "labels": [0, 1, 2], "bias": [0.0] * 3, "prior": [0.0] * 3},
        {**good, "fitted_on": [1]},
        [],
        None,
        3,
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match="fit it again"):
            Calibration.load(path, LABELS)
    path.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        Calibration.load(path)
