"""Attention of a sequence that is a tree of rows: each segment sees its ancestors and itself, in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from common.training.prefix_tree import Siblings

QUERIES = 128  # tokens of a sibling whose attention map is made at a time; what comes after them costs them nothing
VECTOR = 32  # numbers in bfloat16; torch's softmax takes nearly twice as long for rows that are no multiple of it


class TreeAttention(torch.autograd.Function):
    """softmax(s Q K^T) V of the segments of a tree, each over its ancestors and itself.

    Maps of a few queries are made at a time, in the type of the queries, and made again in the backward pass (Dao et
    al. 2022, FlashAttention, arXiv:2205.14135, appendix B.2). All that a map passes through is one product, one
    softmax and another product, none of which copies it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        groups: Sequence[Siblings],
        scaling: float,
    ) -> torch.Tensor:
        """
        Args:
            query: [heads, tokens, width].
            key, value: [key heads, tokens, width]; neighbouring heads share a key head.
            groups: in the order of the sequence; what is behind the last one attends to nothing.

        Returns:
            [heads, tokens, width], where the heads of a token lie side by side.
        """
        heads, tokens, width = query.shape
        out = query.new_empty(tokens, heads, width).transpose(0, 1)
        out[:, groups[-1].end :] = 0
        for group in groups:
            out[:, group.start : group.end] = _Attention(group, query, key, value, scaling).values()
        ctx.save_for_backward(query, key, value)
        ctx.groups, ctx.scaling = groups, scaling
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value = ctx.saved_tensors
        d_query = torch.empty_like(query)
        d_query[:, ctx.groups[-1].end :] = 0
        d_key, d_value = (torch.zeros(tensor.shape, dtype=torch.float32) for tensor in (key, value))
        for group in ctx.groups:
            part = _Attention(group, query, key, value, ctx.scaling)
            d_query[:, group.start : group.end] = part.gradients(gradient, d_key, d_value)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


@dataclass(frozen=True)
class _Queries:
    """Some neighbouring tokens of each sibling, from `start` to before `end`, whose attention map is made at once.

    Attributes:
        bias: [c, b + end], 0 where a query sees a key and else minus infinity.
    """

    start: int
    end: int
    bias: torch.Tensor

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """[gm, rc, w] of [g, m, r, l, w]."""
        return tensor[:, :, :, self.start : self.end].flatten(0, 1).flatten(1, 2)


