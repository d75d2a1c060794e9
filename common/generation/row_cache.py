"""Keys, values and states of rows that come and go: transformers' caches, joined, thinned out and trimmed.

A row's columns end where the batch's end; before its first there is padding, which a mask hides. Positions are each
row's own, so that rows of any lengths go together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from common.models.batching import layer_kinds

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Layers whose rows can be told apart in a cache. Of others, as chunks that are counted from a batch's first column or
# an index of keys, rows that begin at unlike columns cannot share one.
JOINABLE = {"full_attention", "sliding_attention", "conv", "linear_attention", "hybrid", "hybrid_sliding"}
ROOM = 16  # columns that are made at a time


def joinable(config: PreTrainedConfig) -> bool:
    """Whether rows of a model of this config can be joined."""
    return layer_kinds(config) <= JOINABLE


def empty_cache(config: PreTrainedConfig) -> Cache:
    """A cache with a place for each layer's keys and values, or states."""
    cache = DynamicCache(config=config)
    cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def join(caches: Sequence[Cache]) -> Cache:
    """One cache, the first, with the rows of all, in order; the others are used up, layer by layer.

    So that no more than one layer is there twice. A cache can be among them several times.
    """
    for first, *others in zip(*(cache.layers for cache in caches), strict=True):
        if isinstance(first, DynamicLayer):
            _join_columns(first, others)
        if isinstance(first, LinearAttentionCacheLayerMixin):
            for states in ("conv_states", "recurrent_states"):
                of_rows = [getattr(layer, states) for layer in (first, *others)]
                for index, state in of_rows[0].items():
                    if state is not None:
                        of_rows[0][index] = torch.cat([tensors[index] for tensors in of_rows])
        for layer in others:
            if isinstance(layer, DynamicLayer) and layer is not first:
                layer.keys = layer.values = None
    return caches[0]


def _join_columns(first: DynamicLayer, others: Sequence[DynamicLayer]) -> None:
    layers = (first, *others)
    if not first.is_initialized:  # it takes another layer's
        return
    width = max(layer.keys.shape[-2] for layer in layers)

    def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([functional.pad(tensor, (0, 0, width - tensor.shape[-2], 0)) for tensor in tensors])

    _replace(first, joined([layer.keys for layer in layers]), joined([layer.values for layer in layers]))
    if isinstance(first, DynamicSlidingWindowLayer):
        first.cumulative_length = max(layer.cumulative_length for layer in layers)


def keep(cache: Cache, rows: Sequence[int], columns: int) -> None:
    """Leave some of the rows, in this order, and of the columns as many as the longest of them has."""
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            index = torch.tensor(rows, device=layer.keys.device)
            kept = columns
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length, kept = columns, min(columns, layer.sliding_window - 1)
            start = layer.keys.shape[-2] - kept
            _replace(layer, *(tensor[:, :, start:].index_select(0, index) for tensor in (layer.keys, layer.values)))
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for states in (layer.conv_states, layer.recurrent_states):
                for number, state in states.items():
                    if state is not None:
                        states[number] = state.index_select(0, torch.tensor(rows, device=state.device))


def _replace(layer: DynamicLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
    layer.keys, layer.values = keys, values
    if isinstance(layer, _GrowingLayer):
        layer.buffers = None


class _GrowingLayer(DynamicLayer):
    """Has room behind its keys and values, so that a step writes one column and does not copy all of them."""

    buffers: tuple[torch.Tensor, ...] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:  # a prompt, which may be joined next: no room yet
            return super().update(key_states, value_states, *args, **kwargs)
        held = self.keys.shape[-2]
        length = held + key_states.shape[-2]
        if self.buffers is None or length > self.buffers[0].shape[-2]:
            more = length - held + ROOM
            self.buffers = tuple(functional.pad(tensor, (0, 0, 0, more)) for tensor in (self.keys, self.values))
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, held:length] = states
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)
        return self.keys, self.values
