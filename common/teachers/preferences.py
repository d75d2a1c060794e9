"""Preference pairs from several answers to one question: the best and the worst of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from common.generation.result import final_answer
from common.teachers.interview import Answer, Interview, Request, until_usable
from common.teachers.tasks import Code, Documents, Item, Labels, Reading

RANK = (
    "Here is a task, and {count} answers to it.\n\nTask:\n{prompt}\n\n{answers}\n\n"
    "Which answer is the best, and which the worst? Reply with two lines and nothing else:\n"
    "Best: NUMBER\nWorst: NUMBER"
)
SAME = "all answers are the same; raise --num_samples or --temperature"
EQUAL = "the answers differ, but are equally good as far as can be told; pass --rank_by teacher"
_RANKED = re.compile(r"best\W*?(\d+)\b.*?worst\W*?(\d+)\b", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Candidate:
    """One answer to a row: as a training row would have it (the raw text where it cannot be used), and how good it is.

    Attributes:
        quality: (usable, score against gold or 0, understood); compared in this order.
    """

    text: str
    quality: tuple[bool, float, bool]


@dataclass(frozen=True)
class Pair:
    """`chosen` and `rejected`, or `fault`: why there is no pair."""

    chosen: str = ""
    rejected: str = ""
    fault: str | None = None
    unanswered: bool = False


def candidates(
    task: Labels | Documents | Code, item: Item, readings: Sequence[Reading], texts: Sequence[str]
) -> list[Candidate]:
    """The different answers to one row, in order."""
    found = {}
    for reading, text in zip(readings, texts, strict=True):
        usable = reading.fault is None
        score = task.score(item, reading.answer) if usable and task.judged(item) else 0.0
        shown = reading.answer if reading.answer is not None else text.strip()
        if shown:  # an empty answer is nothing to train on
            found.setdefault(shown, Candidate(shown, (usable, score, reading.answer is not None)))
    return [*found.values()]


def best_and_worst(task: Labels | Documents | Code, item: Item, found: Sequence[Candidate]) -> Pair:
    """The best and the worst by what the task can tell: usable or not, right or not, understood or not."""
    if not found:
        return Pair(fault="the teacher gave no answer with text")
    best = max(found, key=lambda each: each.quality)
    worst = min(found, key=lambda each: each.quality)
    usable, score, _ = best.quality
    if not usable:
        return Pair(fault="none of the answers can be used")
    if score == 0 and task.judged(item):
        return Pair(fault="none of the answers agrees with gold")
    if best.quality == worst.quality:
        return Pair(fault=SAME if len(found) == 1 else EQUAL)
    return Pair(best.text, worst.text)


def ranked_by_teacher(
    interview: Interview, items: Sequence[Item], found: Sequence[Sequence[Candidate]], max_tries: int
) -> list[Pair]:
    """The best and the worst usable answer of each row in the teacher's own judgement.

    Without two usable answers there is nothing to ask; the raw one that cannot be used is then the worst.
    """
    usable = [[each for each in some if each.quality[0]] for some in found]
    asked = [place for place, some in enumerate(usable) if len(some) > 1]
    requests = [
        Request(items[place].number, [{"role": "user", "content": _question(items[place], usable[place])}])
        for place in asked
    ]

    def read(places: list[int], answers: list[Answer]) -> list[Reading]:
        return [_ranking(answer.text, len(usable[asked[place]])) for place, answer in zip(places, answers, strict=True)]

    outcomes = dict(zip(asked, until_usable(interview, requests, read, max_tries), strict=True))
    pairs = []
    for place, (some, every) in enumerate(zip(usable, found, strict=True)):
        if place in outcomes:
            reading = outcomes[place].reading
            if reading.fault:
                pairs.append(Pair(fault=f"no ranking: {reading.fault}", unanswered=reading.unanswered))
            else:
                best, worst = map(int, reading.answer.split())
                pairs.append(Pair(some[best - 1].text, some[worst - 1].text))
        elif some and len(every) > 1:
            pairs.append(Pair(some[0].text, min(every, key=lambda each: each.quality).text))
        elif some:
            pairs.append(Pair(fault=SAME))
        else:
            pairs.append(Pair(fault="none of the answers can be used"))
    return pairs


def _question(item: Item, some: Sequence[Candidate]) -> str:
    answers = "\n\n".join(f"Answer {number}:\n{each.text}" for number, each in enumerate(some, start=1))
    return RANK.format(count=len(some), prompt=item.prompt, answers=answers)


def _ranking(text: str, count: int) -> Reading:
    """ "best worst" as numbers from 1."""
    match = _RANKED.search(final_answer(text))
    best, worst = map(int, match.groups()) if match else (0, 0)
    if best == worst or not {best, worst} <= set(range(1, count + 1)):
        return Reading(None, f"two different numbers from 1 to {count} are needed, of the best and the worst answer")
    return Reading(f"{best} {worst}")
