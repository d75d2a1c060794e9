"""The controls that stand beside a language model: what they can learn they do, by value."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from support.inputs import SHARED, write_rows

from common.cli import UserError
from common.tasks.ranking import creditmix
from common.tasks.ranking.controls import BOOSTING, TFIDF, controls
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.evaluate import evaluate_controls


def test_words_that_tell_the_label_are_learnt():
    texts = [f"the printer number {i} is {'broken' if i % 2 else 'fine'}" for i in range(200)]
    answers = controls(texts[:150], [i % 2 for i in range(150)], texts[150:], classes=2)
    assert set(answers) == {TFIDF}  # these texts have no columns
    assert (answers[TFIDF].argmax(axis=1) == [i % 2 for i in range(150, 200)]).all()
    assert answers[TFIDF].sum(axis=1) == pytest.approx(np.ones(50))


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
    evaluated = dict(
        (entry["model_dir"], (entry, scores))
        for entry, scores in evaluate_controls(write_rows(tmp_path / "sft.jsonl", train), CREDITMIX, rows[195:])
    )
    assert set(evaluated) == {TFIDF, BOOSTING}
    entry, scores = evaluated[BOOSTING]
    assert entry["contamination"] == {"rows": 5, "of": 45} and entry["control"]
    assert entry["accuracy"]["value"] > 0.9
    assert entry["predictions"] == scores.predictions.tolist()


def test_rows_of_another_task_are_refused(tmp_path):
    train = [{"input": "Rate this ticket.\n\nOn fire", "output": "Good"}]
    with pytest.raises(UserError, match="row 1 is no training row of creditmix"):
        evaluate_controls(write_rows(tmp_path / "sft.jsonl", train), CREDITMIX, labelled(9))


def test_one_label_is_too_few():
    with pytest.raises(UserError, match="at least two labels"):
        controls(["a", "b"], [1, 1], ["c"], classes=2)


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
