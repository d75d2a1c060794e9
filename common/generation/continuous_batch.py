"""Answers that are written together, one forward pass a token: one that has ended makes room for one that waits.

    batch = ContinuousBatch(model, tokenizer, max_batch_tokens)
    batch.add(Wanted(key, prompt, max_new_tokens=512))
    for wanted, answer in batch.run():      # as they end; more may be added meanwhile
        ...

The answers share a cache whose columns are as many as the longest of them has tokens. What bounds them is what they
have, not what they may come to have: where they outgrow the budget, the one that has least is set aside, and goes on
later from the tokens it has. Each prompt is read by itself, so that only rounding in the last bits of a step's matrix
products can tell company from solitude.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from common.generation.growing_text import GrowingText
from common.generation.result import Generation
from common.generation.rows import rows_of
from common.generation.steering import Steering, draw, sample_stream
from common.models.batching import MAX_BATCH_TOKENS
from common.models.tokenizers import decode, stop_ids

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from common.models.gguf_text import PackedModel

EXPECTED_TOKENS = 128  # of an answer, until some have ended


@dataclass(frozen=True)
class Drawn:
    """How a sample is drawn; see `Decoding`, and `steering.sample_stream` of the seed and the sample's number."""

    temperature: float
    top_p: float = 1.0
    seed: int = 0
    number: int = 0


@dataclass(frozen=True, eq=False)
class Wanted:
    """An answer that is to be written.

    Attributes:
        key: the asker's own name for it.
        prompt: token ids.
        max_new_tokens: its budget.
        drawn: None: the likeliest token is taken each time.
        steering: makes what changes its scores, when it begins; None: nothing does.
        stop: called with its text so far after every token; True ends it.
        text_of: what is read of the text of its tokens.
        logprobs: with the log-probability of each token.
        streamer: gets its tokens as they come.
    """

    key: Any
    prompt: Sequence[int]
    max_new_tokens: int
    drawn: Drawn | None = None
    steering: Callable[[], Steering] | None = None
    stop: Callable[[str], bool] | None = None
    text_of: Callable[[str], str] = str
    logprobs: bool = False
    streamer: BaseStreamer | None = None


class _Row:
    """An answer so far."""

    def __init__(self, wanted: Wanted, tokenizer: PreTrainedTokenizerBase) -> None:
        self.wanted = wanted
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self._text = GrowingText(tokenizer)

    @cached_property
    def steering(self) -> Steering | None:
        return self.wanted.steering() if self.wanted.steering else None

    @cached_property
    def stream(self) -> torch.Generator:
        return sample_stream(self.wanted.drawn.seed, self.wanted.drawn.number, self.wanted.prompt)

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.wanted.prompt, *self.tokens)

    @property
    def length(self) -> int:
        """Of prompt and answer, in tokens."""
        return len(self.wanted.prompt) + len(self.tokens)

    @property
    def longest(self) -> int:
        """What `length` may become."""
        return len(self.wanted.prompt) + self.wanted.max_new_tokens

    def take(self, token: int, logprob: float | None) -> None:
        """Go on by a token."""
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if self.steering:
            self.steering.consume(token)

    def stopped(self) -> bool:
        """Its text satisfies its `stop`."""
        wanted = self.wanted
        return wanted.stop is not None and wanted.stop(wanted.text_of(self._text.feed(self.tokens)))


