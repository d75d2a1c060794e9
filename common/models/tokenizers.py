"""Tokenizers: PAD and EOS that agree with the chat template, prompts and completions as token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from common.cli import UserError, reason
from common.models import chat_template, gguf_import
from common.models.gguf_tokenizer import is_from_gguf
from common.models.source import unreadable

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


PROBES = (
    "The total is  1,234.50 EUR, due 2026-11-21.",
    "def f(x):\n\treturn x**2  # \u00e9\u00df\u4f60\u597d \U0001f44b",
    "don't\n\n - A1b2",
)


@dataclass(frozen=True)
class Encoded:
    """One training row: `input_ids` is the prompt (its first `prompt_length` tokens) and then the completion.

    Attributes:
        read_only: spans (start, end) of the completion from which nothing is learnt: in a chat of several answers the
            turns between them.
    """

    input_ids: list[int]
    prompt_length: int
    read_only: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of_learnt(cls, input_ids: list[int], learnt: Sequence[int]) -> Encoded:
        """A row of which the tokens at these positions, in order, are learnt, and its last one is the last of them."""
        gaps = ((before + 1, after) for before, after in pairwise(learnt) if after > before + 1)
        return cls(input_ids, learnt[0], tuple(gaps))

    @property
    def learnt(self) -> list[int]:
        """Positions of the tokens that are learnt; the first of a row is, though no model predicts it."""
        starts = [self.prompt_length, *(end for _, end in self.read_only)]
        ends = [*(start for start, _ in self.read_only), len(self.input_ids)]
        return [position for start, end in zip(starts, ends, strict=True) for position in range(start, end)]


def align(
    tokenizer: PreTrainedTokenizerBase, *, declared: Sequence[int] = (), embedding_rows: int | None = None
) -> PreTrainedTokenizerBase:
    """Make EOS the end of the assistant's turn, PAD a token, and answers begin at once; returns the tokenizer.

    EOS is what the chat template writes behind an answer, whatever the files call it: a model trained on one token and
    stopped at another never stops. Without a template, or where it writes nothing, EOS stays the tokenizer's, else it
    is the first of `declared`. PAD stays, or is a spare token where there is one, so that it is not EOS.

    Args:
        declared: tokens that end an answer, by the model's own files.
        embedding_rows: of the model (see `fit_to_embedding`); None where it is not known.

    Raises:
        UserError: nothing ends an answer; the template cannot be rendered; the tokenizer is not the model's.
    """
    candidates = [tokenizer.eos_token_id, *(token for token in declared if token < len(tokenizer))]
    if tokenizer.chat_template:
        try:
            template = chat_template.answer_at_once(tokenizer)
        except (ValueError, TypeError, TemplateError) as error:
            raise chat_template.refusal(error) from error
        if template != tokenizer.get_chat_template():
            several = isinstance(tokenizer.chat_template, dict)
            tokenizer.chat_template = tokenizer.chat_template | {"default": template} if several else template
        candidates.insert(0, chat_template.turn_end(tokenizer, declared))
    eos = next((token for token in candidates if token is not None), None)
    if eos is None:
        raise UserError("the tokenizer has neither an EOS token nor a chat template with one; use another base model")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    _make_special(tokenizer, eos)  # so that no text can end a turn, and no answer shows it
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == eos:
        spare = [name for name in ("<|endoftext|>", "<pad>", "[PAD]") if name in tokenizer.get_vocab()]
        spare = [name for name in spare if tokenizer.convert_tokens_to_ids(name) != eos]
        # EOS as PAD does no harm here: padding is masked by position, never by token id.
        tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
    if embedding_rows is not None:
        fit_to_embedding(tokenizer, embedding_rows)
    return tokenizer


def fit_to_embedding(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Keep what a model's embedding has no row for out of its input, in place.

    Tokens that were added without making the embedding larger are read as the plain text they are; a PAD among them is
    EOS instead.

    Args:
        rows: of the embedding; what lies beyond the tokenizer's last token is of no use and does no harm.

    Raises:
        UserError: one of them is EOS or stands in every prompt, or tokens that were not added lie there, too.
    """
    if len(tokenizer) <= rows and max(tokenizer.added_tokens_decoder, default=0) < rows:
        return
    if tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    added = tokenizer.added_tokens_decoder
    beyond = [token for token in added if token >= rows]
    for token in beyond:
        _make_special(tokenizer, token)
    needed = [token for token in (*encode_prompt(tokenizer, "x"), tokenizer.eos_token_id) if token >= rows]
    needed += [token for token in tokenizer.get_vocab().values() if token >= rows and token not in added]
    if needed:
        raise UserError(
            f"the tokenizer's {tokenizer.convert_ids_to_tokens(needed[0])!r} is token {needed[0]}, but the model's "
            f"embedding has {rows} rows; give the model the tokenizer that it was trained with, or resize its embedding"
        )


