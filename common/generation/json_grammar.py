"""Decoding that can only write JSON of a given schema: llguidance's masks on a model's scores.

    preflight = json_schema.preflight(schema)                   # before any model loads
    grammar = JsonGrammar(preflight.grammar_schema, tokenizer, model.config.vocab_size)
    answers = generate(model, tokenizer, prompts, Decoding(512), steering=grammar.rows(512))
    answer = json_schema.parse(answers[0][0].text, schema)      # .value, or .error and .text

The JSON has a space after each comma and colon, or none; its keys come in the schema's order; and two things end it in
time: a string, list or number that has run on for too long is closed, and so is the document before the token budget
runs out. Both follow a closing: the bytes, found greedily, that lead from where the text stands to a document's end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import llguidance.hf
import llguidance.torch
import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from common.cli import UserError
from common.generation.json_closing import Hints, Scanner, find_closing
from common.generation.json_schema import byte_tokenizer, compile_grammar, longest_opening, schemas_of
from common.generation.steering import Steering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_BYTES = 256  # the byte tokenizer's EOS
CANDIDATES = 8  # the likeliest tokens whose closing is worked out where the budget is near


@dataclass(frozen=True)
class Bounds:
    """Where a schema sets no larger limit itself: characters of a string, items of a list or object, of a number."""

    string: int = 1024
    items: int = 256
    number: int = 24

    def for_schema(self, schema: dict[str, Any]) -> Bounds:
        """The same, raised to what the schema asks for."""
        lengths, counts = [self.string], [self.items]
        for node in schemas_of(schema):
            lengths += [node[key] for key in ("minLength", "maxLength") if key in node]
            lengths += [len(value) for value in [node.get("const"), *node.get("enum", [])] if isinstance(value, str)]
            counts += [node[key] for key in ("minItems", "maxItems", "minProperties", "maxProperties") if key in node]
            counts += [len(node.get(key, ())) for key in ("properties", "required")]
            counts += [len(value) for value in [node.get("const"), *node.get("enum", [])] if isinstance(value, list)]
        return Bounds(int(max(lengths)), int(max(counts)), self.number)

    def reached_by(self, scanner: Scanner) -> bool:
        """What is open in a text has grown to its bound."""
        if scanner.exponent or scanner.length >= (self.string if scanner.in_string else self.number):
            return True  # a long exponent would leave the finite numbers
        return bool(scanner.commas) and scanner.commas[-1] >= self.items


class JsonGrammar:
    """A schema compiled for a tokenizer; may be used for any number of `generate` calls.

    Args:
        schema: `Preflight.grammar_schema`.
        tokenizer: an aligned tokenizer (`common.models.tokenizers`); its EOS ends the document.
        columns: width of the model's logits; what tokens the tokenizer has beyond them are never written.
        bounds: what is closed when it runs on.
        spaced: the JSON has a space after each comma and colon, as most models write it; else it is compact.

    Raises:
        UserError: the schema cannot be compiled, or the tokenizer is not one of the `tokenizers` library.
    """

    def __init__(
        self,
        schema: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        columns: int,
        bounds: Bounds | None = None,
        spaced: bool = False,
    ) -> None:
        self.tokens, self.not_starting = _engine_tokenizer(tokenizer, columns)
        self._tokenized = functools.lru_cache(maxsize=64)(self.tokens.tokenize_bytes)
        self.eos = tokenizer.eos_token_id
        self.columns = columns
        self.bounds = (bounds or Bounds()).for_schema(schema)
        self.opening = longest_opening(schema)
        self.hints = hints_of(schema)
        self.matcher = compile_grammar(schema, self.tokens, spaced)
        self.byte_matcher = compile_grammar(schema, byte_tokenizer(), spaced)
        for matcher in (self.matcher, self.byte_matcher):
            if matcher.is_error():
                raise UserError(f"the schema cannot be compiled: {matcher.get_error().splitlines()[0]}")
        self.shortest_closing = self.closing_from(self.byte_matcher, Scanner(), b"")

    @property
    def shortest(self) -> int | None:
        """Tokens of the shortest known document with its EOS: a smaller `max_new_tokens` cannot give one."""
        return len(self.shortest_closing.tokens) if self.shortest_closing else None

    def rows(self, max_new_tokens: int) -> Callable[[int], JsonRow]:
        """For `generation.generate`: what holds each answer to the schema, and within its budget."""
        return lambda number: JsonRow(self, max_new_tokens)

    def closing_from(self, matcher: LLMatcher, scanner: Scanner, known: bytes) -> Closing | None:
        """The end of the document from the state of a byte matcher; None where none is found.

        Args:
            known: the end from a state before. Inside a string it is kept if it fits, which takes less than a search.
        """
        text: bytes | None = known
        fits = scanner.in_string and scanner.key is None and known.startswith(b'"')
        if not fits or matcher.validate_tokens([*known, END_OF_BYTES]) <= len(known):
            text = find_closing(matcher, scanner, self.hints)
        return None if text is None else self.closing_of(text)

    def closing_of(self, text: bytes) -> Closing:
        """The end of a document that these bytes are; the long ends of long documents are asked for again and again."""
        return Closing(text, [*self._tokenized(text), self.eos])


@dataclass(frozen=True)
class Closing:
    """How a document can be ended: as text, and as tokens with EOS."""

    text: bytes
    tokens: list[int]


class JsonRow(Steering):
    """One answer's place in the grammar and its way to the end: only tokens that keep to them stay in the choice.

    `closing` is of this state where `is_current` is set, else of one before. `reach` bounds from above how many tokens
    it takes to the end: those of the closing, and one opening more for every token since. `wanted` is the text of the
    likeliest token where that was forbidden for the sake of the end; `closed_early`: something else was written.
    """

    def __init__(self, grammar: JsonGrammar, max_new_tokens: int) -> None:
        self.grammar, self.remaining = grammar, max_new_tokens
        self.matcher = grammar.matcher.deep_copy()
        self.bytes = grammar.byte_matcher.deep_copy()
        self.scanner = Scanner()
        self.closing, self.is_current = grammar.shortest_closing, True
        self.reach = len(self.closing.tokens) if self.closing else 0
        self.closings: dict[int, Closing] = {}  # after each of the tokens that may come next, as far as worked out
        self.wanted, self.closed_early = b"", False

    @property
    def closed(self) -> bool:
        """The budget or a bound took it to an end that the model, by its likeliest token, did not want."""
        return self.closed_early or bool(self.wanted)  # where another last token was wanted, it was the end

    @classmethod
    def change_all(cls, rows: Sequence[JsonRow], scores: torch.Tensor) -> torch.Tensor:
        """The scores [rows, columns], in place, of answers under grammars of one tokenizer."""
        grammar = rows[0].grammar
        if scores.shape[1] != grammar.columns:
            raise ValueError(f"scores have {scores.shape[1]} columns, the grammar was made for {grammar.columns}")
        bitmask = torch.empty(len(rows), (grammar.tokens.vocab_size + 31) // 32, dtype=torch.int32)
        open_rows = [(row.matcher, index) for index, row in enumerate(rows) if not row.matcher.is_stopped()]
        if open_rows:
            llguidance.torch.fill_next_token_bitmask_par(_executor(torch.get_num_threads()), open_rows, bitmask)
        for row, bits, own in zip(rows, bitmask, scores, strict=True):
            row.narrow(bits, own)
        _add_bias(scores, bitmask)
        return scores

    def change(self, scores: torch.Tensor) -> torch.Tensor:
        """See `change_all`."""
        return self.change_all([self], scores[None])[0]

    def forced(self) -> int | None:
        """The token that the mask leaves alone: the next one of a text that the grammar writes, or EOS behind it.

        Such a text has one tokenisation here, the tokenizer's own: llguidance's mask leaves the next token of that, and
        nothing else, as long as what follows cannot change it (`compute_ff_tokens`). So it is what any model would have
        written.
        """
        if self.matcher.is_stopped():
            self.wanted = b""
            return self.grammar.eos
        tokens = self.matcher.compute_ff_tokens()
        if not tokens:
            return None
        if self._closes() and self.closing.tokens[0] != tokens[0]:
            return None
        self.wanted = b""
        return tokens[0]

    def fitting(self, tokens: Sequence[int]) -> int:
        """How many of some tokens the grammar would let through, one after another."""
        return 0 if self.matcher.is_stopped() else self.matcher.validate_tokens(list(tokens))

    def consume(self, token: int) -> None:
        """Go on by the token that was chosen."""
        self.remaining -= 1
        if self.matcher.is_stopped():
            return
        if not self.matcher.consume_token(token):
            raise RuntimeError(f"token {token} is outside the grammar: {self.matcher.get_error()}")
        text = b"" if token == self.grammar.eos else self.grammar.tokens.decode_bytes([token])
        # a shorter token that says the same so far is no difference yet
        self.closed_early |= not self.wanted.startswith(text) if self.wanted else False
        if token == self.grammar.eos:
            return
        self.bytes.consume_tokens(list(text))
        self.scanner.feed(text)
        if token in self.closings:
            self.closing, self.is_current = self.closings[token], True
        elif self.is_current and self.closing and self.closing.tokens[0] == token:
            self.closing = Closing(self.closing.text[len(text) :], self.closing.tokens[1:])
        else:  # where no end was found before, look again now and then only
            self.is_current = self.closing is None and self.remaining % 32 > 0
        self.reach = len(self.closing.tokens) if self.is_current and self.closing else self.reach + self.grammar.opening
        self.closings = {}

    def narrow(self, bitmask: torch.Tensor, scores: torch.Tensor) -> None:
        """Of what the grammar lets through next, as bits [columns / 32, rounded up], leave what leads to an end."""
        self.wanted = b""
        if self.matcher.is_stopped():
            _set_only(bitmask, [self.grammar.eos])
            return
        if repetition := self.scanner.repetition:
            unlike = bitmask & self.grammar.not_starting[repetition]
            if unlike.any():
                bitmask.copy_(unlike)
        if self._closes():
            self._close(bitmask, scores)

    def _closes(self) -> bool:
        """What is open is at its bound, or the budget is, so that what comes next has to lead to an end."""
        return (self.grammar.bounds.reached_by(self.scanner) and self._find_closing()) or self._must_close()

    def _close(self, bitmask: torch.Tensor, scores: torch.Tensor) -> None:
        """Let only the closing come next, and likely tokens after which there is an end in time.

        At a bound, of those only what the closing begins with.
        """
        begin_closing = self.grammar.bounds.reached_by(self.scanner)
        masked = scores + _bias(bitmask[None], scores.device)[0, : len(scores)]
        likeliest = int(masked.argmax())
        allowed = {self.closing.tokens[0]}
        for token, text in self._fitting(masked):
            if not begin_closing or self.closing.text.startswith(text):
                allowed.add(token)
        _set_only(bitmask, allowed)
        self.wanted = b"" if likeliest in allowed else self.grammar.tokens.decode_bytes([likeliest])

    def _must_close(self) -> bool:
        """The budget leaves room for the closing, and hardly for more."""
        return (
            self._is_near()
            and self._find_closing()
            and self._is_near()  # now that it is known exactly
            and len(self.closing.tokens) <= self.remaining
        )

    def _is_near(self) -> bool:
        """The next token could open something that no longer closes in time."""
        return self.reach + self.grammar.opening > self.remaining - 1

    def _find_closing(self) -> bool:
        """Find the end from here; False where there is none."""
        if not self.is_current:
            self.closing = self.grammar.closing_from(
                self.bytes, self.scanner, self.closing.text if self.closing else b""
            )
            self.is_current = True
            self.reach = len(self.closing.tokens) if self.closing else 0
        return self.closing is not None

    def _fitting(self, masked: torch.Tensor) -> Iterator[tuple[int, bytes]]:
        """Those of the likeliest tokens, and their text, after which the document can still be ended in time."""
        values, tokens = masked.topk(min(CANDIDATES, len(masked)))
        for token in tokens[values > float("-inf")].tolist():
            if token in (self.grammar.eos, self.closing.tokens[0]):
                continue
            text = self.grammar.tokens.decode_bytes([token])
            after, scanner = self.bytes.deep_copy(), self.scanner.copy()
            after.consume_tokens(list(text))
            scanner.feed(text)
            known = self.closing.text
            if known.startswith(text) and not scanner.length:  # a search from there would find the rest of it
                closing = self.grammar.closing_of(known[len(text) :])
            else:
                closing = self.grammar.closing_from(after, scanner, known)
            if closing is not None and len(closing.tokens) <= self.remaining - 1:
                self.closings[token] = closing
                yield token, text


def hints_of(schema: dict[str, Any]) -> Hints:
    """What a schema says about the strings in its documents."""
    schemas = list(schemas_of(schema))
    patterns = [node["pattern"] for node in schemas if "pattern" in node]
    patterns += [pattern for node in schemas for pattern in node.get("patternProperties", {})]
    return Hints.of((name for node in schemas for name in node.get("required", [])), patterns)


@functools.lru_cache(maxsize=4)
def _engine_tokenizer(
    tokenizer: PreTrainedTokenizerBase, columns: int
) -> tuple[LLTokenizer, dict[bytes, torch.Tensor]]:
    """The engine's view of a tokenizer, and bits of all tokens but those that start with a quote, or with two.

    It takes seconds for a large vocabulary, so that it is kept.
    """
    if not tokenizer.is_fast:
        raise UserError("constrained decoding needs a fast tokenizer; use a model that has a tokenizer.json")
    known = 1 + max(tokenizer.added_tokens_decoder, default=-1)  # can be more than the model has columns for
    tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=max(columns, known, len(tokenizer)))
    words = [tokens.decode_bytes([token]) for token in range(len(tokenizer))]
    not_starting = {}
    for start in (b'"', b'""'):
        bits = np.full((tokens.vocab_size + 31) // 32 * 4, 0xFF, dtype=np.uint8)
        for token in (token for token, word in enumerate(words) if word.startswith(start)):
            bits[token // 8] &= ~np.uint8(1 << token % 8)
        not_starting[start] = torch.from_numpy(bits).view(torch.int32)
    return tokens, not_starting


def _set_only(bitmask: torch.Tensor, tokens: Iterable[int]) -> None:
    bitmask.zero_()
    bits = bitmask.numpy().view("uint8")
    for token in tokens:
        bits[token // 8] |= 1 << token % 8


@functools.cache
def _bias_of_byte(device: torch.device) -> torch.Tensor:
    """[256, 8]: 0 where the bit of a byte is set, -inf where it is not."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return torch.zeros(256, 8).masked_fill_(bits == 0, float("-inf")).to(device)


