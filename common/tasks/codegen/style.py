"""How a kind of model is asked for code, and how its answers are read: in chat turns, or as text to continue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from common.tasks.codegen import answer, prompt


@dataclass(frozen=True)
class Style:
    """How a kind of model is asked, and how its answers are read.

    Attributes:
        chat: in turns of its chat template, not as text to continue.
        direct: task -> prompt for code.
        plan: task -> prompt for a plan.
        code: task, plan -> prompt for the code of the plan.
        ends: task, answer so far -> whether its code is complete.
        plan_ends: the same of a plan.
        read: task, answer, whether it ended by itself -> (code, whether that is cut off).
        read_plan: answer -> plan.
    """

    chat: bool
    direct: Callable[[str], str]
    plan: Callable[[str], str]
    code: Callable[[str, str], str]
    ends: Callable[[str, str], bool]
    plan_ends: Callable[[str], bool]
    read: Callable[[str, str, bool], tuple[str, bool]]
    read_plan: Callable[[str], str]


def chat_style(plan_request: str, code_request: str) -> Style:
    """How a model is asked in turns.

    Args:
        plan_request: what asks for a plan, after the task.
        code_request: what asks for the code, after the task and the plan.
    """
    return Style(
        chat=True,
        direct=prompt.direct_prompt,
        plan=partial(prompt.plan_prompt, request=plan_request),
        code=partial(prompt.code_prompt, request=code_request),
        ends=lambda task, text: answer.answer_ends(text, prompt.names_asked_for(task)),
        plan_ends=answer.plan_ends,
        read=answer.read_chat,
        read_plan=answer.plan_of,
    )


CHAT = chat_style(prompt.PLAN_REQUEST, prompt.CODE_REQUEST)  # of adapters that were trained on these requests
UNTRAINED = chat_style(prompt.SHOWN_PLAN_REQUEST, prompt.SHOWN_CODE_REQUEST)  # of any other model that takes turns
COMPLETION = Style(
    chat=False,
    direct=prompt.docstring_prompt,
    plan=prompt.comment_prompt,
    code=prompt.docstring_prompt,
    ends=lambda task, text: answer.code_end(text) is not None,
    plan_ends=answer.comment_plan_ends,
    read=answer.continued_code,
    read_plan=answer.comment_plan,
)


def trained_style(endings: Sequence[str] | None) -> Style:
    """How a trained model is asked: with the requests of its training rows, else as one that was not trained on them.

    Args:
        endings: what its training prompts ended with (`run_record`); None for a run that has no record of that, whose
            requests were those of `CHAT`.
    """
    if endings is None:
        return CHAT
    plan = next((ending for ending in endings if "<PLAN>" in ending), None)
    code = next((ending for ending in endings if "<CODE>" in ending), None)
    return chat_style(plan or prompt.SHOWN_PLAN_REQUEST, code or prompt.SHOWN_CODE_REQUEST)
