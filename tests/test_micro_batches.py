"""The bounded queue: what leaves together, in which order, and what finds no room."""

from __future__ import annotations

import threading
import time

import pytest

from common.micro_batches import BatchQueue, Job, QueueClosed, QueueFull


def put(queue: BatchQueue, *keys: str, tokens: int = 10, **more) -> list[Job]:
    jobs = [Job(key, key, tokens=tokens, **more) for key in keys]
    for job in jobs:
        queue.put(job)
    return jobs


def test_the_oldest_goes_first_and_takes_its_like_along():
    queue = BatchQueue(100, 1000)
    a1, b1, a2, c1, b2 = put(queue, "a", "b", "a", "c", "b")
    assert [queue.take(), queue.take(), queue.take()] == [[a1, a2], [b1, b2], [c1]]
    assert queue.rows == 0


def test_a_batch_keeps_to_its_tokens():
    queue = BatchQueue(100, 25)
    jobs = put(queue, *"aaaaa")
    assert [queue.take(), queue.take(), queue.take()] == [jobs[:2], jobs[2:4], jobs[4:]]
    large = put(queue, "a", tokens=9999)
    assert queue.take() == large  # one always goes


def test_no_room():
    queue = BatchQueue(3, 1000)
    put(queue, "a", "b")
    queue.put(Job("c", None, rows=5))  # there was room when it came
    assert queue.rows == 7
    with pytest.raises(QueueFull):
        put(queue, "a")
    queue.take()
    queue.take()
    with pytest.raises(QueueFull):
        put(queue, "a")
    queue.take()
    put(queue, "a")


def test_a_withdrawn_job_frees_its_place():
    queue = BatchQueue(2, 1000)
    first, second = put(queue, "a", "a")
    queue.withdraw(first)
    assert (queue.rows, first.abandoned) == (1, True)
    (third,) = put(queue, "b")
    queue.withdraw(second)
    assert [queue.take(), queue.rows] == [[third], 0]
    queue.withdraw(third)  # it is being worked on
    assert (queue.rows, third.abandoned) == (0, True)


def test_urgent_jobs_can_be_taken_first():
    queue = BatchQueue(100, 1000)
    assert queue.take_urgent() == []
    (slow,) = put(queue, "s", urgent=False)
    assert queue.take_urgent() == []
    quick = put(queue, "a", "a")
    assert [queue.take_urgent(), queue.take()] == [quick, [slow]]


def test_closing_hands_out_what_was_accepted():
    queue = BatchQueue(100, 1000)
    jobs = put(queue, "a")
    queue.close()
    with pytest.raises(QueueClosed):
        put(queue, "a")
    assert [queue.take(), queue.take()] == [jobs, []]


@pytest.mark.parametrize("ends", ["a job comes", "it is closed"])
def test_taking_waits(ends):
    queue = BatchQueue(100, 1000)
    taken: list = []
    thread = threading.Thread(target=lambda: taken.append(queue.take()))
    thread.start()
    jobs = put(queue, "a") if ends == "a job comes" else queue.close()
    thread.join(10)
    assert taken == [jobs or []]


def test_a_batch_waits_for_company_until_it_is_full():
    queue = BatchQueue(100, 20, max_wait=30)
    taken: list = []
    thread = threading.Thread(target=lambda: taken.append(queue.take()))
    jobs = put(queue, "a")
    thread.start()
    time.sleep(0.05)
    assert taken == []
    jobs += put(queue, "b", "a")
    thread.join(10)
    assert taken == [[jobs[0], jobs[2]]]


def test_all_that_was_waited_for_is_withdrawn():
    queue = BatchQueue(100, 20, max_wait=0.1)
    taken: list = []
    (job,) = put(queue, "a")
    thread = threading.Thread(target=lambda: taken.append(queue.take()))
    thread.start()
    time.sleep(0.02)
    queue.withdraw(job)
    (other,) = put(queue, "b")
    thread.join(10)
    assert taken == [[other]]