def _bias(bitmask: torch.Tensor, device: torch.device, out: torch.Tensor | None = None) -> torch.Tensor:
    """What to add to scores, [rows, 32 * words] for bits [rows, words]; `out` is [4 * rows * words, 8] to reuse.

    Looking bytes up is faster than shifting bits, and adding faster than filling or selecting, where a branch is
    taken for every column.
    """
    octets, table = bitmask.view(torch.uint8).flatten(), _bias_of_byte(device)
    if out is None:
        out = torch.empty(len(octets), 8, device=device)
    if device.type == "cpu":  # numpy, told not to check the places, needs two thirds of torch's time
        np.take(table.numpy(), octets.numpy(), axis=0, out=out.numpy(), mode="clip")
    else:
        torch.index_select(table, 0, octets.to(device, torch.int32), out=out)
    return out.view(len(bitmask), -1)


def _add_bias(scores: torch.Tensor, bitmask: torch.Tensor) -> None:
    """Add to scores [rows, columns] what the bits say."""
    columns = scores.shape[1]
    if scores.device.type != "cpu":
        scores.add_(_bias(bitmask, scores.device)[:, :columns])
        return
    out = _scratch(bitmask.shape[1] * 4)  # one row's, again and again: fresh memory costs more than the work
    for bits, own in zip(bitmask, scores, strict=True):
        own.add_(_bias(bits[None], scores.device, out)[0, :columns])


@functools.lru_cache(maxsize=2)
def _scratch(octets: int) -> torch.Tensor:
    return torch.empty(octets, 8)


@functools.cache
def _executor(threads: int) -> LLExecutor:
    """Works out the masks of several rows at a time."""
    return LLExecutor(threads)
