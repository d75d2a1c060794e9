"""How a kind of model is asked for code, and how its answers are read: in chat turns, or as text to continue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from common.tasks.codegen import answer, prompt


@dataclass(frozen=True)
class Style:
    """How a kind of model is asked, and how its answers are read.

    Attributes:
        direct: task -> prompt for code.
        plan: task -> prompt for a plan.
        code: task, plan -> prompt for the code of the plan.
        ends: whether the code in an answer so far is complete.
        plan_ends: the same of a plan.
        read: task, answer, whether it ended by itself -> code.
        read_plan: answer -> plan.
    """

    direct: Callable[[str], str]
    plan: Callable[[str], str]
    code: Callable[[str, str], str]
    ends: Callable[[str], bool]
    plan_ends: Callable[[str], bool]
    read: Callable[[str, str, bool], str]
    read_plan: Callable[[str], str]


CHAT = Style(
    prompt.direct_prompt,
    prompt.plan_prompt,
    prompt.code_prompt,
    answer.answer_ends,
    answer.plan_ends,
    lambda task, text, finished: answer.code_of(text),
    answer.plan_of,
)
COMPLETION = Style(
    prompt.docstring_prompt,
    prompt.comment_prompt,
    prompt.docstring_prompt,
    lambda text: answer.code_end(text) is not None,
    answer.comment_plan_ends,
    answer.continued_code,
    answer.comment_plan,
)