def _make_special(tokenizer: PreTrainedTokenizerBase, token: int) -> None:
    """Have a token split into plain ones where it stands in a text, and left out in decoding."""
    from transformers import AddedToken

    known = tokenizer.added_tokens_decoder.get(token)
    if known is None:
        known = AddedToken(tokenizer.convert_ids_to_tokens(token), normalized=False)
    if not known.special:
        changed = AddedToken(
            known.content,
            single_word=known.single_word,
            lstrip=known.lstrip,
            rstrip=known.rstrip,
            normalized=known.normalized,
            special=True,
        )
        tokenizer.add_tokens([changed], special_tokens=True)


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model id or folder, aligned with the configs that lie beside it.

    Raises:
        UserError: there is none; see `align`.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    own = (Path(name_or_path) / "tokenizer_config.json").is_file()
    if not own and (gguf := gguf_import.named_gguf(name_or_path)):
        declared, rows = gguf_import.ends_and_rows(gguf)
        return align(gguf_import.tokenizer_of(gguf), declared=declared, embedding_rows=rows)
    reader = PreTrainedTokenizerFast if is_from_gguf(name_or_path) else AutoTokenizer
    try:
        tokenizer = reader.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except unreadable() as error:
        raise UserError(
            f"no tokenizer can be loaded from {name_or_path} ({reason(error)}); give a model folder or a Hub id, "
            "or build the offline base with: python tiny_student.py"
        ) from error
    rows, declared = None, []
    with suppress(*unreadable()):  # beside an adapter there is no config
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
        rows = getattr(config.get_text_config(), "vocab_size", None)
    with suppress(*unreadable()):
        declared = token_ids(GenerationConfig.from_pretrained(name_or_path).eos_token_id)
    return align(tokenizer, declared=declared, embedding_rows=rows)


def token_ids(declared: int | Sequence[int] | None) -> list[int]:
    """A config's `eos_token_id`, which can be one id, several or none, as a list."""
    if declared is None:
        return []
    return [declared] if isinstance(declared, int) else list(declared)


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None) -> list[int]:
    """The tokens that end an answer: EOS, then the others of the model's generation config, then PAD.

    Args:
        tokenizer: aligned (`align`).
        generation_config: the model's (see `loading.align_model`).
    """
    declared = [] if generation_config is None else token_ids(generation_config.eos_token_id)
    return list(dict.fromkeys([tokenizer.eos_token_id, *declared, tokenizer.pad_token_id]))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, *, thinking: bool = False) -> list[int]:
    """Token ids of a user turn up to where the assistant's answer starts (without a chat template: text, newline).

    Special tokens in `text`, such as `<|im_end|>`, are encoded as the plain text they are, so that no input can end
    the user turn or begin another one.

    Args:
        thinking: let the model think first, where its template knows of that; else the answer starts at once.

    Raises:
        UserError: the tokenizer has no plain-text form for a special token in `text`.
    """
    return _encode_turns(tokenizer, [{"role": "user", "content": text}], thinking)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, thinking: bool = False
) -> list[int]:
    """Token ids of the turns of a chat, up to where the assistant's next answer starts (see `encode_prompt`).

    Args:
        messages: each with "role" ("system", "user" or "assistant") and "content".

    Raises:
        UserError: the template refuses the order of the roles, or a special token in a text has no plain-text form.
    """
    return _encode_turns(tokenizer, messages, thinking)


