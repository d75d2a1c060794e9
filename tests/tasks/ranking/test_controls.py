"""The controls that stand beside a language model: what they can learn they do, by value."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from support.inputs import SHARED, write_rows

from common.cli import UserError
from common.files import sha256_file
from common.tasks.ranking import baseline, creditmix, report
from common.tasks.ranking.controls import BOOSTING, TFIDF, controls
from common.tasks.ranking.creditmix import CREDITMIX


def test_words_that_tell_the_label_are_learnt():
    texts = [f"the printer number {i} is {'broken' if i % 2 else 'fine'}" for i in range(200)]
    answers = controls(texts[:150], [i % 2 for i in range(150)], texts[150:], classes=2)
    assert set(answers) == {TFIDF}  # these texts have no columns
    assert (answers[TFIDF].argmax(axis=1) == [i % 2 for i in range(150, 200)]).all()
    assert answers[TFIDF].sum(axis=1) == pytest.approx(np.ones(50))


@pytest.mark.processes
def test_columns_are_learnt_by_gradient_boosting():
    """A threshold on a number and a rule on a category, neither of which a bag of words can see."""
    rng = random.Random(0)
    rows = [(rng.uniform(0, 3000), rng.choice(["Lawyer", "Writer", "Chef"])) for _ in range(1200)]
    texts = [
        f"Outstanding Debt: {debt:,.2f}, Occupation: {job}, Age: {rng.choice(['33', 'N/A'])}" for debt, job in rows
    ]
    y = [int(debt > 1500) if job != "Chef" else 2 for debt, job in rows]
    answers = controls(texts[:1000], y[:1000], texts[1000:], classes=4)
    right = {name: float(np.mean(answer.argmax(axis=1) == y[1000:])) for name, answer in answers.items()}
    assert right[BOOSTING] > 0.97 and right[BOOSTING] > right[TFIDF]
    assert (answers[BOOSTING][:, 3] == 0).all()  # a label that no training row has


def test_a_value_that_training_never_saw_is_none_of_the_known():
    texts = [f"Job: {'a' if i % 2 else 'b'}, Debt: {i}" for i in range(60)]
    answers = controls(texts, [i % 2 for i in range(60)], ["Job: new, Debt: 3", "Job: a, Debt: N/A"], classes=2)
    assert np.isfinite(answers[BOOSTING]).all()


def labelled(count: int) -> list[dict]:
    """Rows whose debt tells the label."""
    return [
        {
            "question": f"Age: {20 + i % 40}, Outstanding Debt: {i % 3 * 900 + i}",
            "answer": CREDITMIX.labels[i % 3],
            "group": f"{i:016x}",
        }
        for i in range(count)
    ]


def test_controls_are_entries_like_the_models(tmp_path):
    rows = labelled(240)
    train = [
        {"input": CREDITMIX.prompt(row["question"]), "output": row["answer"], "group": row["group"]}
        for row in rows[:200]
    ]
    learnt = baseline.training_rows(write_rows(tmp_path / "sft.jsonl", train), [], CREDITMIX)
    evaluated = {
        entry["model_dir"]: (entry, scores) for entry, scores in baseline.evaluate(learnt, CREDITMIX, rows[195:])
    }
    assert set(evaluated) == {TFIDF, BOOSTING}
    entry, scores = evaluated[BOOSTING]
    assert entry["contamination"] == {"rows": 5, "of": 45} and entry["control"]
    assert entry["accuracy"]["value"] > 0.9
    assert entry["predictions"] == scores.predictions.tolist()


def test_rows_of_another_task_are_refused(tmp_path):
    train = [{"input": "Rate this ticket.\n\nOn fire", "output": "Good"}]
    with pytest.raises(UserError, match="row 1 is no training row of creditmix"):
        baseline.training_rows(write_rows(tmp_path / "sft.jsonl", train), [], CREDITMIX)


@pytest.fixture
def run(tmp_path):
    """A run whose record names its training rows."""
    rows = [
        {"input": CREDITMIX.prompt(row["question"]), "teacher_output": row["answer"], "group": row["group"]}
        for row in labelled(90)
    ]
    file = write_rows(tmp_path / "kd.jsonl", [*rows, {"input": "Another task", "teacher_output": "Good"}])
    (tmp_path / "kd").mkdir()
    record = {"data": {"path": file, "sha256": sha256_file(file), "rows": 91}}
    (tmp_path / "kd" / "run.json").write_text(json.dumps(record))
    return tmp_path / "kd"


def test_a_bag_of_words_learns_from_what_a_run_was_trained_on(run):
    learnt = baseline.training_rows(None, ["some/base", str(run)], CREDITMIX)
    assert baseline.facts(learnt) == {"model_dir": TFIDF, "data": str(run.parent / "kd.jsonl"), "rows": 90}
    ((entry, _),) = baseline.evaluate(learnt, CREDITMIX, labelled(99)[90:])
    assert entry["model_dir"] == TFIDF and entry["contamination"] == {"rows": 0, "of": 9}


def test_why_there_is_no_bag_of_words_is_said(run, tmp_path):
    assert baseline.training_rows("none", [str(run)], CREDITMIX) == "it was left out (--controls none)"
    bases = baseline.training_rows(None, ["some/base"], CREDITMIX)
    assert bases == "none of these models keeps a record of its training rows"
    with open(tmp_path / "kd.jsonl", "a") as file:
        file.write("{}\n")
    assert "kd.jsonl has changed since" in baseline.training_rows(None, [str(run)], CREDITMIX)
    (tmp_path / "kd.jsonl").unlink()
    assert "is not there" in baseline.training_rows(None, [str(run), str(run)], CREDITMIX)
    said = report.against_words({"models": [], "baseline": {"reason": "x"}})
    assert said == [("unknown", "There is no bag of words to compare with: x; --controls FILE trains one")]


@pytest.mark.parametrize(
    ("low", "high", "state", "words"),
    [
        (0.5, 0.7, "bad", "A bag of words labels more of these rows correctly than sft: 0.900 against 0.335"),
        (-0.1, 0.7, "unknown", "These rows do not show that sft is better than a bag of words"),
        (-0.2, -0.1, "good", "sft is better than a bag of words"),
    ],
)
def test_people_see_whether_a_bag_of_words_is_better(low, high, state, words):
    def entry(name, accuracy, **more):
        return {"model_dir": name, "accuracy": {"value": accuracy, "low": 0, "high": 1}, **more}

    difference = {"value": (low + high) / 2, "low": low, "high": high}
    result = {
        "models": [entry("runs/sft", 0.335), entry(TFIDF, 0.9, control=True), entry(BOOSTING, 0.9, control=True)],
        "differences": [
            {"a": TFIDF, "b": "runs/sft", "accuracy": difference},
            {"a": BOOSTING, "b": TFIDF, "accuracy": difference},
        ],
    }
    ((shown, sentence),) = report.against_words(result)
    assert shown == state and words in sentence
    assert ("train longer (--epochs)" in sentence) == (state == "bad")


@pytest.mark.parametrize(
    ("texts", "fault"),
    [
        (["5", "7", "9 1"], "no word of two characters or more in at least 1 of the texts"),
        ([f"word{n}" for n in range(120)], "no word of two characters or more in at least 2 of the texts"),
        (["alike"] * 9, "no rows of at least two labels"),
    ],
)
def test_rows_that_nothing_can_be_learnt_from_are_found_before_any_scoring(texts, fault, tmp_path):
    labels = CREDITMIX.labels[:1] if texts[0] == "alike" else CREDITMIX.labels
    train = [
        {"input": CREDITMIX.prompt(text), "output": labels[number % len(labels)]} for number, text in enumerate(texts)
    ]
    file = write_rows(tmp_path / "sft.jsonl", train)
    with pytest.raises(UserError, match=rf"--controls .*sft.jsonl has {fault}; give a file with more rows, or"):
        baseline.training_rows(file, [], CREDITMIX)
    (tmp_path / "run").mkdir()
    record = {"data": {"path": file, "sha256": sha256_file(file), "rows": len(train)}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    reason = baseline.training_rows(None, [str(tmp_path / "run")], CREDITMIX)
    assert reason == f"{file} has {fault} of creditmix"
    y = [CREDITMIX.labels.index(row["output"]) for row in train]
    with pytest.raises(UserError, match=f"the training rows of the controls have {fault}"):
        controls(texts, y, ["a text"], classes=3)


@pytest.mark.processes
@pytest.mark.skipif(not (SHARED / "data" / "creditmix").is_dir(), reason="needs the public CreditMix file")
def test_the_public_file_reaches_what_its_features_hold():
    """Gradient boosting is known to reach 0.67 to 0.71 on customers that it has not seen."""
    rows = [
        (creditmix.clean_features(row["question"]), row["answer"])
        for row in json.loads((SHARED / "data" / "creditmix" / "creditmix_dataset.json").read_text())[:6000]
    ]
    labels = ["Good", "Standard", "Bad"]
    train, test = [], []
    for text, label in rows:
        (test if int(creditmix.group_of(text), 16) % 5 == 0 else train).append((text, labels.index(label)))
    answers = controls([t for t, _ in train], [k for _, k in train], [t for t, _ in test], classes=3)
    right = np.mean(answers[BOOSTING].argmax(axis=1) == [k for _, k in test])
    assert 0.62 < right < 0.80
