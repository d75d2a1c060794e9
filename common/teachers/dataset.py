"""What a teacher's answers become: KD rows, label probabilities or preference pairs; and what is rejected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data import tables
from common.files import atomic_write, write_json, write_jsonl
from common.teachers import preferences
from common.teachers.interview import Answer, Interview, Question, until_usable
from common.teachers.label_probabilities import distribution
from common.teachers.prompts import REASON_REQUEST, REASONS
from common.teachers.tasks import (
    Item,
    Labels,
    ParsedAnswer,
    TeacherTask,
    UnusableAnswer,
    understand,
)


@dataclass
class Written:
    """What comes out: rows for OUT, rejects, and for each answer (the first of several) its group and if it is gold."""

    rows: list[dict]
    rejects: list[dict]
    agreement: list[tuple[str | None, bool]]


def write_answers(
    task: TeacherTask,
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
    questions = [
        Question(item.number, [{"role": "user", "content": item.prompt + suffix}], ends=None if reasons else item.ends)
        for item in items
    ]

    def read(indices: list[int], answers: list[Answer]) -> list[ParsedAnswer]:
        if probabilities:
            return [_read_probabilities(task, answer) for answer in answers]
        return _read(task, [items[index] for index in indices], answers, bool(reasons))

    written = Written([], [], [])
    outcomes = until_usable(interview, questions, read, 1 if probabilities else max_tries)
    for item, outcome in zip(items, outcomes, strict=True):
        parsed = outcome.parsed
        if parsed.fault is not None:
            written.rejects.append(_rejected(item, parsed.fault, outcome.texts, parsed.unanswered))
        else:
            answer = {"teacher_output": parsed.answer, **parsed.extra}
            written.rows.append({"input": item.prompt, **answer, **item.kept})
            if reasons == "rows":
                asked = item.prompt + REASON_REQUEST
                group = {key: item.kept[key] for key in item.kept.keys() & {"group"}}
                written.rows.append({"input": asked, "teacher_output": parsed.extra["reason"], **group})
        if not parsed.unanswered and task.judged(item):
            written.agreement.append((item.kept.get("group"), _is_gold(task, item, parsed)))
    return written


def write_pairs(
    task: TeacherTask,
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
    questions = [
        Question(item.number, [{"role": "user", "content": item.prompt}], index % samples, item.ends)
        for index, item in enumerate(owners)
    ]
    replies = interview.ask(questions)
    answered = [index for index, answer in enumerate(replies) if isinstance(answer, Answer)]
    parsed = _read(task, [owners[index] for index in answered], [replies[index] for index in answered])
    parsed_at = dict(zip(answered, parsed, strict=True))
    written = Written([], [], [])
    whole, options, texts = [], [], []
    for number, item in enumerate(items):
        indices = range(number * samples, (number + 1) * samples)
        if missing := [replies[index] for index in indices if index not in parsed_at]:
            written.rejects.append(_rejected(item, missing[0].reason, [], not missing[0].lasting))
            continue
        whole.append(item)
        first = parsed_at[indices[0]]
        if task.judged(item):  # the side that is chosen by gold would always agree with it
            written.agreement.append((item.kept.get("group"), _is_gold(task, item, first)))
        texts.append([replies[index].text for index in indices])
        options.append(preferences.candidates(task, item, [parsed_at[index] for index in indices], texts[-1]))
    if by_teacher:
        pairs = preferences.ranked_by_teacher(interview, whole, options, max_tries)
    else:
        pairs = [preferences.best_and_worst(task, *known) for known in zip(whole, options, strict=True)]
    for item, pair, answers in zip(whole, pairs, texts, strict=True):
        if pair.fault:
            written.rejects.append(_rejected(item, pair.fault, answers, pair.unanswered))
        else:
            sides = {"chosen": pair.chosen, "rejected": pair.rejected}
            written.rows.append({"prompt": item.prompt, **sides, **item.kept})
    written.rejects.sort(key=lambda row: row["row"])
    return written


def _is_gold(task: TeacherTask, item: Item, answer: ParsedAnswer) -> bool:
    """Whether an answer agrees with gold; one that cannot be used does not."""
    return answer.fault is None and task.score(item, answer.answer) == 1


def _rejected(item: Item, fault: str, texts: Sequence[str], unanswered: bool) -> dict[str, Any]:
    """A line of OUT.rejects.jsonl."""
    why = {"row": item.number, "reason": fault, "unanswered": unanswered, "answers": list(texts)}
    return {**why, "input": item.prompt, **item.kept}


def _read(
    task: TeacherTask, items: Sequence[Item], answers: Sequence[Answer], reasons: bool = False
) -> list[ParsedAnswer]:
    """The answers to `items` as their task understands them."""
    parsed = [
        understand(task, item.prompt, answer.text, answer.finished, reasons)
        for item, answer in zip(items, answers, strict=True)
    ]
    return task.check(items, parsed)


def _read_probabilities(task: Labels, answer: Answer) -> ParsedAnswer:
    """The likeliest label and the probability of each: the local ranker's own, or from the first tokens."""
    if answer.probabilities is not None:
        return ParsedAnswer(answer.text, None, {"probabilities": answer.probabilities})
    try:
        probabilities, uncovered = distribution(answer.top_logprobs or [], task.task)
    except UnusableAnswer as error:
        return ParsedAnswer(None, str(error))
    extra = {"probabilities": probabilities, "uncovered_mass": uncovered}
    return ParsedAnswer(max(probabilities, key=probabilities.get), None, extra)


def save(out: str, written: Written, record: dict[str, Any]) -> list[str]:
    """Write OUT in the form of its name, its rejects where there are any, and its record last; returns the paths of a
    run's files."""
    with atomic_write(out, "wb") as handle:
        handle.write(tables.packed(written.rows, tables.form_of(out)))
    rejects = Path(f"{out}.rejects.jsonl")
    rejects.unlink(missing_ok=True)
    if written.rejects:
        write_jsonl(rejects, written.rejects)
    write_json(f"{out}.run.json", record)
    return [out, *([str(rejects)] if written.rejects else []), f"{out}.raw.jsonl", f"{out}.run.json"]
