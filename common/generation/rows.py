"""What runs a continuous batch: the forward passes over its rows, and what they keep between them.

A row is read once (`read`), joins those that are in the batch (`join`), goes on by some tokens at a time with them
(`step`), of which the last ones may be taken back, and leaves (`keep`). `RevisableRows` and `TorchRows` keep keys,
values and states in transformers' caches, `GgufRows` in llama.cpp.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import torch

from common.generation import aligned_cache, row_cache
from common.generation.reading_time import ReadingTime
from common.models import lora_inference, packed_weights
from common.models.batching import layer_kinds
from common.models.gguf_model import GgufModel, Sequences, rounded

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

MOST_ROWS = 64  # beyond about so many a step takes longer by as much as it does more
STEP_TOKENS = 10  # a step takes as long as reading so many tokens, beside its own, on a CPU (docs/results.md)
SECOND_TOKEN = 0.8  # in float32 on a CPU, where from there on a weight is put in order first
PACKED_STEP_TOKENS = 0.5  # in llama.cpp, which multiplies each token for itself: few drafts are worth it
PACKED_AT_ONCE = 128  # tokens that any of its contexts takes in a call
GPU_STEP_TOKENS = 256  # on a card that is busy with reading its weights


@dataclass(frozen=True)
class Advance:
    """How a row goes on in a step.

    Attributes:
        tokens: those that come next.
        begun: how many it has before them.
        wanted: behind how many of them, the last ones, logits are asked for.
        adapter: see `Asker`; others than the active one are for `RevisableRows` alone.
    """

    tokens: Sequence[int]
    begun: int
    wanted: int
    adapter: str | None


class Rows(ABC):
    """The rows of a batch in a model.

    Attributes:
        most: rows at a time.
        several: a step may take several tokens of a row, and tokens can be taken back.
        step_tokens: reading how many tokens more takes as long as a step of one row.
        second_token: by which part of it a step of one row is longer once it has more than one token.
    """

    most: int = MOST_ROWS
    several: bool = False
    step_tokens: float = STEP_TOKENS
    second_token: float = 0.0

    def make_room(self, lengths: Sequence[int], budget: int) -> None:  # noqa: B027 (many have it)
        """Prepare for rows that may come to have so many tokens each; called while there are none.

        Args:
            budget: rows x tokens at a time; one row always goes.
        """

    def admits(self, length: int) -> bool:
        """Whether a row that may come to have so many tokens can join those that are there."""
        return True

    @abstractmethod
    def read(self, ids: Sequence[int], wanted: int = 1, adapter: str | None = None) -> tuple[Any, torch.Tensor]:
        """(what `join` takes of a text, the logits [wanted, columns] of what follows its last `wanted` tokens).

        Args:
            adapter: see `Advance`.
        """

    @abstractmethod
    def join(self, states: Sequence[Any]) -> None:
        """Put rows behind those that are there; one text that was read can be several of them."""

    @abstractmethod
    def drop(self, state: Any) -> None:
        """Forget a text that was read and does not join."""

    @abstractmethod
    def step(self, rows: Sequence[Advance]) -> torch.Tensor:
        """Go on with each row; by one token each, unless `several` go.

        Returns:
            The logits [sum of wanted, columns] of what follows the last `wanted` tokens of each row, row by row.
        """

    @abstractmethod
    def keep(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Let all but some rows go, and of these all but so many tokens, from their first on."""


def rows_of(model: PreTrainedModel | PeftModel | GgufModel) -> Rows:
    """The rows of a batch in a model, of whatever kind."""
    if isinstance(model, GgufModel):
        return GgufRows(model)
    return RevisableRows(model) if aligned_cache.revisable(model) else TorchRows(model)