class _Attention:
    """The attention of a group of siblings.

    Shapes: g key heads, m siblings, r heads that share a key head, l tokens of the longest sibling, n of the group, c
    queries a map, b tokens of the ancestors and before them padding, s = b + l that a sibling sees, w width.
    """

    def __init__(
        self, group: Siblings, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> None:
        self.group, self.scaling, self.key_heads = group, scaling, len(key)
        self.padding = -(group.before + group.longest) % VECTOR
        self.before = self.padding + group.before
        self.query = self._by_sibling(query.index_select(1, group.padded))
        self.key, self.value = map(self._seen, (key, value))

    def values(self) -> torch.Tensor:
        """[heads, n, w]"""
        out = torch.empty_like(self.query)
        for queries in self._queries():
            seen = self.value[:, : self.before + queries.end]
            self._write(out, queries, self._probabilities(queries) @ seen)
        return self._unpadded(out)

    def gradients(self, gradient: torch.Tensor, d_key: torch.Tensor, d_value: torch.Tensor) -> torch.Tensor:
        """The gradient of the group's queries [heads, n, w]; those of keys and values are added to `d_*`.

        Args:
            gradient: [heads, tokens, w] of the whole sequence.
            d_key, d_value: [key heads, tokens, w], float32.
        """
        padded = gradient.new_zeros(len(gradient), len(self.group.padded), gradient.shape[-1])
        padded[:, self.group.real] = gradient[:, self.group.start : self.group.end]  # padding has no gradient
        d_out = self._by_sibling(padded)
        d_query = torch.empty_like(self.query)
        d_seen: list[torch.Tensor] = []
        for queries in reversed(self._queries()):
            end = self.before + queries.end
            probabilities, d_values = self._probabilities(queries), queries.of(d_out)
            d_probabilities = d_values @ self.value[:, :end].transpose(1, 2)
            d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, probabilities.dtype)
            self._write(d_query, queries, _scaled_product(d_scores, self.key[:, :end], self.scaling))
            # As transposes of transposes: what is copied to lie in a product's order is the small factor, not the map.
            parts = (
                _scaled_product(queries.of(self.query).transpose(1, 2), d_scores, self.scaling).transpose(1, 2),
                (d_values.transpose(1, 2) @ probabilities).transpose(1, 2),
            )
            if not d_seen:  # the last queries, which see all that any does
                d_seen = [part.float() for part in parts]
                continue
            for total, part in zip(d_seen, parts, strict=True):
                total[:, :end] += part
        for total, part in zip((d_key, d_value), d_seen, strict=True):
            self._add(total, part)
        return self._unpadded(d_query)

    def _queries(self) -> list[_Queries]:
        """Those of all tokens, made once for all layers and both directions."""
        made = self.group.queries
        dtype = self.query.dtype
        if dtype not in made:
            made[dtype] = list(self._cut())
        return made[dtype]

    def _cut(self) -> Iterator[_Queries]:
        """The first queries are the fewest, so that the keys of each are a multiple of VECTOR."""
        longest = self.group.longest
        for end in range((longest - 1) % QUERIES + 1, longest + 1, QUERIES):
            start = max(0, end - QUERIES)
            bias = self.query.new_full((end - start, self.before + end), -torch.inf).triu(self.before + start + 1)
            bias[:, : self.padding] = -torch.inf
            yield _Queries(start, end, bias)

    def _probabilities(self, queries: _Queries) -> torch.Tensor:
        """[gm, rc, b + end]"""
        keys = self.key[:, : self.before + queries.end]
        scores = _scaled_product(queries.of(self.query), keys.transpose(1, 2), self.scaling)
        scores.unflatten(1, (-1, len(queries.bias))).add_(queries.bias)
        return scores.softmax(dim=-1)

    def _by_sibling(self, rows: torch.Tensor) -> torch.Tensor:
        """[g, m, r, l, w] of padded [heads, m * l, w]."""
        rows = rows.view(self.key_heads, -1, len(self.group.lengths), self.group.longest, rows.shape[-1])
        return rows.transpose(1, 2)

    def _unpadded(self, rows: torch.Tensor) -> torch.Tensor:
        """[heads, n, w] of [g, m, r, l, w]."""
        return rows.transpose(1, 2).flatten(0, 1).flatten(1, 2).index_select(1, self.group.real)

    def _seen(self, tensor: torch.Tensor) -> torch.Tensor:
        """[gm, s, w] of keys or values [g, tokens, w]: for each sibling padding, the ancestors and itself."""
        own = tensor.index_select(1, self.group.padded).unflatten(1, (len(self.group.lengths), -1))
        old = [tensor[:, None, start:end].expand(-1, own.shape[1], -1, -1) for start, end in self.group.ancestors]
        padding = own.new_zeros(()).expand(*own.shape[:2], self.padding, own.shape[-1])
        return torch.cat([padding, *old, own], dim=2).flatten(0, 1)

    def _add(self, total: torch.Tensor, part: torch.Tensor) -> None:
        """Add `part` [gm, s, w] to `total` [g, tokens, w], from where `_seen` took it."""
        part = part.unflatten(0, (self.key_heads, -1))
        old = part[:, :, self.padding : self.before].sum(dim=1)
        own = part[:, :, self.before :].flatten(1, 2)
        total[:, self.group.start : self.group.end] += own.index_select(1, self.group.real)
        for start, end in self.group.ancestors:
            total[:, start:end] += old[:, : end - start]
            old = old[:, end - start :]

    @staticmethod
    def _write(rows: torch.Tensor, queries: _Queries, values: torch.Tensor) -> None:
        """Put `values` [gm, rc, w] where `queries.of(rows)` would read."""
        place = rows[:, :, :, queries.start : queries.end]
        place.copy_(values.view(place.shape))


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * left @ right, rounded once."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scaling)