def _encode_turns(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], thinking: bool
) -> list[int]:
    contents = [message["content"] for message in messages]
    if not tokenizer.chat_template:
        return tokenizer.encode("\n".join(contents) + "\n", add_special_tokens=True, split_special_tokens=True)
    if not any(has_special_token(tokenizer, content) for content in contents):
        rendered = chat_template.render(tokenizer, messages, thinking=thinking)
        return tokenizer.encode(rendered, add_special_tokens=False)  # the same ids at half the cost
    try:
        return tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            sanitize_control_tokens=True,
            return_dict=False,
            **chat_template.thinking_switches(thinking),
        )
    except (ValueError, TypeError, TemplateError) as error:
        raise chat_template.refusal(error) from error


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer, without special tokens but with the tags of its thinking, should they be special."""
    added, tags = tokenizer.added_tokens_decoder, (chat_template.THINK, chat_template.THINK_END)
    text, start = "", 0
    for index, token in enumerate(ids):
        if token in added and added[token].special and added[token].content in tags:
            text += tokenizer.decode(ids[start:index], skip_special_tokens=True) + added[token].content
            start = index + 1
    return text + tokenizer.decode(ids[start:], skip_special_tokens=True)


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
        return chat_template.render(tokenizer, [{"role": "user", "content": text}])

    mark = "prompt 7f3a"
    head, shown, tail = rendered(mark).partition(mark)
    special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    encoder = PromptEncoder(backend.to_str(), head, tail, special)
    probes = (*PROBES, " a\n", "\n\n a {{ b }} <c> ' \" ")
    encode = encoder.load()
    if not shown or any(rendered(probe) != head + probe + tail for probe in probes):
        return None
    return encoder if all(encode(probe) == encode_prompt(tokenizer, probe) for probe in probes) else None


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes that each token stands for, by id; none for special tokens.

    Raises:
        UserError: the tokenizer is not one of the tokenizers library.
    """
    if not tokenizer.is_fast:
        raise UserError("the bytes of a slow tokenizer's tokens are not known; use a model that has a tokenizer.json")
    import llguidance.hf

    size = max(len(tokenizer), 1 + max(tokenizer.added_tokens_decoder, default=-1))
    tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=size)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return [b"" if token in special else tokens.decode_bytes([token]) for token in range(size)]


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


def windows(tokenizer: PreTrainedTokenizerBase, text: str, max_len: int) -> list[Encoded]:
    """A text in windows of `max_len` tokens, none of which sees another.

    The first token of a window is only read: the tokenizer's BOS, where it puts one, else the text's.
    """
    bos = [token for token in tokenizer.encode("") if token == tokenizer.bos_token_id]
    ids, room = tokenizer.encode(text, add_special_tokens=False), max_len - len(bos)
    pieces = [bos + ids[start : start + room] for start in range(0, len(ids), room)]
    return [Encoded(piece, 1) for piece in pieces if len(piece) > 1]


def longest_beginning(text: str, fits: Callable[[str], bool]) -> str | None:
    """As much of the text from its start as fits; None where that would be nothing, or white space."""
    known, too_long = 0, len(text) + 1  # characters, by bisection: some have several tokens, most share one
    while too_long - known > 1:
        middle = (known + too_long) // 2
        if fits(text[:middle]):
            known = middle
        else:
            too_long = middle
    return text[:known] if text[:known].strip() else None