class TorchRows(Rows):
    """See `Rows`; in any torch model, a token at a time."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model
        self.most = MOST_ROWS if row_cache.joinable(model.config) else 1
        self._cache: Cache | None = None  # of the rows, without the newest token of each
        self._inputs = _inputs_of(model)
        self._reading_time = ReadingTime(model)

    def read(self, ids: Sequence[int], wanted: int = 1, adapter: str | None = None) -> tuple[Cache, torch.Tensor]:
        """See `Rows`."""
        cache = self._empty_cache()
        tokens = torch.tensor([ids], device=self.model.device)
        positions = torch.arange(len(ids), device=self.model.device)[None]
        with self._reading_time.said(len(ids)):
            return cache, self._forward(tokens, positions, torch.ones_like(tokens), cache, wanted)[0]

    def make_room(self, lengths: Sequence[int], budget: int) -> None:
        """See `Rows`."""
        packed_weights.pack_for(self.model, len(lengths))

    def join(self, states: Sequence[Cache]) -> None:
        """See `Rows`."""
        caches = [self._cache, *states] if self._cache is not None else states
        self._cache = self._joined(caches) if len(caches) > 1 else caches[0]

    def drop(self, state: Cache) -> None:
        """See `Rows`."""

    def step(self, rows: Sequence[Advance]) -> torch.Tensor:
        """See `Rows`."""
        device = self.model.device
        tokens = torch.tensor([row.tokens for row in rows], device=device)
        positions = torch.tensor([[row.begun] for row in rows], device=device)
        columns = torch.arange(max(row.begun for row in rows) + 1, device=device)
        mask = (columns >= len(columns) - 1 - positions).long()
        return self._forward(tokens, positions, mask, self._cache)[:, -1]

    def keep(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """See `Rows`."""
        if rows:
            row_cache.keep(self._cache, rows, max(lengths))
        else:
            self._cache = None

    def _empty_cache(self) -> Cache:
        return row_cache.empty_cache(self.model.config)

    def _joined(self, caches: Sequence[Cache]) -> Cache:
        return row_cache.join(caches)

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: Cache, wanted: int = 1
    ) -> torch.Tensor:
        """Logits [rows, wanted, columns] at the last of some tokens [rows, tokens]; `cache` grows by them."""
        inputs = {"position_ids": positions, "logits_to_keep": wanted, "past_key_values": cache, "cache_params": cache}
        inputs = {name: value for name, value in inputs.items() if name in self._inputs}
        return self.model(input_ids=tokens, attention_mask=mask, use_cache=True, **inputs).logits[:, -wanted:]


class RevisableRows(TorchRows):
    """See `Rows`; in a torch model whose caches are `aligned_cache`s: of several tokens of each row at a time.

    Rows may have several adapters (`lora_inference.segments`): a step has the tokens of an adapter's rows side by side.
    """

    several = True

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__(model)
        on_cpu = model.device.type == "cpu"
        self.step_tokens = STEP_TOKENS if on_cpu else GPU_STEP_TOKENS
        self.second_token = SECOND_TOKEN if on_cpu and model.dtype == torch.float32 else 0.0
        self._lengths: list[int] = []

    def join(self, states: Sequence[Cache]) -> None:
        """See `Rows`."""
        self._lengths += [state.get_seq_length() for state in states]
        super().join(states)

    def read(self, ids: Sequence[int], wanted: int = 1, adapter: str | None = None) -> tuple[Cache, torch.Tensor]:
        """See `Rows`."""
        with lora_inference.adapted([(adapter, len(ids))], of_tokens=True):
            return super().read(ids, wanted)

    def step(self, rows: Sequence[Advance]) -> torch.Tensor:
        """See `Rows`."""
        device, counts = self.model.device, [len(row.tokens) for row in rows]
        order = sorted(range(len(rows)), key=lambda number: rows[number].adapter or "")
        step = aligned_cache.Step([row.begun for row in rows], counts, self.model.dtype, device, order)
        self._lengths = [row.begun + len(row.tokens) for row in rows]
        places = [place for end, row in zip(step.ends, rows, strict=True) for place in range(end - row.wanted, end)]
        in_order = [rows[number] for number in order]
        flat = torch.tensor([[token for row in in_order for token in row.tokens]], device=device)
        by_adapter = groupby(in_order, lambda row: row.adapter)
        parts = [(adapter, sum(len(row.tokens) for row in own)) for adapter, own in by_adapter]
        adapted = lora_inference.adapted(parts, of_tokens=True)
        with aligned_cache.stepping(self.model, step, flat, places), adapted:
            return self._forward(flat, step.column[None], step.mask, self._cache, wanted=0)[0]

    def keep(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """See `Rows`."""
        if not rows:
            self._cache = None
        elif len(rows) < len(self._lengths):
            aligned_cache.keep(self._cache, rows, max(lengths))
        self._lengths = list(lengths)

    def _empty_cache(self) -> Cache:
        return aligned_cache.empty_cache(self.model.config)

    def _joined(self, caches: Sequence[Cache]) -> Cache:
        return aligned_cache.join(caches, max(self._lengths))


class GgufRows(Rows):
    """See `Rows`; in llama.cpp, where each has a sequence, and room for as long as it may become."""

    step_tokens = PACKED_STEP_TOKENS

    def __init__(self, model: GgufModel) -> None:
        self.model = model
        self.several = layer_kinds(model.config) == {"full_attention"}  # windows and states cannot go back
        self._texts: Sequences | None = None
        self._of_rows: list[int] = []  # the sequence of each row
        self._free: list[int] = []

    def make_room(self, lengths: Sequence[int], budget: int) -> None:
        """See `Rows`."""
        columns = rounded(max(lengths))
        self._texts = self.model.texts(max(1, min(MOST_ROWS, budget // columns)), columns)
        self._free, self._of_rows = list(range(self._texts.count)), []
        self.most = self._texts.count

    def admits(self, length: int) -> bool:
        """See `Rows`."""
        return length <= self._texts.columns

    def read(self, ids: Sequence[int], wanted: int = 1, adapter: str | None = None) -> tuple[int, torch.Tensor]:
        """See `Rows`."""
        sequence = self._free.pop()
        return sequence, torch.from_numpy(self._texts.read(sequence, ids, wanted=wanted))

    def join(self, states: Sequence[int]) -> None:
        """See `Rows`."""
        for sequence in states:
            if sequence in self._of_rows:  # another sample of a text
                sequence, source = self._free.pop(), sequence
                self._texts.copy(source, sequence)
            self._of_rows.append(sequence)

    def drop(self, state: int) -> None:
        """See `Rows`; what a sequence had goes when it begins anew."""
        self._free.append(state)

    def step(self, rows: Sequence[Advance]) -> torch.Tensor:
        """See `Rows`."""
        logits = self._read_on(rows)
        if sum(row.wanted for row in rows) == len(logits):
            return logits
        ends = accumulate(len(row.tokens) for row in rows)
        return logits[[place for end, row in zip(ends, rows, strict=True) for place in range(end - row.wanted, end)]]

    def _read_on(self, rows: Sequence[Advance]) -> torch.Tensor:
        """The logits [tokens, columns] of what follows each of the rows' next tokens."""
        every = [
            (sequence, token, row.begun + place)
            for sequence, row in zip(self._of_rows, rows, strict=True)
            for place, token in enumerate(row.tokens)
        ]
        parts = [every[start : start + PACKED_AT_ONCE] for start in range(0, len(every), PACKED_AT_ONCE)]
        read = [self._texts.step(*map(list, zip(*part, strict=True))) for part in parts]
        return torch.cat(list(map(torch.from_numpy, read)))

    def keep(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """See `Rows`."""
        kept = [self._of_rows[row] for row in rows]
        for sequence in set(self._of_rows) - set(kept):
            self.drop(sequence)
        self._of_rows = kept
        for sequence, length in zip(kept, lengths, strict=True) if self.several else ():
            self._texts.cut(sequence, length)


def _inputs_of(model: PreTrainedModel | PeftModel) -> set[str]:
    """The names of what a model's forward pass takes."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's own passes on what it gets
    return set(inspect.signature(inner.forward).parameters)
