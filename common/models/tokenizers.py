"""Tokenizers: PAD and EOS that agree with the chat template, prompts and completions as token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from common.cli import UserError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PROBES = (
    "The total is  1,234.50 EUR, due 2026-11-21.",
    "def f(x):\n\treturn x**2  # \u00e9\u00df\u4f60\u597d \U0001f44b",
    "don't\n\n - A1b2",
)


@dataclass(frozen=True)
class Encoded:
    """One training row: `input_ids` is the prompt (its first `prompt_length` tokens) and then the completion."""

    input_ids: list[int]
    prompt_length: int


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant turn: what the chat template puts after the content, else the tokenizer's EOS.

    Qwen's base (non-Instruct) tokenizers declare `<|endoftext|>` as EOS while their template ends turns with
    `<|im_end|>`; a model trained on the one and stopped on the other never stops.
    """
    if tokenizer.chat_template:
        mark = "\u2402"  # unlikely in any template, one piece in none
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(mark)[2]
        special = set(tokenizer.all_special_ids)
        for token in tokenizer.encode(tail, add_special_tokens=False):
            if token in special:
                return token
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has neither an EOS token nor a chat template with one; use another base model")
    return tokenizer.eos_token_id


def align(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Make EOS the end of the assistant turn and PAD a token of its own where there is one; returns the tokenizer."""
    eos = end_of_turn_id(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == eos:
        spare = [name for name in ("<|endoftext|>", "<pad>", "[PAD]") if name in tokenizer.get_vocab()]
        spare = [name for name in spare if tokenizer.convert_tokens_to_ids(name) != eos]
        # EOS as PAD does no harm here: padding is masked by position, never by token id.
        tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
    return tokenizer


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The aligned tokenizer of a model id or folder.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return align(AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code))
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer can be loaded from {name_or_path} ({reason(error)}); give a model folder or a Hub id, "
            "or build the offline base with: python tiny_student.py"
        ) from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a user turn up to where the assistant's answer starts (without a chat template: text, newline).

    Special tokens in `text`, such as `<|im_end|>`, are encoded as the plain text they are, so that no input can end
    the user turn or begin another one.

    Raises:
        UserError: the tokenizer has no plain-text form for a special token in `text`.
    """
    if not tokenizer.chat_template:
        return tokenizer.encode(text + "\n", add_special_tokens=True, split_special_tokens=True)
    return encode_chat(tokenizer, [{"role": "user", "content": text}])


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of the turns of a chat, up to where the assistant's next answer starts (see `encode_prompt`).

    Args:
        messages: each with "role" ("system", "user" or "assistant") and "content".

    Raises:
        UserError: the template refuses the order of the roles, or a special token in a text has no plain-text form.
    """
    if not tokenizer.chat_template:
        return encode_prompt(tokenizer, "\n".join(message["content"] for message in messages))
    try:
        if any(has_special_token(tokenizer, message["content"]) for message in messages):
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
            )
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (ValueError, TemplateError) as error:
        raise UserError(f"the chat cannot be encoded ({reason(error)}); change its roles or its text") from error
    return tokenizer.encode(rendered, add_special_tokens=False)  # the same ids at half the cost


@dataclass(frozen=True)
class PromptEncoder:
    """`encode_prompt` of one tokenizer, for a process that has neither it nor transformers; made by `prompt_encoder`.

    Attributes:
        backend: the tokenizer of the tokenizers library, as JSON.
        head, tail: what the chat template puts around a user's text.
        special: the special tokens; a text with one of them is for `encode_prompt` itself.
    """

    backend: str
    head: str
    tail: str
    special: tuple[str, ...]

    def load(self) -> Callable[[str], list[int] | None]:
        """The function from a text to its token ids, or to None for a text with a special token in it."""
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(self.backend)

        def encode(text: str) -> list[int] | None:
            if any(token in text for token in self.special):
                return None
            return backend.encode(self.head + text + self.tail, add_special_tokens=False).ids

        return encode


def prompt_encoder(tokenizer: PreTrainedTokenizerBase) -> PromptEncoder | None:
    """What encodes prompts as `encode_prompt` does; None where the template does more than put text around a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not tokenizer.chat_template or backend is None or "strftime_now" in str(tokenizer.chat_template):
        return None  # no template, or one that says another day's date tomorrow

    def rendered(text: str) -> str:
        turn = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    mark = "prompt 7f3a"
    head, found, tail = rendered(mark).partition(mark)
    special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    encoder = PromptEncoder(backend.to_str(), head, tail, special)
    probes = (*PROBES, " a\n", "\n\n a {{ b }} <c> ' \" ")
    encode = encoder.load()
    if not found or any(rendered(probe) != head + probe + tail for probe in probes):
        return None
    return encoder if all(encode(probe) == encode_prompt(tokenizer, probe) for probe in probes) else None


def same_vocabulary(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> str | None:
    """Why two tokenizers' ids do not mean the same; None when they do.

    Every token that both have must have one id, only added tokens may be in one alone, and probes must be cut alike.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    added = student.get_added_vocab().keys() | teacher.get_added_vocab().keys()
    for token in sorted(ours.keys() | theirs.keys()):
        if token in ours and token in theirs:
            if ours[token] != theirs[token]:
                return f"{token!r} is token {theirs[token]} for the teacher and {ours[token]} for the student"
        elif token not in added:
            return f"only the {'student' if token in ours else 'teacher'} has the token {token!r}"
    for probe in PROBES:
        if student.encode(probe, add_special_tokens=False) != teacher.encode(probe, add_special_tokens=False):
            return f"they cut {probe!r} differently"
    return None


def has_special_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether `text` holds one of the tokenizer's special tokens, letter by letter."""
    return any(token.special and token.content in text for token in tokenizer.added_tokens_decoder.values())


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of an answer with the EOS that training must see, so that the trained model stops.

    Special tokens in `text` are encoded as plain text, as in `encode_prompt`.
    """
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return [*ids, tokenizer.eos_token_id]


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Encoded:
    """Prompt and completion in one sequence of token ids."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    return Encoded(prompt_ids + encode_completion(tokenizer, completion), len(prompt_ids))


def windows(tokenizer: PreTrainedTokenizerBase, text: str, max_len: int) -> list[Encoded]:
    """A text in windows of `max_len` tokens, none of which sees another.

    The first token of a window is only read: the tokenizer's BOS, where it puts one, else the text's.
    """
    bos = [token for token in tokenizer.encode("") if token == tokenizer.bos_token_id]
    ids, room = tokenizer.encode(text, add_special_tokens=False), max_len - len(bos)
    pieces = [bos + ids[start : start + room] for start in range(0, len(ids), room)]
    return [Encoded(piece, 1) for piece in pieces if len(piece) > 1]


def truncate_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion_length: int, max_len: int
) -> list[int] | None:
    """Prompt ids cut to leave room for `completion_length` tokens in `max_len`; None when no prompt text would be left.

    The cut falls on the end of the user's text, so that the instruction at its start and the chat template's frame
    around it stay whole.
    """
    room = max_len - completion_length
    fits, too_long = 0, len(prompt) + 1  # characters, by bisection: some have several tokens, most share one
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if len(encode_prompt(tokenizer, prompt[:middle])) <= room:
            fits = middle
        else:
            too_long = middle
    return encode_prompt(tokenizer, prompt[:fits]) if prompt[:fits].strip() else None
