"""Questions as label tasks, when one is a run's own, and the confidence of their answers."""

from __future__ import annotations

import pytest

from common.tasks.ranking import questions
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.questions import Question, choice, predicate, score
from common.tasks.ranking.task import LabelTask

NONE = ("", "", "")
SPAM = LabelTask("spam", ("No", "Yes"), "Is this message spam?")


@pytest.mark.parametrize(
    ("question", "labels"),
    [
        (choice(CREDITMIX.instruction, ["Bad", "Good", "Standard"], NONE), ("Bad", "Good", "Standard")),
        (choice(f"  {CREDITMIX.instruction}\n", CREDITMIX.labels, NONE), CREDITMIX.labels),
        (score(CREDITMIX.instruction, ["Bad", "Standard", "Good"], NONE), ("Bad", "Standard", "Good")),
        (choice("What is the credit mix?", CREDITMIX.labels, NONE), None),
        (choice(CREDITMIX.instruction, ["Bad", "Good"], NONE[:2]), None),
        (choice(CREDITMIX.instruction, ["bad", "good", "standard"], NONE), None),
        (choice(CREDITMIX.instruction, CREDITMIX.labels, ("no debts", "", "")), None),
        (predicate(CREDITMIX.instruction), None),
    ],
)
def test_a_question_is_a_runs_own_by_its_words_and_options(question, labels):
    assert question.own_labels(CREDITMIX) == labels


def test_true_and_false_are_a_tasks_own_labels_in_any_words():
    assert predicate(SPAM.instruction).own_labels(SPAM) == ("Yes", "No")
    assert choice(SPAM.instruction, [False, True], NONE[:2]).own_labels(SPAM) == ("No", "Yes")
    assert choice(SPAM.instruction, ["false", "true"], NONE[:2]).own_labels(SPAM) is None  # texts are meant literally
    other = LabelTask("other", ("Yes", "Perhaps"), SPAM.instruction)
    assert predicate(SPAM.instruction).own_labels(other) is None


def test_a_question_is_put_with_its_options():
    task = choice("Which team?", ["billing", True], ["money", ""]).task()
    assert task.labels == ("billing", "true")
    assert task.prompt("x") == "Which team?\n- billing: money\n- true\nAnswer with one of these options only.\n\nx"
    assert predicate("Is it spam?", "an advert").task().instruction == (
        "Is it spam?\nYes: an advert\nAnswer Yes or No only."
    )
    assert score("", ["low", "high"], NONE[:2]).task().instruction.startswith("- low\n- high\nAnswer with one of these")


def test_levels_that_are_sentences_are_ranked_by_number():
    levels = ["It can wait", "It has to be done this week, or somebody " + "will " * 9 + "complain"]
    question = score("How urgent?", levels, ["", "soon"])
    assert question == Question("score", "How urgent?", ("0", "1"), (levels[0], f"{levels[1]} (soon)"))


def test_confidence_is_what_transformers_says():
    from transformers.decision import DecisionConfig
    from transformers.decision import Question as Theirs

    shares = [0.2, 0.5, 0.3]
    criteria = {"choice": {"a": None, "b": None, "c": None}, "score": ["a", "b", "c"]}
    for kind, measure in (("choice", questions.choice_confidence), ("score", questions.score_confidence)):
        theirs = Theirs.from_request("x", {"type": kind, "criteria": criteria[kind]}, DecisionConfig()).answer(shares)
        assert measure(shares, 1) == pytest.approx(theirs["confidence"])
    assert questions.expected_level(shares) == pytest.approx(theirs["score"])
    assert questions.choice_confidence([0.2, 0.8], 0) == 0  # less likely than chance, as costs may choose it
