"""Keys and values of rows that go on by unlike numbers of tokens, and can give tokens back.

Each row's columns begin at the cache's first, so that a column is a position: what a step adds to a row is written
behind what it has, and given back by being forgotten, which moves nothing. What stands behind a row's end is hidden
from it by a mask. The rest of the model sees the tokens of all rows as one text: only attention knows rows.

Layers that see everything alone (see `revisable`): of others, states cannot go back, and windows are cut from a cache's
end.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from common.models.batching import layer_kinds

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

ROOM = 32  # columns that are made at a time
NAME = "sdpa_of_aligned_rows"


def revisable(model: PreTrainedModel | PeftModel) -> bool:
    """Whether rows of a model can be kept like this: its layers see all that is before them, by the mask they get."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = model.config.get_text_config()
    return (
        layer_kinds(config) == {"full_attention"}
        and config._attn_implementation == "sdpa"
        and "position_ids" in inspect.signature(inner.forward).parameters
        and hasattr(sys.modules[type(inner).__module__], "create_causal_mask")  # which lets such a mask be
        and hasattr(sys.modules[type(inner).__module__], "ALL_ATTENTION_FUNCTIONS")  # of which ours is then one
        and not getattr(config, "alibi", False)  # it makes its own of which positions there are
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
        and inner.get_output_embeddings() is not None
        and len({*(getattr(inner, "hf_device_map", None) or {}).values()}) < 2
    )


class Step:
    """The tokens of a step, those of all rows one behind another, so that no row's number costs another one anything.

    Args:
        begun: how many tokens each row has.
        counts: how many it gets.
        order: of the rows, in which their tokens stand; None: their own.

    Attributes:
        row: [tokens] of each.
        column: [tokens] where each goes.
        until: the last of these columns, and one.
        first: [rows] the first token of each row.
        ends: the place behind the last token of each row.
        mask: [rows, 1, 1, columns] to add to the scores of these: each sees its row up to itself.
        longer: (row, its first token, how many it has, the columns up to its last) of the rows with several tokens.
    """

    def __init__(
        self,
        begun: Sequence[int],
        counts: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        order: Sequence[int] | None = None,
    ) -> None:
        order = range(len(counts)) if order is None else order
        tokens = [(row, place) for row in order for place in range(counts[row])]
        behind = dict(zip(order, accumulate(counts[row] for row in order), strict=True))
        self.ends = [behind[row] for row in range(len(counts))]
        firsts = [end - count for end, count in zip(self.ends, counts, strict=True)]
        self.row = torch.tensor([row for row, _ in tokens], device=device)
        self.column = torch.tensor([begun[row] + place for row, place in tokens], device=device)
        self.until = max(start + count for start, count in zip(begun, counts, strict=True))
        self.first = torch.tensor(firsts, device=device)
        unseen = torch.arange(self.until, device=device) > self.column[self.first][:, None, None, None]
        self._lowest = torch.finfo(dtype).min
        self.mask = torch.zeros(unseen.shape, dtype=dtype, device=device).masked_fill_(unseen, self._lowest)
        self.longer = [
            (row, first, count, begun[row] + count)
            for row, (first, count) in enumerate(zip(firsts, counts, strict=True))
            if count > 1
        ]
        self._masks: dict[tuple[int, int], torch.Tensor] = {}

    def mask_of(self, row: int, times: int) -> torch.Tensor:
        """[tokens * times, columns] to add to the scores of all tokens of a row, one text of them after another."""
        if (row, times) not in self._masks:
            ((count, until),) = ((count, until) for own, _, count, until in self.longer if own == row)
            mask = self.mask.new_full((count, until), self._lowest).triu_(until - count + 1)
            self._masks[row, times] = mask.repeat(times, 1)
        return self._masks[row, times]


_step: ContextVar[Step | None] = ContextVar("step", default=None)  # None: what is read is a text of its own


