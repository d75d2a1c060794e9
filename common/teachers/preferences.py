"""Preference pairs from several answers to one question: the best and the worst of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from common.generation.result import final_answer
from common.teachers.interview import Answer, Interview, Question, until_usable
from common.teachers.prompts import RANK
from common.teachers.tasks import Item, ParsedAnswer, TeacherTask

SAME = "all answers are the same; raise --num_samples or --temperature"
EQUAL = "the answers differ, but are equally good as far as can be told; pass --rank_by teacher"
_RANKED = re.compile(r"best\W*?(\d+)\b.*?worst\W*?(\d+)\b", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Candidate:
    """One answer to a row: as a training row would have it (what cannot be used, without its thinking), and how good.

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


def candidates(task: TeacherTask, item: Item, answers: Sequence[ParsedAnswer], texts: Sequence[str]) -> list[Candidate]:
    """The different answers to one row, in order."""
    different: dict[str, Candidate] = {}
    for parsed, text in zip(answers, texts, strict=True):
        usable = parsed.fault is None
        score = task.score(item, parsed.answer) if usable and task.judged(item) else 0.0
        shown = parsed.answer if parsed.answer is not None else final_answer(text).strip()
        if shown:  # an empty answer is nothing to train on
            different.setdefault(shown, Candidate(shown, (usable, score, parsed.answer is not None)))
    return [*different.values()]


def best_and_worst(task: TeacherTask, item: Item, options: Sequence[Candidate]) -> Pair:
    """The best and the worst by what the task can tell: usable or not, right or not, understood or not."""
    if not options:
        return Pair(fault="the teacher gave no answer with text")
    best = max(options, key=lambda option: option.quality)
    worst = min(options, key=lambda option: option.quality)
    usable, score, _ = best.quality
    if not usable:
        return Pair(fault="none of the answers can be used")
    if score == 0 and task.judged(item):
        return Pair(fault="none of the answers agrees with gold")
    if best.quality == worst.quality:
        return Pair(fault=SAME if len(options) == 1 else EQUAL)
    return Pair(best.text, worst.text)


def ranked_by_teacher(
    interview: Interview, items: Sequence[Item], options: Sequence[Sequence[Candidate]], max_tries: int
) -> list[Pair]:
    """The best and the worst usable answer of each row in the teacher's own judgement.

    Without two usable answers there is nothing to ask; the raw one that cannot be used is then the worst.

    Args:
        options: the different answers to each item.
    """
    usable = [[option for option in of_item if option.quality[0]] for of_item in options]
    asked = [index for index, of_item in enumerate(usable) if len(of_item) > 1]
    questions = [
        Question(items[index].number, [{"role": "user", "content": _question(items[index], usable[index])}])
        for index in asked
    ]

    def read(indices: list[int], answers: list[Answer]) -> list[ParsedAnswer]:
        return [
            _ranking(answer.text, len(usable[asked[index]])) for index, answer in zip(indices, answers, strict=True)
        ]

    outcomes = dict(zip(asked, until_usable(interview, questions, read, max_tries), strict=True))
    pairs = []
    for index, (good, every) in enumerate(zip(usable, options, strict=True)):
        if index in outcomes:
            parsed = outcomes[index].parsed
            if parsed.fault:
                pairs.append(Pair(fault=f"no ranking: {parsed.fault}", unanswered=parsed.unanswered))
            else:
                best, worst = map(int, parsed.answer.split())
                pairs.append(Pair(good[best - 1].text, good[worst - 1].text))
        elif good and len(every) > 1:
            pairs.append(Pair(good[0].text, min(every, key=lambda option: option.quality).text))
        elif good:
            pairs.append(Pair(fault=SAME))
        else:
            pairs.append(Pair(fault="none of the answers can be used"))
    return pairs


def _question(item: Item, options: Sequence[Candidate]) -> str:
    answers = "\n\n".join(f"Answer {number}:\n{option.text}" for number, option in enumerate(options, start=1))
    return RANK.format(count=len(options), prompt=item.prompt, answers=answers)


def _ranking(text: str, count: int) -> ParsedAnswer:
    """ "best worst" as numbers from 1."""
    match = _RANKED.search(final_answer(text))
    best, worst = map(int, match.groups()) if match else (0, 0)
    if best == worst or not {best, worst} <= set(range(1, count + 1)):
        return ParsedAnswer(
            None, f"two different numbers from 1 to {count} are needed, of the best and the worst answer"
        )
    return ParsedAnswer(f"{best} {worst}")
