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
        ends: task, answer so far -> whether its code is complete.
        plan_ends: the same of a plan.
        read: task, answer, whether it ended by itself -> (code, whether that is cut off).
        read_plan: answer -> plan.
    """

    direct: Callable[[str], str]
    plan: Callable[[str], str]
    code: Callable[[str, str], str]
    ends: Callable[[str, str], bool]
    plan_ends: Callable[[str], bool]
    read: Callable[[str, str, bool], tuple[str, bool]]
    read_plan: Callable[[str], str]


CHAT = Style(
    prompt.direct_prompt,
    prompt.plan_prompt,
    prompt.code_prompt,
    lambda task, text: answer.answer_ends(text, prompt.names_asked_for(task)),
    answer.plan_ends,
    answer.read_chat,
    answer.plan_of,
)
COMPLETION = Style(
    prompt.docstring_prompt,
    prompt.comment_prompt,
    prompt.docstring_prompt,
    lambda task, text: answer.code_end(text) is not None,
    answer.comment_plan_ends,
    answer.continued_code,
    answer.comment_plan,
)
