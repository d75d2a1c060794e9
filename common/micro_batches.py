"""A bounded queue that hands its jobs out in batches: those that may share a forward pass leave together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any


class QueueFull(Exception):
    """No room for another job."""


class QueueClosed(Exception):
    """The queue takes no more jobs."""


@dataclass(eq=False)
class Job:
    """Work for one request.

    Attributes:
        key: jobs with equal keys may share a batch.
        payload: what the worker needs.
        rows: the places it takes in the queue.
        tokens: about how much of a batch's budget it takes.
        urgent: may be taken by `take_urgent` while the worker is in the middle of something longer.
        abandoned: nobody waits for its answer any more.
    """

    key: Hashable
    payload: Any
    rows: int = 1
    tokens: int = 0
    urgent: bool = True
    abandoned: bool = False
    arrived: float = field(default_factory=time.monotonic)
    answer: Any = None
    waiter: Any = None  # whatever wakes the one who waits


class BatchQueue:
    """First come, first served by the oldest job; everything with its key comes along, up to a token budget.

    Args:
        max_rows: rows that wait at most; the job that reaches beyond is let in, the next one is not.
        max_batch_tokens: of a batch; one job always goes.
        max_wait: seconds that a batch short of its budget waits for company.
    """

    def __init__(self, max_rows: int, max_batch_tokens: int, max_wait: float = 0.0) -> None:
        self.max_rows, self.max_batch_tokens, self.max_wait = max_rows, max_batch_tokens, max_wait
        self.rows = 0  # waiting
        self._lanes: dict[Hashable, deque[Job]] = {}
        self._closed = False
        self._changed = threading.Condition()

    def put(self, job: Job) -> None:
        """Raises QueueFull or QueueClosed."""
        with self._changed:
            if self._closed:
                raise QueueClosed
            if self.rows >= self.max_rows:
                raise QueueFull
            self._lanes.setdefault(job.key, deque()).append(job)
            self.rows += job.rows
            self._changed.notify()

    def withdraw(self, job: Job) -> None:
        """Give up on a job: its place is free at once if it still waits, else the worker is told by `abandoned`."""
        with self._changed:
            job.abandoned = True
            lane = self._lanes.get(job.key)
            if lane and job in lane:
                lane.remove(job)
                self._left([job])

    def take(self) -> list[Job]:
        """The next batch; waits for one. Empty when the queue is closed and all its jobs are taken."""
        with self._changed:
            while not (lane := self._oldest()):
                if self._closed:
                    return []
                self._changed.wait()
            if self.max_wait:
                until = lane[0].arrived + self.max_wait
                key = lane[0].key
                while (
                    not self._closed
                    and sum(job.tokens for job in self._lanes.get(key, ())) < self.max_batch_tokens
                    and (left := until - time.monotonic()) > 0
                ):
                    self._changed.wait(left)
                lane = self._lanes.get(key) or self._oldest()  # all of its jobs may have been withdrawn
            return self._batch(lane) if lane else self.take()

    def take_urgent(self) -> list[Job]:
        """The next batch of urgent jobs, without waiting; empty when there is none."""
        with self._changed:
            lane = self._oldest(lambda job: job.urgent)
            return self._batch(lane) if lane else []

    def close(self) -> None:
        """Take no more jobs; those that wait are still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _oldest(self, fits: Callable[[Job], bool] = lambda job: True) -> deque[Job] | None:
        lanes = [lane for lane in self._lanes.values() if fits(lane[0])]
        return min(lanes, key=lambda lane: lane[0].arrived) if lanes else None

    def _batch(self, lane: deque[Job]) -> list[Job]:
        jobs = [lane.popleft()]
        tokens = jobs[0].tokens
        while lane and tokens + lane[0].tokens <= self.max_batch_tokens:
            tokens += lane[0].tokens
            jobs.append(lane.popleft())
        self._left(jobs)
        return jobs

    def _left(self, jobs: list[Job]) -> None:
        self.rows -= sum(job.rows for job in jobs)
        if not self._lanes[jobs[0].key]:
            del self._lanes[jobs[0].key]