class _AlignedLayer(DynamicLayer):
    """Has room behind its keys and values."""

    buffers: tuple[torch.Tensor, ...] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        step = _step.get()
        if step is None:
            return super().update(key_states, value_states, *args, **kwargs)
        if self.buffers is None or step.until > self.buffers[0].shape[-2]:
            more = step.until - self.keys.shape[-2] + ROOM
            self.buffers = tuple(functional.pad(tensor, (0, 0, 0, more)) for tensor in (self.keys, self.values))
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[step.row, :, step.column] = states[0].transpose(0, 1)
        self.keys, self.values = (buffer[:, :, : step.until] for buffer in self.buffers)
        return self.keys, self.values

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values, self.buffers = keys, values, None


def empty_cache(config: PreTrainedConfig) -> Cache:
    """A cache with a place for each layer's keys and values."""
    cache = DynamicCache(config=config)
    cache.layers = [_AlignedLayer() for _ in cache.layers]
    return cache


def join(caches: Sequence[Cache], columns: int) -> Cache:
    """One cache, the first, with the rows of all, in order; the others are used up, layer by layer.

    Args:
        columns: as many as the longest row has.
    """
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layers[0].replace(
            *(
                torch.cat([functional.pad(tensor, (0, 0, 0, columns - tensor.shape[-2])) for tensor in tensors])
                for tensors in ([layer.keys for layer in layers], [layer.values for layer in layers])
            )
        )
        for layer in layers[1:]:
            if layer is not layers[0]:
                layer.keys = layer.values = None
    return caches[0]


def keep(cache: Cache, rows: Sequence[int], columns: int) -> None:
    """Leave some of the rows, in this order, and as many columns as the longest of them has."""
    for layer in cache.layers:
        index = torch.tensor(rows, device=layer.keys.device)
        layer.replace(*(tensor[:, :, :columns].index_select(0, index) for tensor in (layer.keys, layer.values)))


@contextlib.contextmanager
def stepping(
    model: PreTrainedModel | PeftModel, step: Step, tokens: torch.Tensor, wanted: Sequence[int]
) -> Iterator[None]:
    """While it lasts, a pass over `tokens` [1, tokens] is a step of rows, whose cache and `step.mask` it is given.

    Its logits are [1, wanted, columns], those behind some of the tokens. Another pass that a hook of the model makes on
    the way, before its own begins (a server answers short requests there), is none.
    """
    config = model.config.get_text_config()
    implementation = config._attn_implementation
    AttentionInterface.register(NAME, _attend)

    def begin(embeddings: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].data_ptr() == tokens.data_ptr():
            config._attn_implementation = NAME
            _step.set(step)

    def choose(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        return None if _step.get() is None else (inputs[0][:, wanted], *inputs[1:])

    handles = [
        model.get_input_embeddings().register_forward_pre_hook(begin),
        model.get_output_embeddings().register_forward_pre_hook(choose),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _step.set(None)
        config._attn_implementation = implementation


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa" for a step: queries [1, heads, tokens, size], keys and values [rows, heads, columns, size].

    Rows with several tokens attend one by one, so that those with one need not be as wide. Heads that share keys become
    more tokens of one head, so that no key is copied, as transformers itself does where there is a single token.
    """
    step, heads, shared = _step.get(), query.shape[1], key.shape[1]
    attended = query.new_empty(query.shape[2], heads, value.shape[3])
    if len(step.longer) < len(step.first):
        firsts = query[0].transpose(0, 1)[step.first].unflatten(1, (shared, heads // shared))
        attend = functional.scaled_dot_product_attention
        attended[step.first] = attend(firsts, key, value, attn_mask=step.mask, scale=scaling).flatten(1, 2)
    for row, first, count, until in step.longer:
        own = query[0, :, first : first + count].reshape(1, shared, -1, query.shape[3])
        seen = (states[row : row + 1, :, :until] for states in (key, value))
        mask = step.mask_of(row, heads // shared)
        found = functional.scaled_dot_product_attention(own, *seen, attn_mask=mask, scale=scaling)
        attended[first : first + count] = found.reshape(heads, count, -1).transpose(0, 1)
    return attended[None], None
