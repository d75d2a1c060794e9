"""eval_creditmix.py from made-up rows to figures, on a base that trains in seconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.inputs import LABELS, write_rows

import eval_creditmix
import infer_creditmix
from common import run_record
from common.cli import UserError
from common.data import splits
from common.models.source import ModelSource
from common.tasks.ranking import creditmix
from common.tasks.ranking.calibration import Calibration, batch_calibration
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.row_check import PromptRoom

pytestmark = pytest.mark.processes


def rows_of(file: str | Path, part: str | None = None) -> list[dict]:
    rows, _ = creditmix.read_labelled(file)
    return [row for row in rows if part is None or splits.part_of(row["group"]) == part]


def interval(value) -> bool:
    return value.keys() == {"value", "low", "high"} and value["low"] <= value["value"] <= value["high"]


def test_the_result_line(evaluate, trained, dataset):
    result = evaluate(trained)
    rarest = min(splits.class_counts(rows_of(dataset, "validation"), lambda row: row["answer"], LABELS).values())
    assert result["n"] == 3 * rarest > 100
    assert {key: result[key] for key in ("evaluator", "version", "data", "split")} == {
        "evaluator": "creditmix",
        "version": 1,
        "data": dataset,
        "split": "validation",
    }
    assert result["contamination"] == {"rows": 0, "of": result["n"]}
    (model,) = result["models"]
    assert model["model_dir"] == trained
    assert model["contamination"] == result["contamination"]
    assert all(interval(model[key]) for key in ("accuracy", "macro_f1", "ece", "brier", "nll", "mean_margin"))
    assert list(model["per_class"]) == list(LABELS)
    for label in LABELS:
        told = model["per_class"][label]
        assert all(interval(told[key]) for key in ("precision", "recall", "f1"))
        assert told["support"] == rarest
    matrix = np.array(model["confusion_matrix"])
    assert matrix.sum(axis=1).tolist() == [rarest] * 3
    assert model["accuracy"]["value"] == pytest.approx(matrix.trace() / matrix.sum(), abs=1e-6)
    assert model["calibration"] == "none" and "uncalibrated" not in model  # nothing was fitted


def test_figures_are_those_of_the_scores(evaluate, fitted, dataset):
    """Accuracy under every --calibration against one computed here; --label_bias on top."""
    rows = rows_of(dataset, "validation")
    chosen = splits.balanced(rows, lambda row: row["answer"], LABELS, 20, 3, "rows")
    y = np.array([LABELS.index(row["answer"]) for row in chosen])
    classifier = Classifier.load(ModelSource(fitted), CREDITMIX)
    raw = classifier.raw_scores([row["question"] for row in chosen]).astype(float)
    bias = np.array(list(json.loads(Path(fitted, "calibration.json").read_text())["bias"].values()))
    scores = {
        "none": raw,
        "prior": raw - classifier.prior,
        "batch": batch_calibration(raw, LABELS).apply(raw).scores,
        "fitted": raw - classifier.prior + bias,
    }
    for method, expected in scores.items():
        (model,) = evaluate(fitted, "--val_per_class", "20", "--seed", "3", "--calibration", method)["models"]
        assert model["calibration"] == method
        assert ("uncalibrated" in model) == (method == "fitted")  # a before and an after there is of a fit alone
        assert model["accuracy"]["value"] == pytest.approx((expected.argmax(1) == y).mean(), abs=1e-6)
        best = np.sort(expected, axis=1)
        assert model["mean_margin"]["value"] == pytest.approx((best[:, 2] - best[:, 1]).mean(), abs=1e-3)
    shifted = evaluate(fitted, "--val_per_class", "20", "--label_bias", "Standard=50", "Bad=-1")["models"][0]
    assert [row[1] for row in shifted["confusion_matrix"]] == [20, 20, 20]
    assert evaluate(fitted, "--val_per_class", "20")["models"][0]["calibration"] == "fitted"


def test_contamination_is_counted(evaluate, trained, dataset, tmp_path):
    groups = run_record.read_groups(trained)
    result = evaluate(trained, "--split", "all", "--val_per_class", "50")
    assert 50 < result["contamination"]["rows"] < result["contamination"]["of"] == 150
    every = evaluate(trained, "--split", "all", "--val_frac", "0.999")
    chosen = [row["group"] for row in rows_of(dataset)]
    share = sum(group in groups for group in chosen) / len(chosen)
    assert every["contamination"]["rows"] / every["n"] == pytest.approx(share, abs=0.1)
    assert evaluate(trained, "--split", "dev", "--val_per_class", "5")["contamination"] == {"rows": 0, "of": 15}
    unknown = shutil.copytree(trained, tmp_path / "unknown")
    (unknown / "train_groups.txt").unlink()
    assert evaluate(unknown, "--val_per_class", "5")["contamination"] is None
    both = evaluate(unknown, trained, "--val_per_class", "5", "--split", "all")
    assert [model["contamination"] for model in both["models"]] == [None, both["contamination"]]
    assert both["contamination"]["rows"] > 0


def test_several_models_are_compared(evaluate, base, trained):
    result = evaluate(base, trained, "--val_per_class", "30")
    before, after = result["models"]
    (difference,) = result["differences"]
    assert (difference["a"], difference["b"]) == (trained, base)
    for key in ("accuracy", "macro_f1", "nll"):
        assert interval(difference[key])
        assert difference[key]["value"] == pytest.approx(after[key]["value"] - before[key]["value"], abs=2e-6)
    assert before["contamination"] == {"rows": 0, "of": 90}
    assert after["nll"]["value"] != before["nll"]["value"]


def test_fitting_a_calibration(fitted, data):
    stored = json.loads(Path(fitted, "calibration.json").read_text())
    dev = rows_of(data / "creditmix_dev.jsonl")
    y = np.array([LABELS.index(row["answer"]) for row in dev])
    classifier = Classifier.load(ModelSource(fitted), CREDITMIX)
    raw = classifier.raw_scores([row["question"] for row in dev])
    weight = 1 / np.bincount(y)[y] / 3

    def nll(method: str) -> float:
        return -(weight * np.log(classifier.calibration(method).apply(raw).probabilities[range(len(y)), y])).sum()

    assert nll("fitted") < nll("prior") - 1e-4
    assert nll("fitted") < nll("none") - 0.02
    assert stored["fitted_on"]["nll_after"] == pytest.approx(nll("fitted"), abs=1e-3)
    assert stored["fitted_on"]["before"] == "none"
    assert stored["fitted_on"]["nll_before"] == pytest.approx(nll("none"), abs=1e-3)
    assert stored["fitted_on"]["file"] == str(data / "creditmix_dev.jsonl")
    assert stored["fitted_on"]["rows"] == len(dev)
    assert stored["temperature"] > 0


def test_fitting_on_trained_customers_is_refused(trained, dataset, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(UserError, match=r"\d+ of 1500 rows of .* are of customers that .* was trained on"):
        eval_creditmix.main(["--model_dir", str(run), "--fit_calibration", dataset])
    assert not (run / "calibration.json").exists()


def test_fitted_decisions(trained, data, evaluate, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(trained, tmp_path / "run")
    dev = str(data / "creditmix_dev.jsonl")
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({"Good": {"Bad": 1000}, "Standard": {"Bad": 1000}}))
    measured, of = [], PromptRoom.of
    monkeypatch.setattr(PromptRoom, "of", lambda *asked: measured.append(asked[0].model_dir) or of(*asked))
    fitting = ("--fit_calibration", dev, "--optimize", "cost", "--costs", str(costs), "--abstain_below", "0.99")
    (model,) = evaluate(run, "--val_per_class", "20", *fitting)["models"]
    assert measured == [str(run)]  # once, for the rows of both files
    assert [row[2] for row in model["confusion_matrix"]] == [0, 0, 0]  # Bad is too costly to say
    assert model["mean_cost"]["value"] == 0
    assert model["coverage"]["value"] == 0
    infer_creditmix.main(["--model_dir", str(run), "--features", "Age: 23.0, Occupation: Scientist"])
    assert json.loads(capsys.readouterr().out)["prediction"] is None
    costs.write_text(json.dumps({"Goood": {}}))
    with pytest.raises(UserError, match="unknown label 'Goood'; the labels are Good, Standard, Bad"):
        eval_creditmix.main(["--model_dir", str(run), "--fit_calibration", dev, "--optimize", "cost", "--costs",
                             str(costs)])  # fmt: skip


def test_drift(evaluate, trained, tmp_path):
    draw = ("--val_per_class", "60")
    report = tmp_path / "report"
    assert "drift" not in evaluate(trained, *draw, "--report_dir", str(report))
    stored = str(report / "metrics.json")
    same = evaluate(trained, *draw, "--baseline", stored, "--fail_on_drift")
    assert same["drift"]["drifted"] is False
    assert same["drift"]["models"][0]["accuracy"]["difference"]["value"] == 0
    better = json.loads((report / "metrics.json").read_text())
    better["models"][0]["predictions"] = better["rows"]["y"]
    better["models"][0]["accuracy"] = {"value": 1.0, "low": 1.0, "high": 1.0}
    (report / "better.json").write_text(json.dumps(better))
    drop = evaluate(trained, *draw, "--baseline", str(report / "better.json"), "--fail_on_drift", code=3)
    assert drop["drift"]["drifted"] is True
    assert drop["drift"]["models"][0]["accuracy"]["before"] == 1.0
    assert evaluate(trained, *draw, "--baseline", str(report / "better.json"))["drift"]["drifted"] is True


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--val_per_class", "100000"], r"so 100,000 per class is more than there is; ask for at most \d+"),
        (["--label_bias", "Standard"], "--label_bias Standard is not LABEL=NUMBER"),
        (["--label_bias", "Average=1"], "unknown label 'Average'; the labels are Good, Standard, Bad"),
        (["--calibration", "fitted"], "has no fitted calibration; fit one with"),
        (["--baseline", "/none.json"], "/none.json does not exist"),
        (["--fail_on_drift"], "--fail_on_drift needs --baseline"),
        (["--optimize", "accuracy"], "--optimize goes with --fit_calibration"),
        (["--decision_json"], "--decision_json goes with --fit_calibration"),
        (["--val_frac", "1.5"], "1.5 is not between 0 and 1"),
        (["--val_frac", "0.1", "--val_per_class", "3"], "not allowed with argument"),
        (["--features", "all"], "holds the six features only; --features all needs the raw credit-score CSV"),
    ],
)
def test_refused_before_a_model_is_loaded(more, sentence, trained, dataset, monkeypatch):
    monkeypatch.setattr(Classifier, "load", None)
    with pytest.raises(UserError, match=sentence):
        eval_creditmix.main(["--model_dir", trained, "--data", dataset, *more])


@pytest.mark.parametrize(
    ("flags", "content", "sentence"),
    [
        (["--baseline"], {"labels": ["a", "b"]}, "the baseline has the labels a, b, this result Good, Standard, Bad"),
        (["--baseline"], {"labels": LABELS, "models": []}, "the baseline has other models"),
        (["--baseline"], {"labels": LABELS, "models": [{"model_dir": "x"}]}, "is not a metrics.json of this evaluator"),
        (["--optimize", "cost"], None, r"--optimize cost and a cost matrix \(--costs\) belong together"),
        (["--abstain_below", "0.5", "--target_precision", "0.9"], None, "exclude each other; give one of them"),
        (["--optimize", "cost", "--costs"], {"Good": {"Bad": "much"}}, "must be 3 rows .* of 3 numbers"),
        (["--target_precision", "0.999"], None, r"needs at least 3,688 independent dev rows, and there are \d+"),
        ([], None, "the calibration rows have no row of class Standard, Bad"),
    ],
)
def test_what_would_cost_the_scoring_is_refused_before_it(
    flags, content, sentence, trained, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(Classifier, "load", None)
    run, dev = shutil.copytree(trained, tmp_path / "run"), rows_of(data / "creditmix_dev.jsonl")
    if content is not None:
        (tmp_path / "given.json").write_text(json.dumps(content))
        flags = [*flags, str(tmp_path / "given.json")]
    rows = dev if flags else [row for row in dev if row["answer"] == "Good"]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    asked = ["--data", file, "--split", "all"] if "--baseline" in flags else ["--fit_calibration", file]
    with pytest.raises(UserError, match=sentence):
        eval_creditmix.main(["--model_dir", str(run), *asked, *flags])


def test_a_calibration_that_cannot_be_read_is_found_before_any_scoring(trained, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(Classifier, "load", None)
    run = shutil.copytree(trained, tmp_path / "run")
    Calibration(("A", "B"), "fitted").save(run / "calibration.json")
    with pytest.raises(UserError, match="was fitted for the labels A, B, not Good, Standard, Bad; fit it again"):
        eval_creditmix.main(["--model_dir", trained, str(run), "--data", dataset])


def test_more_usage_errors(trained, dataset, tmp_path):
    for argv, sentence in (
        (["--model_dir", trained], "give --data with the rows to judge on"),
        (["--model_dir", trained, trained, "--data", dataset], "names the same model twice"),
        (["--model_dir", "a/b", "--fit_calibration", "x"], "writes into the model's folder, and a/b is not one"),
        (["--model_dir", trained, "--fit_calibration", "x", "--baseline", "y"], "need --data"),
    ):
        with pytest.raises(UserError, match=sentence):
            eval_creditmix.main(argv)
    one_class = write_rows(tmp_path / "rows.jsonl", [row for row in rows_of(dataset) if row["answer"] == "Good"])
    with pytest.raises(UserError, match=r"has no row of class Standard, Bad \(Good \d+"):
        eval_creditmix.main(["--model_dir", trained, "--data", one_class])


def test_prepared_rows_give_the_same_figures_as_the_source(evaluate, trained, data):
    """The validation file that prepare wrote and the source itself hold the same held-out rows."""
    one, other = (evaluate(trained, "--val_frac", "0.999", file=file)["models"][0]["nll"]["value"]
                  for file in (str(data / "creditmix_val.jsonl"), str(data / "creditmix_dataset.json")))  # fmt: skip
    assert one == pytest.approx(other, abs=0.1)
