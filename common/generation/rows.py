"""What runs a continuous batch: the forward passes over its rows, and what they keep between them.

A row is read once (`read`), joins those that are in the batch (`join`), goes on by a token at a time with them (`step`)
and leaves (`keep`). `TorchRows` keeps keys, values and states in transformers' caches, `PackedRows` in llama.cpp.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from common.generation import row_cache
from common.models import packed_weights
from common.models.gguf_text import PackedModel

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

MOST_ROWS = 64  # beyond about so many a step takes longer by as much as it does more


class Rows(ABC):
    """The rows of a batch in a model.

    Attributes:
        most: rows at a time.
    """

    most: int = MOST_ROWS

    def make_room(self, lengths: Sequence[int], budget: int) -> None:  # noqa: B027 (many have it)
        """Prepare for rows that may come to have so many tokens each; called while there are none.

        Args:
            budget: rows x tokens at a time; one row always goes.
        """

    def admits(self, length: int) -> bool:
        """Whether a row that may come to have so many tokens can join those that are there."""
        return True

    @abstractmethod
    def read(self, ids: Sequence[int]) -> tuple[Any, torch.Tensor]:
        """(what `join` takes of a text, the logits [1, columns] of what follows it)."""

    @abstractmethod
    def join(self, states: Sequence[Any]) -> None:
        """Put rows behind those that are there; one text that was read can be several of them."""

    @abstractmethod
    def drop(self, state: Any) -> None:
        """Forget a text that was read and does not join."""

    @abstractmethod
    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Logits [rows, columns] after the newest token of each row, which has so many tokens with it."""

    @abstractmethod
    def keep(self, rows: Sequence[int], columns: int) -> None:
        """Let all but some rows go, whose longest has so many tokens before its newest."""


def rows_of(model: PreTrainedModel | PeftModel | PackedModel) -> Rows:
    """The rows of a batch in a model, of whatever kind."""
    return PackedRows(model) if isinstance(model, PackedModel) else TorchRows(model)


class TorchRows(Rows):
    """See `Rows`; in a torch model."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model
        self.most = MOST_ROWS if row_cache.joinable(model.config) else 1
        self._cache: Cache | None = None  # of the rows, without the newest token of each
        self._inputs = _inputs_of(model)

    def read(self, ids: Sequence[int]) -> tuple[Cache, torch.Tensor]:
        """See `Rows`."""
        cache = row_cache.empty_cache(self.model.config)
        tokens = torch.tensor([ids], device=self.model.device)
        positions = torch.arange(len(ids), device=self.model.device)[None]
        return cache, self._forward(tokens, positions, torch.ones_like(tokens), cache)

    def make_room(self, lengths: Sequence[int], budget: int) -> None:
        """See `Rows`."""
        packed_weights.pack_for(self.model, len(lengths))

    def join(self, states: Sequence[Cache]) -> None:
        """See `Rows`."""
        caches = [self._cache, *states] if self._cache is not None else states
        self._cache = row_cache.join(caches) if len(caches) > 1 else caches[0]

    def drop(self, state: Cache) -> None:
        """See `Rows`."""

    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """See `Rows`."""
        device = self.model.device
        of_rows = torch.tensor(lengths, device=device)
        columns = torch.arange(max(lengths), device=device)
        mask = (columns >= len(columns) - of_rows[:, None]).long()
        return self._forward(torch.tensor(tokens, device=device)[:, None], of_rows[:, None] - 1, mask, self._cache)

    def keep(self, rows: Sequence[int], columns: int) -> None:
        """See `Rows`."""
        if rows:
            row_cache.keep(self._cache, rows, columns)
        else:
            self._cache = None

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Logits [rows, columns] at the last of some tokens [rows, tokens]; `cache` grows by them."""
        inputs = {"position_ids": positions, "logits_to_keep": 1, "past_key_values": cache, "cache_params": cache}
        inputs = {name: value for name, value in inputs.items() if name in self._inputs}
        return self.model(input_ids=tokens, attention_mask=mask, use_cache=True, **inputs).logits[:, -1]


class PackedRows(Rows):
    """See `Rows`; in llama.cpp, where each has a sequence, and room for as long as it may become."""

    def __init__(self, model: PackedModel) -> None:
        self.model = model
        self._of_rows: list[int] = []  # the sequence of each row
        self._free: list[int] = []

    def make_room(self, lengths: Sequence[int], budget: int) -> None:
        """See `Rows`."""
        longest = max(lengths)
        rows = max(1, min(MOST_ROWS, budget // longest))
        if longest > self.model.columns or rows > self.model.sequences:
            self.model.open(rows, longest)
        self._free, self._of_rows = list(range(self.model.sequences)), []
        self.most = self.model.sequences

    def admits(self, length: int) -> bool:
        """See `Rows`."""
        return length <= self.model.columns

    def read(self, ids: Sequence[int]) -> tuple[int, torch.Tensor]:
        """See `Rows`."""
        sequence = self._free.pop()
        return sequence, self.model.read(sequence, ids)

    def join(self, states: Sequence[int]) -> None:
        """See `Rows`."""
        for sequence in states:
            if sequence in self._of_rows:  # another sample of a text
                sequence, source = self._free.pop(), sequence
                self.model.copy(source, sequence)
            self._of_rows.append(sequence)

    def drop(self, state: int) -> None:
        """See `Rows`; what a sequence had goes when it begins anew."""
        self._free.append(state)

    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """See `Rows`."""
        return self.model.step(self._of_rows, tokens, [length - 1 for length in lengths])

    def keep(self, rows: Sequence[int], columns: int) -> None:
        """See `Rows`."""
        kept = [self._of_rows[row] for row in rows]
        for sequence in set(self._of_rows) - set(kept):
            self.drop(sequence)
        self._of_rows = kept


def _inputs_of(model: PreTrainedModel | PeftModel) -> set[str]:
    """The names of what a model's forward pass takes."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's own passes on what it gets
    return set(inspect.signature(inner.forward).parameters)