class ContinuousBatch:
    """Writes answers with one model.

    Args:
        max_batch_tokens: bounds rows x columns of the answers that are written together; one always goes.

    Attributes:
        steps: forward passes so far that wrote a token of each row.
        prompts_read: forward passes so far that read a prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | PackedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ) -> None:
        self.tokenizer, self.max_batch_tokens = tokenizer, max_batch_tokens
        self._in_model = rows_of(model)
        self.ends = set(stop_ids(tokenizer, model.generation_config))
        self.steps = self.prompts_read = 0
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._ended = self._ended_tokens = 0

    def add(self, wanted: Wanted, *, first: bool = False) -> None:
        """Have an answer written.

        Args:
            first: before all that wait.
        """
        row = _Row(wanted, self.tokenizer)
        if wanted.streamer:
            wanted.streamer.put(torch.tensor([list(wanted.prompt)]))
        (self._waiting.appendleft if first else self._waiting.append)(row)

    def run(self) -> Iterator[tuple[Wanted, Generation]]:
        """Each answer that was added, as it ends; those that are added meanwhile, too."""
        while self._waiting or self._rows:
            yield from self._enter()
            self._set_aside()
            if self._rows:
                yield from self._step()

    # What of the answers is in the batch.

    def _fits(self, rows: Sequence[_Row], more: int = 0) -> bool:
        """Whether rows that become longer by `more` tokens are within the budget."""
        columns = max(row.length for row in rows) + more
        return len(rows) == 1 or (len(rows) <= self._in_model.most and len(rows) * columns <= self.max_batch_tokens)

    def _set_aside(self) -> None:
        """Take out those that have written least, until the others fit; they are the next to enter."""
        kept = list(self._rows)
        while kept and not self._fits(kept):
            least = min(reversed(kept), key=lambda row: len(row.tokens))
            kept.remove(least)
            self._waiting.appendleft(least)
        self._keep(kept)

    def _keep(self, kept: list[_Row]) -> None:
        if len(kept) == len(self._rows):
            return
        indices = [index for index, row in enumerate(self._rows) if row in kept]
        self._in_model.keep(indices, max((row.length for row in kept), default=1) - 1)
        self._rows = kept

    @torch.inference_mode()
    def _enter(self) -> list[tuple[Wanted, Generation]]:
        """Read the prompts of as many as there is room for; those that end with their first token."""
        if self._waiting and not self._rows:
            self._in_model.make_room([row.longest for row in self._waiting], self.max_batch_tokens)
        entering: list[_Row] = []
        while self._waiting and self._has_room(entering):
            entering.append(self._waiting.popleft())
        if not entering:
            return []
        read: dict[tuple[int, ...], tuple[Any, torch.Tensor]] = {}  # once for several samples of a prompt
        for row in entering:
            if row.ids not in read:
                read[row.ids] = self._in_model.read(row.ids)
                self.prompts_read += 1
        states = [read[row.ids][0] for row in entering]
        ended = self._choose(entering, torch.cat([read[row.ids][1] for row in entering]))
        joining = [state for row, state in zip(entering, states, strict=True) if row not in ended]
        for state, _ in read.values():
            if state not in joining:
                self._in_model.drop(state)
        if joining:
            self._in_model.join(joining)
            self._rows += [row for row in entering if row not in ended]
        return self._answers(ended)

    def _has_room(self, entering: list[_Row]) -> bool:
        """The next one that waits fits in, too, and all are likely to have room for what they have still to write."""
        if not self._in_model.admits(self._waiting[0].longest):
            return False
        together = [*self._rows, *entering, self._waiting[0]]
        least = min(row.wanted.max_new_tokens for row in together)
        expected = self._ended_tokens // self._ended if self._ended else EXPECTED_TOKENS
        return self._fits(together, max(1, min(least, expected)))

    # Forward passes, and what comes of them.

    @torch.inference_mode()
    def _step(self) -> list[tuple[Wanted, Generation]]:
        """A token more of each row; the answers that end with it."""
        self.steps += 1
        tokens, lengths = [row.tokens[-1] for row in self._rows], [row.length for row in self._rows]
        logits = self._in_model.step(tokens, lengths)
        ended = self._choose(self._rows, logits)
        self._keep([row for row in self._rows if row not in ended])
        return self._answers(ended)

    def _choose(self, rows: list[_Row], logits: torch.Tensor) -> dict[_Row, bool]:
        """Take each row's next token; those that it ends, with whether they ended by themselves."""
        scores = logits.to(torch.float32, copy=True)
        scored = [index for index, row in enumerate(rows) if row.wanted.logprobs]
        own = logits[scored].float()  # of the model, before anything changes them
        chosen = _chosen(rows, _steered(rows, scores))
        values = own.gather(1, chosen[scored][:, None])[:, 0] - own.logsumexp(dim=1)
        logprobs = dict(zip(scored, values.tolist(), strict=True))
        ended = {}
        for index, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            row.take(token, logprobs.get(index))
            if row.wanted.streamer:
                row.wanted.streamer.put(torch.tensor([token]))
            by_itself = token in self.ends or row.stopped()
            if by_itself or len(row.tokens) == row.wanted.max_new_tokens:
                ended[row] = by_itself
        return ended

    def _answers(self, ended: dict[_Row, bool]) -> list[tuple[Wanted, Generation]]:
        answers = []
        for row, finished in ended.items():
            if row.wanted.streamer:
                row.wanted.streamer.end()
            self._ended += 1
            self._ended_tokens += len(row.tokens)
            tokens = row.tokens[:-1] if row.tokens[-1] in self.ends else row.tokens
            cut = not finished or bool(row.steering and row.steering.closed)
            text = row.wanted.text_of(decode(self.tokenizer, tokens))
            answers.append((row.wanted, Generation(text, tokens, row.logprobs[: len(tokens)], finished, cut)))
        return answers


def _steered(rows: Sequence[_Row], scores: torch.Tensor) -> torch.Tensor:
    """The scores [rows, columns] as each row's steering changes them, those of a kind together."""
    kinds = {type(row.steering) for row in rows if row.steering}
    for kind in kinds:
        indices = [index for index, row in enumerate(rows) if type(row.steering) is kind]
        steerings = [rows[index].steering for index in indices]
        if len(indices) == len(rows):
            scores = kind.change_all(steerings, scores)
        else:
            scores[indices] = kind.change_all(steerings, scores[indices])
    return scores


def _chosen(rows: Sequence[_Row], scores: torch.Tensor) -> torch.Tensor:
    """The next token [rows] of each row: the likeliest, or a draw."""
    chosen = scores.argmax(dim=1)
    kinds = {(row.wanted.drawn.temperature, row.wanted.drawn.top_p) for row in rows if row.wanted.drawn}
    for kind in kinds:
        indices = [
            index
            for index, row in enumerate(rows)
            if row.wanted.drawn and (row.wanted.drawn.temperature, row.wanted.drawn.top_p) == kind
        ]
        chosen[indices] = draw(scores[indices], [rows[index].stream for index in indices], *kind)
    return chosen
