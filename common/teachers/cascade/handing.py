"""Rows that are handed on to a teacher: within a budget and a time, and never with an error, as there is an answer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from common.cli import UserError, log
from common.generation.decoding import Decoding
from common.tasks.ranking.task import LabelTask
from common.teachers.cascade.settings import ANSWER_TOKENS, CascadeSettings
from common.teachers.interview import Answer, NoAnswer, Question, Teacher
from common.teachers.settings import EndpointSettings
from common.teachers.tasks import Item, TeacherTask, understand

HOUR = 3600.0  # seconds
PAUSE = 30.0  # seconds in which a teacher that has failed is not asked
AT_ONCE = 8  # calls; each asks about the rows of one request
ASKED_TOGETHER = 16  # unsure answers of a file that a teacher is asked about at a time

Own = TypeVar("Own")
Answered = TypeVar("Answered")


@dataclass(frozen=True)
class Reply:
    """What came of a row that was handed on.

    Attributes:
        answer: the teacher's, in the form of training rows; None where there is none.
        reason: why there is none.
        tokens: of prompt and answer, where the teacher tells.
    """

    answer: str | None = None
    reason: str | None = None
    tokens: tuple[int, int] | None = None


class Budget:
    """At most so many in any hour.

    Args:
        per_hour: None for any number.
        clock: seconds.
    """

    def __init__(self, per_hour: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_hour, self.clock = per_hour, clock
        self._taken: deque[tuple[float, int]] = deque()  # when, and how many
        self._lock = threading.Lock()

    def take(self, wanted: int) -> int:
        """How many of `wanted` may go now."""
        if self.per_hour is None:
            return wanted
        with self._lock:
            now = self.clock()
            while self._taken and self._taken[0][0] <= now - HOUR:
                self._taken.popleft()
            granted = max(0, min(wanted, self.per_hour - sum(count for _, count in self._taken)))
            if granted:
                self._taken.append((now, granted))
            return granted


class _Late(Exception):
    """Nobody waits for the rest of the answers."""


class Cascade:
    """A teacher that is asked about some rows; safe to be used by several threads.

    Args:
        make: makes the teacher, when it is needed first.
    """

    def __init__(self, settings: CascadeSettings, make: Callable[[], Teacher]) -> None:
        self.settings, self.name = settings, settings.name
        self.budget = Budget(settings.per_hour)
        self._make = make
        self._teacher: Teacher | None = None
        self._lock = threading.Lock()
        self._paused_until = float("-inf")
        self._late = Reply(reason=f"the teacher has not answered within {settings.timeout:g} seconds")
        self._pool = ThreadPoolExecutor(AT_ONCE, "cascade")

    def ask(self, task: TeacherTask, items: Sequence[Item]) -> list[Reply]:
        """The replies to `items`, once all have come or are given up."""
        replies = [self._late] * len(items)
        self._ask(task, items, replies)
        return replies

    def begin(self, task: TeacherTask, items: Sequence[Item]) -> tuple[list[Reply], Future[None]]:
        """Start to ask about `items`: their replies, which fill up as answers come, and when all have come.

        After the time-out no more are asked for.
        """
        replies = [self._late] * len(items)
        deadline = time.monotonic() + self.settings.timeout
        return replies, self._pool.submit(self._ask, task, items, replies, deadline)

    async def replies_in_time(self, task: TeacherTask, items: Sequence[Item]) -> list[Reply]:
        """The replies to `items`, after the time-out at the latest."""
        replies, done = self.begin(task, items)
        await asyncio.wait([asyncio.wrap_future(done)], timeout=self.settings.timeout)
        return list(replies)

    def opened(self, count: int) -> tuple[list[Reply], int]:
        """Replies that say why there is no answer yet, and how many of them, from the first on, may be asked for."""
        granted = self.budget.take(count)
        over = Reply(reason=f"the budget of {self.settings.per_hour} rows an hour is used up")
        return [self._late] * granted + [over] * (count - granted), granted

    def close(self) -> None:
        """Ask for nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ask(
        self, task: TeacherTask, items: Sequence[Item], replies: list[Reply], deadline: float = float("inf")
    ) -> None:
        """Fill in the replies; only rows that are sent are taken from the budget."""

        def keep(index: int, answer: Answer | NoAnswer) -> None:
            if time.monotonic() > deadline:
                raise _Late
            replies[index] = read(task, items[index], answer)

        if not items or time.monotonic() > deadline:
            return
        if time.monotonic() < self._paused_until:
            resting = Reply(reason="the teacher has just failed, and is left alone for a while")
            replies[:] = [resting] * len(items)
            return
        replies[:], granted = self.opened(len(items))
        questions = [Question(item.number, [{"role": "user", "content": item.prompt}]) for item in items[:granted]]
        try:
            if questions:
                self._ready().ask(questions, keep)
        except _Late:
            return
        except UserError as error:
            self._paused_until = time.monotonic() + PAUSE
            log(f"cascade: {error}; the student's own answers stand")
            for index in range(granted):
                if replies[index].answer is None:
                    replies[index] = Reply(reason=str(error))

    def _ready(self) -> Teacher:
        with self._lock:
            if self._teacher is None:
                self._teacher = self._make()
            return self._teacher


def in_turn(
    answers: Iterable[Own],
    is_unsure: Callable[[Own], bool],
    stands: Callable[[Own], Answered],
    asked: Callable[[list[Own]], Iterable[Answered]],
) -> Iterator[Answered]:
    """A student's answers as they come; unsure ones wait until a teacher can be asked about several together.

    Args:
        stands: what a sure answer becomes.
        asked: what unsure ones become, after the teacher was asked.
    """
    unsure: list[Own] = []
    for answer in answers:
        if not is_unsure(answer):
            yield stands(answer)
            continue
        unsure.append(answer)
        if len(unsure) == ASKED_TOGETHER:
            yield from asked(unsure)
            unsure = []
    if unsure:
        yield from asked(unsure)


def read(task: TeacherTask, item: Item, answer: Answer | NoAnswer) -> Reply:
    """A teacher's answer as its task understands it."""
    if isinstance(answer, NoAnswer):
        return Reply(reason=answer.reason)
    parsed = understand(task, item.prompt, answer.text, answer.finished, reasons=False)
    known = answer.prompt_tokens is not None and answer.completion_tokens is not None
    tokens = (answer.prompt_tokens, answer.completion_tokens) if known else None
    if parsed.fault is not None:
        return Reply(reason=f"the teacher's answer cannot be used: {parsed.fault}", tokens=tokens)
    return Reply(parsed.answer, tokens=tokens)


def cascade_of(settings: CascadeSettings, ranked: LabelTask | None) -> Cascade:
    """The cascade to the settings' teacher, which is loaded when it is needed first.

    Args:
        ranked: a label task, whose labels a local teacher ranks; None: it writes its answers.
    """
    from common.teachers import build

    decoding, teacher = Decoding(ANSWER_TOKENS), settings.teacher
    if isinstance(teacher, EndpointSettings):
        return Cascade(settings, lambda: build.endpoint_teacher(teacher, decoding, None))
    return Cascade(settings, lambda: build.local_teacher(teacher, decoding, ranked))
