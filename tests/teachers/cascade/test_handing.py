"""Rows that are handed on: within a budget and a time, and never with an error."""

from __future__ import annotations

import threading
import time

import pytest
from support.processes import LONGEST
from support.teacher import HANG, error, question_of

from common.cli import UserError
from common.tasks.ranking.creditmix import CREDITMIX
from common.teachers.cascade import handing
from common.teachers.cascade.handing import Budget, Cascade, cascade_of
from common.teachers.cascade.settings import CascadeSettings, endpoint
from common.teachers.interview import Answer
from common.teachers.tasks import Item, Labels

TASK = Labels(CREDITMIX)


def items(count: int) -> list[Item]:
    return [Item(number, CREDITMIX.prompt(f"Age: {20 + number}"), None) for number in range(count)]


def cascade(stub, timeout: float = 5.0, **more) -> Cascade:
    return cascade_of(CascadeSettings(endpoint(stub.url, "m", timeout), timeout=timeout, **more), CREDITMIX)


def test_a_budget_is_of_any_hour():
    now = [0.0]
    budget = Budget(5, lambda: now[0])
    assert budget.take(3) == 3
    now[0] = 1800.0
    assert budget.take(4) == 2
    assert budget.take(1) == 0
    now[0] = 3600.0
    assert budget.take(9) == 3
    now[0] = 5399.0
    assert budget.take(1) == 0
    now[0] = 5400.0
    assert budget.take(9) == 2
    assert Budget(None).take(10**6) == 10**6


def test_a_teacher_s_answers_are_understood(stub):
    replies = {
        "Age: 20": "Good",
        "Age: 21": "The answer: **bad**.",
        "Age: 22": "I cannot say",
        "Age: 23": error(400, "no"),
    }
    stub.reply = lambda body: replies[question_of(body).rpartition("\n")[2]]
    found = cascade(stub).ask(TASK, items(4))
    assert [reply.answer for reply in found] == ["Good", "Bad", None, None]
    assert found[0].tokens == (100, 10)
    assert "cannot be used: the answer must be one of" in found[2].reason
    assert "refuses the request (400: no)" in found[3].reason
    assert {body["temperature"] for body in stub.asked} == {0.0}


def test_beyond_the_budget_nothing_is_asked(stub):
    asking = cascade(stub, per_hour=3)
    found = asking.ask(TASK, items(5))
    assert [reply.answer for reply in found] == ["Good"] * 3 + [None] * 2
    assert found[4].reason == "the budget of 3 rows an hour is used up"
    assert [reply.answer for reply in asking.ask(TASK, items(1))] == [None]
    assert len(stub.asked) == 3


@pytest.mark.processes  # it waits for seconds
def test_a_late_answer_is_none(stub):
    stub.reply = lambda body: HANG if question_of(body).endswith("21") else "Good"
    found = cascade(stub, timeout=2.0).ask(TASK, items(3))
    assert [reply.answer for reply in found] == ["Good", None, "Good"]
    assert "nothing within 2 seconds" in found[1].reason
    assert len(stub.asked) == 3  # there is an answer already, so it is not tried again


@pytest.mark.processes
def test_a_request_waits_for_all_of_its_rows_together(stub, monkeypatch):
    """The rows that wait for a place at the endpoint are not asked for any more when the time is over."""

    def slow(body):
        time.sleep(0.5)
        return "Good"

    stub.reply = slow
    replies, done = cascade(stub, timeout=3.0).begin(TASK, items(100))
    done.result(LONGEST)
    assert 1 <= sum(reply.answer == "Good" for reply in replies) <= 48
    assert len(stub.asked) < 100
    assert replies[-1].reason == "the teacher has not answered within 3 seconds"


def test_a_teacher_that_fails_is_left_alone_for_a_while(stub, capsys, monkeypatch):
    stub.reply = lambda body: error(401, "wrong key")
    asking = cascade(stub)
    first = asking.ask(TASK, items(2))
    assert all("refuses the API key" in reply.reason for reply in first)
    assert "the student's own answers stand" in capsys.readouterr().err
    count = len(stub.asked)
    assert asking.ask(TASK, items(1))[0].reason == "the teacher has just failed, and is left alone for a while"
    assert len(stub.asked) == count
    stub.reply = lambda body: "Bad"
    monkeypatch.setattr(handing, "PAUSE", 0.0)
    later = time.monotonic() + 31
    monkeypatch.setattr(handing.time, "monotonic", lambda: later)
    assert asking.ask(TASK, items(1))[0].answer == "Bad"


def test_rows_that_are_not_sent_take_nothing_from_the_budget(stub, monkeypatch):
    stub.reply = lambda body: error(401, "wrong key")
    asking = cascade(stub, per_hour=3)
    assert "refuses the API key" in asking.ask(TASK, items(1))[0].reason
    replies, done = asking.begin(TASK, items(3))
    done.result(LONGEST)
    resting = "the teacher has just failed, and is left alone for a while"
    assert {reply.reason for reply in [*replies, *asking.ask(TASK, items(3))]} == {resting}
    stub.reply = lambda body: "Bad"
    later = time.monotonic() + handing.PAUSE + 1
    monkeypatch.setattr(handing.time, "monotonic", lambda: later)
    assert [reply.answer for reply in asking.ask(TASK, items(3))] == ["Bad", "Bad", None]


def test_nobody_is_loaded_before_a_row_is_unsure():
    made = []

    class Oracle:
        key = "oracle"

        def ask(self, questions, keep):
            for place, _ in enumerate(questions):
                keep(place, Answer("Standard"))

    def make():
        made.append(threading.get_ident())
        return Oracle()

    asking = Cascade(CascadeSettings(endpoint("http://localhost:1/v1", "m", 1.0)), make)
    assert asking.ask(TASK, []) == []
    assert not made
    assert [reply.answer for reply in asking.ask(TASK, items(2))] == ["Standard"] * 2
    asking.ask(TASK, items(1))
    assert len(made) == 1


def test_the_key_is_the_cascade_s_own(stub, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-theirs")
    monkeypatch.setenv("CASCADE_API_KEY", "sk-ours")
    cascade(stub).ask(TASK, items(1))
    assert {name.lower(): value for name, value in stub.headers[0].items()}["authorization"] == "Bearer sk-ours"


@pytest.mark.parametrize(
    ("url", "model", "words"),
    [
        ("localhost", "m", "the cascade's endpoint localhost is no address such as"),
        ("http://me:key@localhost/v1", "m", "must not hold a key"),
        ("http://localhost/v1", None, r"needs the model's name there \(--cascade_model, or CASCADE_MODEL\)"),
    ],
)
def test_an_endpoint_that_cannot_be(url, model, words):
    with pytest.raises(UserError, match=words):
        endpoint(url, model, 1.0)
