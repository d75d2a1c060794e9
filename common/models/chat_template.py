"""What a chat template puts around an answer: the end of the assistant's turn, and a place to think before it.

Templates are Jinja programs of the model's makers. What they do is found out by rendering conversations of marks, not
by reading them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from common.cli import UserError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK, THINK_END = "<think>", "</think>"
OFF = "{% set enable_thinking = enable_thinking | default(false) %}"
MARKS = ("\u2402", "\u2403", "\u2404")  # unlikely in any template, and the same in upper case


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    *,
    answer_next: bool = True,
    thinking: bool = False,
) -> str:
    """A conversation as the chat template writes it.

    Args:
        messages: each with "role" and "content".
        answer_next: end it where the assistant's next answer begins.
        thinking: let the model think first, where the template knows of that.

    Raises:
        UserError: the template refuses the order of the roles, or is broken.
    """
    switches = thinking_switches(thinking)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next, **switches)
    except (ValueError, TypeError, TemplateError) as error:
        raise refusal(error) from error


def contents_in(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], numbers: Sequence[int], **how: bool
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as the chat template writes it, and where in it the contents of some of its messages stand.

    What the template writes around them is seen by rendering the same conversation with marks in their place; a content
    may itself be changed, as one whose thinking, or the white space around it, is left out.

    Args:
        numbers: of the messages, in order.
        how: see `render`.

    Returns:
        The text, and for each number (start, end) in characters.

    Raises:
        UserError: the template passes over one of them, or writes other things around it than around a mark.
    """
    marks = {number: f"{MARKS[0]}{number}{MARKS[1]}" for number in numbers}
    marked = [
        {**message, "content": marks[number]} if number in marks else message for number, message in enumerate(messages)
    ]
    whole, rest, frames = render(tokenizer, messages, **how), render(tokenizer, marked, **how), []
    known = all(rest.count(mark) == 1 for mark in marks.values())
    for mark in marks.values():
        frame, _, rest = rest.partition(mark)
        frames.append(frame)
    spans, end = [], 0
    for number, (before, after) in zip(numbers, pairwise([*frames, rest]), strict=True):
        start, last, content = end + len(before), number == numbers[-1], messages[number]["content"]
        known = known and whole.startswith(before, end)
        ends = [start + len(text) for text in (content, content.strip()) if whole.startswith(text + after, start)]
        end = ends[0] if ends else whole.rfind(after) if last else whole.find(after, start)
        if not known or end < start or (last and whole[end:] != after):
            raise UserError("the chat template does not tell where the answers of a chat stand; give one answer a row")
        stripped = 0 if ends else len(whole[start:end]) - len(whole[start:end].lstrip())
        spans.append((start + stripped, end))
    return whole, spans


def thinks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template knows of thinking before an answer."""
    return THINK_END in (tokenizer.chat_template or "")


def opens_thinking(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> bool:
    """Whether a prompt, as token ids, ends inside `<think>`, so that the model goes on with its thinking."""
    _, opened, inside = tokenizer.decode(list(prompt[-len(THINK) - 8 :])).rpartition(THINK)
    return bool(opened) and not inside.strip()


def thinking_switches(thinking: bool) -> dict[str, bool]:
    """The variables by which templates are told to let the model think; unset they leave it as `answer_at_once` has."""
    return {"enable_thinking": True, "thinking": True} if thinking else {}


def refusal(error: Exception) -> UserError:
    """Of a template that fails, as a sentence."""
    return UserError(f"the chat cannot be encoded ({reason(error)}); change its roles or its text")


def turn_end(tokenizer: PreTrainedTokenizerBase, declared: Collection[int] = ()) -> int | None:
    """The added token that the template writes behind an assistant's answer; None where it writes none.

    Some templates close the last answer, some only one that a further turn follows. Behind the latter the user's next
    turn begins, with what stands before the first one as well: that ends nothing, unless the model's files say so.

    Args:
        declared: tokens that end an answer, by the model's own files.

    Raises:
        UserError: the template cannot render a question and its answer.
    """
    question, answer, further = MARKS
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": further},
    ]
    whole = render(tokenizer, turns[:2], answer_next=False)
    if answer not in whole:
        return None
    closing = _added_tokens(tokenizer, whole.rpartition(answer)[2])
    if closing:
        return closing[0]
    try:
        whole = render(tokenizer, turns, answer_next=False)
    except UserError:  # it takes one question
        return None
    opening = whole.partition(question)[0]
    between = whole.partition(answer)[2].partition(further)[0]
    known = [token for token in _added_tokens(tokenizer, between) if token in declared]
    before, after = (tokenizer.encode(text, add_special_tokens=False) if text else [] for text in (opening, between))
    while before and after and before[-1] == after[-1]:
        before.pop(), after.pop()
    return next(iter(known + _those_added(tokenizer, after)), None)


def _added_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return _those_added(tokenizer, tokenizer.encode(text, add_special_tokens=False) if text else [])


def _those_added(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Those tokens that were added to the vocabulary, special or not, other than white space."""
    added = tokenizer.added_tokens_decoder
    return [token for token in ids if token in added and added[token].content.strip()]


def answer_at_once(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template, changed so that the model answers without thinking first unless `enable_thinking` is set.

    Where the template has a switch, it is off by default. Where the prompt still ends inside `<think>`, the thinking is
    closed again, empty. Other templates stay as they are.
    """
    template = tokenizer.get_chat_template()
    known = template if template.startswith(OFF) else OFF + template
    turns = [{"role": "user", "content": MARKS[0]}]
    prompt = tokenizer.apply_chat_template(turns, chat_template=known, tokenize=False, add_generation_prompt=True)
    _, opened, inside = prompt.rpartition(MARKS[0])[2].rpartition(THINK)
    if opened and THINK_END not in inside:
        closing = ("" if inside.endswith("\n") else "\\n") + f"\\n{THINK_END}\\n\\n"
        written = f"'{closing}' if add_generation_prompt and not enable_thinking else ''"
        return known.removesuffix("\n") + "{{ " + written + " }}"  # Jinja drops a template's last line end
    return known if "enable_thinking" in template else template
