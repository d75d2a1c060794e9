"""What a teacher's answers become: KD rows, label probabilities or preference pairs; and what is rejected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.teachers import preferences
from common.teachers.interview import Answer, Interview, Request, until_usable
from common.teachers.label_probabilities import distribution
from common.teachers.tasks import (
    REASON_REQUEST,
    REASONS,
    Code,
    Documents,
    Item,
    Labels,
    Reading,
    Unusable,
    understand,
)


@dataclass
class Written:
    """What comes out: rows for OUT, rejects, and for each answer (of a pair the chosen) its group and if it is gold."""

    rows: list[dict]
    rejects: list[dict]
    agreement: list[tuple[str | None, bool]]


def write_answers(
    task: Labels | Documents | Code,
    items: Sequence[Item],
    interview: Interview,
    *,
    max_tries: int,
    reasons: str | None = None,
    probabilities: bool = False,
) -> Written:
    """One KD row an item, as far as there is a usable answer.

    Args:
        max_tries: answers to one item until one is usable.
        reasons: "field" asks for reasons too and keeps them beside the answer, "rows" also as a row of its own.
        probabilities: the answers carry the labels' probabilities, or the likeliest first tokens.
    """
    suffix = REASONS if reasons else ""
    requests = [Request(item.number, [{"role": "user", "content": item.prompt + suffix}]) for item in items]

    def read(places: list[int], answers: list[Answer]) -> list[Reading]:
        if probabilities:
            return [_read_probabilities(task, answer) for answer in answers]
        return _read(task, [items[place] for place in places], answers, bool(reasons))

    written = Written([], [], [])
    outcomes = until_usable(interview, requests, read, 1 if probabilities else max_tries)
    for item, outcome in zip(items, outcomes, strict=True):
        reading = outcome.reading
        if reading.fault is not None:
            written.rejects.append(_rejected(item, reading.fault, outcome.texts, reading.unanswered))
        else:
            answer = {"teacher_output": reading.answer, **reading.extra}
            written.rows.append({"input": item.prompt, **answer, **item.kept})
            if reasons == "rows":
                asked = item.prompt + REASON_REQUEST
                group = {key: item.kept[key] for key in item.kept.keys() & {"group"}}
                written.rows.append({"input": asked, "teacher_output": reading.extra["reason"], **group})
        if not reading.unanswered and task.judged(item):  # an answer that cannot be used does not agree
            right = reading.fault is None and task.score(item, reading.answer) == 1
            written.agreement.append((item.kept.get("group"), right))
    return written


def write_pairs(
    task: Labels | Documents | Code,
    items: Sequence[Item],
    interview: Interview,
    *,
    samples: int,
    by_teacher: bool,
    max_tries: int,
) -> Written:
    """One DPO row an item, as far as its answers can be told apart.

    Args:
        samples: answers to each item.
        by_teacher: the teacher ranks its own answers, in `max_tries` at most.
    """
    owners = [item for item in items for _ in range(samples)]
    requests = [
        Request(item.number, [{"role": "user", "content": item.prompt}], place % samples)
        for place, item in enumerate(owners)
    ]
    found = interview.ask(requests)
    answered = [place for place, answer in enumerate(found) if isinstance(answer, Answer)]
    read = _read(task, [owners[place] for place in answered], [found[place] for place in answered])
    readings = dict(zip(answered, read, strict=True))
    written = Written([], [], [])
    whole, options, texts = [], [], []
    for number, item in enumerate(items):
        places = range(number * samples, (number + 1) * samples)
        if missing := [found[place] for place in places if place not in readings]:
            written.rejects.append(_rejected(item, missing[0].reason, [], not missing[0].lasting))
            continue
        some = [readings[place] for place in places]
        whole.append(item)
        texts.append([found[place].text for place in places])
        options.append(preferences.candidates(task, item, some, texts[-1]))
    if by_teacher:
        pairs = preferences.ranked_by_teacher(interview, whole, options, max_tries)
    else:
        pairs = [preferences.best_and_worst(task, item, each) for item, each in zip(whole, options, strict=True)]
    for item, pair, answers in zip(whole, pairs, texts, strict=True):
        if pair.fault:
            written.rejects.append(_rejected(item, pair.fault, answers, pair.unanswered))
        else:
            sides = {"chosen": pair.chosen, "rejected": pair.rejected}
            written.rows.append({"prompt": item.prompt, **sides, **item.kept})
            if task.judged(item):
                written.agreement.append((item.kept.get("group"), task.score(item, pair.chosen) == 1))
    written.rejects.sort(key=lambda row: row["row"])
    return written


def _rejected(item: Item, fault: str, texts: Sequence[str], unanswered: bool) -> dict[str, Any]:
    """A line of OUT.rejects.jsonl."""
    found = {"row": item.number, "reason": fault, "unanswered": unanswered, "answers": list(texts)}
    return {**found, "input": item.prompt, **item.kept}


def _read(
    task: Labels | Documents | Code, items: Sequence[Item], answers: Sequence[Answer], reasons: bool = False
) -> list[Reading]:
    """The answers to `items` as their task understands them."""
    readings = [
        understand(task, item.prompt, answer.text, answer.finished, reasons)
        for item, answer in zip(items, answers, strict=True)
    ]
    return task.check(items, readings)


def _read_probabilities(task: Labels, answer: Answer) -> Reading:
    """The likeliest label and the probability of each: the local ranker's own, or from the first tokens."""
    if answer.probabilities is not None:
        return Reading(answer.text, None, {"probabilities": answer.probabilities})
    try:
        found, uncovered = distribution(answer.top_logprobs or [], task.task)
    except Unusable as error:
        return Reading(None, str(error))
    return Reading(max(found, key=found.get), None, {"probabilities": found, "uncovered_mass": uncovered})
