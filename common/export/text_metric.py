"""What answers in text are worth by the metric of the task that a model was trained for, for a proof.

Each is a ratio of sums over rows: of an answer's parts, (numerator, denominator).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from common.cli import UserError
from common.data import squad, task_record
from common.generation.result import final_answer
from common.sandbox import grading
from common.tasks.codegen import answer, source
from common.tasks.codegen.rows import CodeProblem
from common.tasks.idp import field_metrics
from common.tasks.idp.metrics import EXACT, f1_parts


@dataclass(frozen=True)
class TextMetric:
    """A metric of answers in text.

    Attributes:
        name: "field_f1", "f1" or "pass_at_1".
        parts: of the answers to all rows, in their order: [rows, 2].
    """

    name: str
    parts: Callable[[Sequence[str]], np.ndarray]


def of_outputs(kind: str | None, outputs: Sequence[str]) -> TextMetric | None:
    """The metric of rows whose right answers are texts; None where only their likelihood can be judged.

    Args:
        kind: of the task that the model was trained for, one of `task_record.KINDS`.

    Raises:
        UserError: an output of IDP is no JSON.
    """
    if kind == task_record.IDP:
        gold = [_json(output) for output in outputs]
        if None in gold:
            raise UserError(
                f"the output of row {gold.index(None) + 1} is no JSON; give rows as idp_prepare.py writes them"
            )
        return TextMetric("field_f1", partial(_fields_right, gold))
    if kind == task_record.SQUAD:
        return TextMetric("f1", partial(_words_right, outputs))
    return None


def of_problems(problems: Sequence[CodeProblem]) -> TextMetric:
    """pass@1 of code, which is run in the sandbox."""
    return TextMetric("pass_at_1", partial(_passed, problems))


def _fields_right(gold: Sequence[Any], answers: Sequence[str]) -> np.ndarray:
    leaves = [field_metrics.compare(fields, _json(text)) for fields, text in zip(gold, answers, strict=True)]
    return f1_parts(field_metrics.counts(leaves, EXACT))


def _json(text: str) -> Any:
    """The value in an answer; one that is no JSON has none."""
    try:
        return json.loads(final_answer(text))
    except (ValueError, RecursionError):
        return None


def _words_right(gold: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    return np.array([(squad.f1(text, [output]), 1.0) for output, text in zip(gold, answers, strict=True)])


def _passed(problems: Sequence[CodeProblem], answers: Sequence[str]) -> np.ndarray:
    pairs = []
    for problem, text in zip(problems, answers, strict=True):
        code, _ = answer.read_chat(problem.prompt, final_answer(text), finished=True)
        pairs.append((source.without_usage(code), problem.graded_by()))
    verdicts = grading.grade_many(pairs)
    return np.array([(float(verdict.passed), 1.0) for verdict in verdicts])
