"""Training rows whose prompt may be a chat: token ids, and which of them are learnt.

A row is what the model will be asked: the chat up to its last answer, as the template writes it where that answer
begins, and then the answer with its end. Answers before it stand in that text as the template has them in a history
(without their thinking, say); they are learnt there, each with the token that ends a turn.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common.models import chat_template, tokenizers
from common.models.chat_template import THINK, THINK_END
from common.models.tokenizers import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Sequence[Mapping[str, Any]]  # {"role", "content"}, and "weight": 0 of an answer that is read only
Prompt = str | Turns


def as_turns(prompt: Prompt) -> Turns:
    """The turns of a prompt; a text is a user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def question_of(prompt: Prompt) -> str:
    """What a prompt asks: itself, or the last turn of a chat's user."""
    return next((turn["content"] for turn in reversed(as_turns(prompt)) if turn["role"] == "user"), "")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt up to where the answer begins (see `tokenizers.encode_prompt`)."""
    return tokenizers.encode_chat(tokenizer, _plain(as_turns(prompt)))


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str) -> Encoded:
    """Prompt and answer in one sequence of token ids, and which are learnt.

    An answer that begins by thinking follows the prompt under which the model thinks.

    Raises:
        UserError: the template refuses the order of the roles, or does not tell where earlier answers stand.
    """
    turns = as_turns(prompt)
    thinking = THINK_END in answer and chat_template.thinks(tokenizer)
    earlier = [number for number, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("weight") != 0]
    if not earlier:
        ids, learnt = tokenizers.encode_chat(tokenizer, _plain(turns), thinking=thinking), []
    elif tokenizer.chat_template:
        ids, learnt = _rendered(tokenizer, _plain(turns), earlier, thinking)
    else:
        ids, learnt = _joined(tokenizer, turns, earlier)
    if thinking and chat_template.opens_thinking(tokenizer, ids):
        answer = answer.lstrip().removeprefix(THINK).lstrip("\n")
    completion = tokenizers.encode_completion(tokenizer, answer)
    return Encoded.of_learnt(ids + completion, [*learnt, *range(len(ids), len(ids) + len(completion))])


def thinking_alike(tokenizer: PreTrainedTokenizerBase, *answers: str) -> list[str]:
    """Answers to one prompt, of which all or none begin by thinking: where some do, the others have thought nothing.

    The prompt under which a model thinks is another one than that under which it answers at once, and answers that are
    compared have to follow the same.
    """
    some = any(THINK_END in answer for answer in answers) and chat_template.thinks(tokenizer)
    if not some or all(THINK_END in answer for answer in answers):
        return list(answers)
    at_once = chat_template.render(tokenizer, _plain(as_turns("")))
    _, opened, nothing = at_once.rpartition(THINK)
    thought = THINK + nothing if opened and THINK_END in nothing else f"{THINK}\n\n{THINK_END}\n\n"
    return [answer if THINK_END in answer else thought + answer for answer in answers]


def _plain(turns: Turns) -> list[dict[str, str]]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _rendered(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], learnt: Sequence[int], thinking: bool
) -> tuple[list[int], list[int]]:
    """Token ids of a chat as the template writes it, and positions of what the answers of these numbers are made of."""
    if any(tokenizers.has_special_token(tokenizer, turn["content"]) for turn in turns):
        return _in_pieces(tokenizer, turns, learnt, thinking)
    text, spans = chat_template.contents_in(tokenizer, turns, learnt, thinking=thinking)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    eos = tokenizer.eos_token
    closings = [end + len(text[end:]) - len(text[end:].lstrip()) for _, end in spans]
    ends = [(start, start + len(eos)) for start in closings if text.startswith(eos, start)]
    return encoding["input_ids"], _inside(text, encoding["offset_mapping"], sorted([*spans, *ends]))


def _joined(tokenizer: PreTrainedTokenizerBase, turns: Turns, learnt: Sequence[int]) -> tuple[list[int], list[int]]:
    """The same for a base model without a template: turns are lines (`tokenizers.encode_chat`), which nothing ends."""
    text, spans = "", []
    for number, turn in enumerate(turns):
        if number in learnt:
            spans.append((len(text), len(text) + len(turn["content"])))
        text += turn["content"] + "\n"
    encoding = tokenizer(text, add_special_tokens=True, split_special_tokens=True, return_offsets_mapping=True)
    return encoding["input_ids"], _inside(text, encoding["offset_mapping"], spans)


def _inside(text: str, offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Positions of the tokens of these spans of a text.

    With what stands before a span a token may share white space alone, as the space that a first word holds.
    """
    positions = []
    for position, (first, last) in enumerate(offsets):
        for start, end in spans:
            within = start <= first < end and (last > first or first > start)
            across = first < start < last and not text[first:start].strip() and text[start:last].strip()
            if within or across:
                positions.append(position)
                break
    return positions


def _in_pieces(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], learnt: Sequence[int], thinking: bool
) -> tuple[list[int], list[int]]:
    """`_rendered` of a chat that has special tokens in its texts: there they are text, so that they end nothing."""
    text, spans = chat_template.contents_in(tokenizer, turns, range(len(turns)), thinking=thinking)
    ids: list[int] = []
    positions: list[int] = []
    closed, after_learnt = 0, False
    for number, (start, end) in enumerate([*spans, (len(text), len(text))]):
        frame = tokenizer.encode(text[closed:start], add_special_tokens=False)
        closing = frame.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in frame else None
        if after_learnt and closing is not None and not tokenizer.decode(frame[:closing]).strip():
            positions.append(len(ids) + closing)
        ids += frame
        content = tokenizer.encode(text[start:end], add_special_tokens=False, split_special_tokens=True)
        after_learnt = number in learnt
        positions += range(len(ids), len(ids) + len(content)) if after_learnt else ()
        ids += content
        closed = end
    return ids, positions


def shortened(prompt: Prompt, fits: Callable[[Prompt], bool]) -> Prompt | None:
    """A prompt that does not fit, cut so that it does; None when nothing would be left.

    A chat loses its oldest questions with their answers, but neither its system turn nor the last question; a text, or
    a last question that then is still too long, loses its end.
    """
    if isinstance(prompt, str):
        return tokenizers.longest_beginning(prompt, fits)
    asked = [number for number, turn in enumerate(prompt) if turn["role"] == "user"]
    if not asked:
        return None

    def without(questions: int) -> Turns:
        system = prompt[:1] if prompt[0]["role"] == "system" else []
        return [*system, *prompt[asked[questions] :]] if questions else prompt

    lost = 1 + bisect_left(range(1, len(asked)), True, key=lambda questions: fits(without(questions)))
    if lost < len(asked):
        return without(lost)
    kept = without(len(asked) - 1)
    last = max(number for number, turn in enumerate(kept) if turn["role"] == "user")

    def with_question(text: str) -> Turns:
        return [*kept[:last], {**kept[last], "content": text}, *kept[last + 1 :]]

    question = tokenizers.longest_beginning(kept[last]["content"], lambda text: fits(with_question(text)))
    return with_question(question) if question else None


def shortened_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, room: int) -> list[int] | None:
    """Token ids of a prompt that has more than `room` of them, cut to as many (see `shortened`)."""
    shorter = shortened(prompt, lambda prompt: len(encode_prompt(tokenizer, prompt)) <= room)
    return encode_prompt(tokenizer, shorter) if shorter else None
