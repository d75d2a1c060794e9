"""An answer that is wanted, and what there is of it so far: one row of a continuous batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from common.generation.growing_text import GrowingText
from common.generation.prompt_lookup import PromptLookup, Record
from common.generation.steering import Steering, sample_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Drawn:
    """How a sample is drawn; see `Decoding`, and `steering.sample_stream` of the seed and the sample's number."""

    temperature: float
    top_p: float = 1.0
    seed: int = 0
    number: int = 0


@dataclass(frozen=True, eq=False)
class Asker:
    """Who asks for answers.

    Attributes:
        ends: the tokens that end an answer.
        adapter: the name within PEFT of the one that writes, which `can_share` passes; None: what is active.
    """

    tokenizer: PreTrainedTokenizerBase
    ends: Collection[int]
    adapter: str | None = None


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
        streamer: gets its tokens as they come, but for the one that ends it.
        lookup: how many tokens are looked up at a time; see `Decoding.prompt_lookup_num_tokens`.
        asker: None: that of the batch.
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
    lookup: int = 0
    asker: Asker | None = None


class Row:
    """An answer so far.

    Args:
        drafts: what is known of the drafts of its batch.

    Attributes:
        tokens: those that were taken.
        logprobs: of the first of them, where they are wanted; of forced ones they are known only once the model has
            read what stands before them.
        read: how many tokens of prompt and answer the model has read.
        ended: None while it is written; True where it ended by itself, False where its budget did, or a failure.
        failure: what its own steering, stop or streamer raised, which ended it (`alone`).
    """

    def __init__(self, wanted: Wanted, asker: Asker, drafts: Record) -> None:
        self.wanted, self.asker, self.ends = wanted, asker, asker.ends
        self._drafts = drafts
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.read = 0
        self.ended: bool | None = None
        self.failure: Exception | None = None
        self._text = GrowingText(asker.tokenizer)
        self._undrawn = 0  # forced tokens since the last one that was drawn

    @cached_property
    def steering(self) -> Steering | None:
        return self.wanted.steering() if self.wanted.steering else None

    @cached_property
    def _stream(self) -> torch.Generator:
        return sample_stream(self.wanted.drawn.seed, self.wanted.drawn.number, self.wanted.prompt)

    @cached_property
    def _lookup(self) -> PromptLookup:
        return PromptLookup(self.wanted.prompt, self.wanted.lookup, self._drafts)

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.wanted.prompt, *self.tokens)

    @property
    def unread(self) -> list[int]:
        """The tokens that the model has still to read; its prompt was read."""
        return self.tokens[self.read - len(self.wanted.prompt) :]

    @property
    def length(self) -> int:
        """Of prompt and answer, in tokens."""
        return len(self.wanted.prompt) + len(self.tokens)

    @property
    def longest(self) -> int:
        """What `length` may become."""
        return len(self.wanted.prompt) + self.wanted.max_new_tokens

    @property
    def owed(self) -> int:
        """How many of its tokens have no log-probability yet, where they are to have one."""
        return len(self.tokens) - len(self.logprobs) if self.wanted.logprobs else 0

    @property
    def done(self) -> bool:
        """It has ended, and what is not known of it belongs to the token that ended it."""
        if self.failure:
            return True
        return self.ended is not None and self.owed <= (self.tokens[-1] in self.ends)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """What is raised within ends this answer, and no other; but for a lack of memory, which is everybody's."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.failure, self.ended = error, False

    def take(self, token: int) -> None:
        """Go on by a token."""
        wanted = self.wanted
        self.tokens.append(token)
        if self.steering:
            self.steering.consume(token)
        if wanted.streamer and token not in self.ends:
            wanted.streamer.put(torch.tensor([token]))
        if token in self.ends or self._stopped():
            self.ended = True
        elif len(self.tokens) == wanted.max_new_tokens:
            self.ended = False

    def take_forced(self) -> None:
        """Go on by the tokens that come next whatever the model makes of them."""
        while self.steering and self.ended is None and (token := self.steering.forced()) is not None:
            self.take(token)
            self._undrawn += 1

    def draft(self, most: int, least_share: float, least_right: float) -> list[int]:
        """Up to so many tokens that may come next, from where its last ones stood before; see `PromptLookup.draft`."""
        most = min(most, self.wanted.max_new_tokens - len(self.tokens) - 1)
        if most < 1 or not self.wanted.lookup or self.ended is not None:
            return []
        tokens = self._lookup.draft(self.tokens, most, least_share, least_right)
        return tokens[: self.steering.fitting(tokens)] if tokens and self.steering else tokens

    def drafted(self, count: int, right: int) -> None:
        """Of so many tokens of the last draft so many came next."""
        self._lookup.learn(count, right)

    def stream(self, columns: int) -> torch.Generator:
        """Its random numbers, for the draw of the next token of `columns`; a forced one takes as many as any."""
        for _ in range(self._undrawn):
            torch.rand(columns, generator=self._stream)
        self._undrawn = 0
        return self._stream

    def _stopped(self) -> bool:
        """Its text satisfies its `stop`."""
        wanted = self.wanted
        return wanted.stop is not None and wanted.stop(wanted.text_of(self._text.feed(self.tokens)))
