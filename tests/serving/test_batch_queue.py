"""The queue in front of a model: what leaves together, in which order, and when."""

from __future__ import annotations

import itertools
import time

import pytest

from common.serving.batch_queue import BatchQueue, QueuedRequest

_numbers = itertools.count(1)


def put(queue: BatchQueue, *keys: str, tokens: int = 10, **more) -> list[QueuedRequest]:
    requests = [QueuedRequest(next(_numbers), key, key, tokens=tokens, **more) for key in keys]
    for request in requests:
        queue.put(request)
    return requests


def test_the_oldest_goes_first_and_takes_its_like_along():
    queue = BatchQueue(1000)
    a1, b1, a2, c1, b2 = put(queue, "a", "b", "a", "c", "b")
    assert len(queue) == 5
    assert [queue.take(), queue.take(), queue.take(), queue.take()] == [[a1, a2], [b1, b2], [c1], []]
    assert len(queue) == 0


def test_a_batch_keeps_to_its_tokens():
    queue = BatchQueue(25)
    requests = put(queue, *"aaaaa")
    assert [queue.take(), queue.take(), queue.take()] == [requests[:2], requests[2:4], requests[4:]]
    large = put(queue, "a", tokens=9999)
    assert queue.take() == large  # one always goes


def like(key: str) -> str:
    """Keys of one letter, in upper and lower case, are kin."""
    return key.lower()


def test_requests_of_kin_keys_make_one_pass_in_the_order_they_came_in():
    queue = BatchQueue(1000, kin=like)
    queue.pass_tokens = 50
    a1, b1, other, a2, *rest, last = put(queue, *"abAaAAA")
    assert queue.take() == [a1, other, a2, *rest]
    assert [queue.take(), queue.take()] == [[b1], [last]]


def test_requests_of_one_key_that_are_half_a_pass_need_no_company():
    queue = BatchQueue(100, kin=like)
    queue.pass_tokens = 50
    put(queue, "A")
    requests = put(queue, "a", "a", "a", arrived=time.monotonic() - 1)
    assert queue.take() == requests
    assert len(queue.take()) == 1


def test_requests_of_one_key_make_a_batch_as_large_as_ever():
    queue = BatchQueue(60, kin=like)
    queue.pass_tokens = 90
    requests = put(queue, *"aaaaaaa")
    assert [queue.take(), queue.take()] == [requests[:6], requests[6:]]


def test_urgent_requests_take_their_kin_along():
    queue = BatchQueue(1000, kin=like)
    (slow,) = put(queue, "s", urgent=False)
    quick = put(queue, "a", "A")
    assert [queue.take(urgent=True), queue.take(urgent=True), queue.take()] == [quick, [], [slow]]


def test_a_batch_of_kin_keys_waits_for_company_until_it_is_a_pass():
    queue = BatchQueue(1000, max_wait=30, kin=like)
    queue.pass_tokens = 50
    put(queue, *"abAA")
    assert queue.due() == pytest.approx(30, abs=5)
    put(queue, *"aA")
    assert queue.due() == 0


def test_a_withdrawn_job_is_not_handed_out():
    queue = BatchQueue(1000)
    first, second, other = put(queue, "a", "a", "b")
    assert queue.withdraw(first.number)
    assert not queue.withdraw(first.number)
    assert queue.withdraw(other.number)
    assert [queue.take(), queue.take()] == [[second], []]
    assert not queue.withdraw(second.number)  # it is being worked on


def test_urgent_requests_can_be_taken_first():
    queue = BatchQueue(1000)
    assert queue.take(urgent=True) == []
    (slow,) = put(queue, "s", urgent=False)
    assert queue.take(urgent=True) == []
    quick = put(queue, "a", "a")
    assert [queue.take(urgent=True), queue.take()] == [quick, [slow]]


def test_without_a_wait_a_batch_is_due_at_once():
    queue = BatchQueue(1000)
    assert queue.due() is None
    put(queue, "a")
    assert queue.due() == 0


@pytest.mark.parametrize(("waited", "keys", "due"), [(0, "ab", 30), (12, "ab", 18), (31, "a", 0), (0, "aba", 0)])
def test_a_batch_waits_for_company_until_it_is_full_or_late(waited, keys, due):
    queue = BatchQueue(20, max_wait=30)
    put(queue, *keys, arrived=time.monotonic() - waited)
    assert queue.due() == pytest.approx(due, abs=5)


def test_requests_join_a_batch_of_their_key_until_another_one_has_waited_longer():
    queue = BatchQueue(1000)
    put(queue, "quick")  # urgent ones go between steps
    s1, s2, s3 = put(queue, "s", "s", "s", urgent=False)
    assert queue.join("t", 1000) == []
    assert queue.join("s", 25) == [s1, s2]
    (other,) = put(queue, "t", urgent=False)
    (late,) = put(queue, "s", urgent=False)
    assert queue.join("s", 1000) == [s3]
    assert queue.join("s", 1000) == []
    assert [queue.join("t", 1000), queue.join("s", 1000)] == [[other], [late]]
