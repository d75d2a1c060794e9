"""Chats as files have them: messages with a role and a content, or ShareGPT's with from and value, as one kind of turn.

A turn is {"role": "system", "user" or "assistant", "content": text}, and "weight": 0 where an assistant's is read only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.data.rows import text_fault

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = {"system": SYSTEM, "developer": SYSTEM, "user": USER, "human": USER, "assistant": ASSISTANT, "gpt": ASSISTANT}
FORMS = (("role", "content"), ("from", "value"))  # OpenAI's, ShareGPT's

Turn = dict[str, Any]


def of(value: Any, key: str) -> list[Turn]:
    """The turns of a list of messages, or of a single message; system turns without a text are passed over.

    Raises:
        ValueError: it is none, has no text, or what a text model cannot be taught: tools, images, an unknown role.
    """
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'{key}' must be a list of turns")
    turns = [_turn(message, f"turn {number} of '{key}'") for number, message in enumerate(messages, start=1)]
    if not any(turns):
        raise ValueError(f"'{key}' has no turn with a text")
    return [turn for turn in turns if turn]


def of_text(value: Any, key: str, role: str) -> list[Turn]:
    """The turns of a text that is one, or of a list of messages (see `of`). Raises ValueError."""
    if not isinstance(value, str):
        return of(value, key)
    if fault := text_fault(value, key):
        raise ValueError(fault)
    return [{"role": role, "content": value}]


def _turn(message: Any, name: str) -> Turn | None:
    form = next((form for form in FORMS if isinstance(message, dict) and form[0] in message), None)
    if form is None:
        raise ValueError(f"{name} needs a role and a content, or from and value")
    given = message[form[0]]
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None or message.get("tool_calls") or message.get("function_call"):
        what = "calls a tool" if role else f"is of the role {str(given)[:40]!r}"
        raise ValueError(f"{name} {what}; system, user and assistant turns with a text are trained")
    content = _text(message.get(form[1]), name)
    if role == SYSTEM and (content is None or (isinstance(content, str) and not content.strip())):
        return None
    if fault := text_fault(content, form[1]):
        raise ValueError(f"{name}: {fault}")
    weight = message.get("weight")
    if weight is not None and (role != ASSISTANT or isinstance(weight, str) or weight not in (0, 1)):
        raise ValueError(f"{name}: 'weight' must be 0 or 1, on an assistant's turn")
    return {"role": role, "content": content} | ({"weight": 0} if weight == 0 and weight is not None else {})


def _text(content: Any, name: str) -> Any:
    """A content that comes in parts as one text."""
    if not isinstance(content, list):
        return content
    parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{name} holds something else than text")
    return "".join(parts)


def unlearnt(turns: Sequence[Turn]) -> list[Turn]:
    """The same turns, none of whose answers is learnt."""
    return [turn | {"weight": 0} if turn["role"] == ASSISTANT else turn for turn in turns]


def prompt_of(turns: Sequence[Turn]) -> str | list[Turn]:
    """What an answer follows: a text where it is one question, else the turns."""
    return turns[0]["content"] if [turn["role"] for turn in turns] == [USER] else list(turns)


def last_text(prompt: str | Sequence[Turn]) -> str:
    """What a prompt asks last, without what came before it."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def completion_of(turns: Sequence[Turn]) -> tuple[str | list[Turn], str]:
    """(prompt, answer): what comes before the last answer that is learnt, and that answer.

    Raises:
        ValueError: none is learnt, or nothing comes before it.
    """
    learnt = [number for number, turn in enumerate(turns) if turn["role"] == ASSISTANT and turn.get("weight") != 0]
    if not learnt:
        answered = any(turn["role"] == ASSISTANT for turn in turns)
        raise ValueError("every answer has the weight 0" if answered else "no turn is the assistant's")
    if not learnt[-1]:
        raise ValueError("the assistant's turn follows no other")
    return prompt_of(turns[: learnt[-1]]), turns[learnt[-1]]["content"]
