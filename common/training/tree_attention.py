"""Attention of a sequence that is a tree of rows: each segment sees its ancestors and itself, in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from common.training.prefix_tree import Siblings

LONG = 192  # tokens of a sibling; from here on attention in blocks is faster than whole maps (docs/results.md)

_blocks = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_blocks_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class TreeAttention(torch.autograd.Function):
    """softmax(s Q K^T) V of the segments of a tree, each over its ancestors and itself.

    Keys of ancestors are multiplied with the queries of all siblings at once, so that they are never repeated, and the
    sum over siblings that their gradient is happens inside a product, in float32. Probabilities are made again in the
    backward pass (Dao et al. 2022, FlashAttention, arXiv:2205.14135, appendix B.2).
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

        Returns:
            [heads, tokens, width], where the heads of a token lie side by side.
        """
        heads, tokens, width = query.shape
        out = query.new_empty(tokens, heads, width).transpose(0, 1)
        sums = torch.zeros(heads, tokens)
        for group in groups:
            values, of_group = _kind(group)(group, query, key, value, scaling).forward()
            out[:, group.start : group.end] = values
            if of_group is not None:
                sums[:, group.start : group.end] = of_group
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.groups, ctx.scaling = groups, scaling
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, out, sums = ctx.saved_tensors
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros(tensor.shape, dtype=torch.float32) for tensor in (key, value))
        for group in ctx.groups:
            part = _kind(group)(group, query, key, value, ctx.scaling)
            d_query[:, group.start : group.end] = part.backward(gradient, out, sums, d_key, d_value)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


def in_blocks(group: Siblings) -> bool:
    """Whether no whole attention map of the group is made."""
    return group.longest >= LONG


def _kind(group: Siblings) -> type[_Blocks] | type[_Maps]:
    return _Blocks if in_blocks(group) else _Maps


def _ancestors(group: Siblings, tensor: torch.Tensor) -> torch.Tensor:
    """[heads, before, width] of [heads, tokens, width]: what lies before each of the siblings."""
    return torch.cat([tensor[:, start:end] for start, end in group.ancestors], dim=1)


def _add_to_ancestors(group: Siblings, total: torch.Tensor, part: torch.Tensor) -> None:
    """Add `part` [heads, before, width] to `total` [heads, tokens, width], where `_ancestors` came from."""
    for start, end in group.ancestors:
        total[:, start:end] += part[:, : end - start]
        part = part[:, end - start :]


def _padded_gradient(group: Siblings, gradient: torch.Tensor) -> torch.Tensor:
    """[heads, siblings * longest, width] of [heads, tokens, width]: padding has no gradient."""
    padded = gradient.new_zeros(len(gradient), len(group.padded), gradient.shape[-1])
    padded[:, group.real] = gradient[:, group.start : group.end]
    return padded


class _Blocks:
    """The attention of a group of long siblings by torch's kernel, which has no whole maps and skips what comes later.

    What a sibling sees of itself and what of its ancestors are two calls, joined by their sums of exponentials as the
    kernel joins its blocks. Given the joint result, its backward pass is exact for the keys of either (Liu et al. 2023,
    Ring Attention, arXiv:2310.01889, section 3).

    Shapes: h heads, m siblings, l tokens of the longest, n of the group, w width.
    """

    def __init__(
        self, group: Siblings, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> None:
        self.group, self.scaling = group, scaling
        self.query, self.key, self.value = query, key, value
        self.sharing = len(query) // len(key)  # heads a key head
        self.span = slice(group.start, group.end)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The group's values [h, n, w], and the logarithms of the sums of exponentials [h, n]."""
        own = _blocks(*self._own(), 0.0, True, scale=self.scaling)
        out, sums = (self._unpadded(tensor) for tensor in own)
        if not self.group.ancestors:
            return out, sums
        old_out, old_sums = (tensor[0] for tensor in _blocks(*self._old(), 0.0, False, scale=self.scaling))
        joint = torch.logaddexp(sums, old_sums)
        out = out * (sums - joint).exp()[..., None] + old_out * (old_sums - joint).exp()[..., None]
        return out.to(self.query.dtype), joint

    def backward(
        self, gradient: torch.Tensor, out: torch.Tensor, sums: torch.Tensor, d_key: torch.Tensor, d_value: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of the group's queries [h, n, w]; those of keys and values are added to `d_*`.

        Args:
            gradient, out: [h, tokens, w] of the whole sequence, `sums` [h, tokens].
            d_key, d_value: [key heads, tokens, w], float32.
        """
        group = self.group
        d_out = _padded_gradient(group, gradient).unflatten(1, (len(group.lengths), group.longest)).transpose(0, 1)
        own = _blocks_backward(
            d_out, *self._own(), *map(self._padded, (out, sums)), 0.0, True, scale=self.scaling
        )  # fmt: skip
        d_query, *own = map(self._unpadded, own)
        for total, part in zip((d_key, d_value), own, strict=True):
            total[:, self.span] += self._by_key_head(part)
        if group.ancestors:
            joint = (tensor[None, :, self.span].contiguous() for tensor in (out, sums))
            d_old_query, *old = _blocks_backward(
                gradient[None, :, self.span], *self._old(), *joint, 0.0, False, scale=self.scaling
            )  # fmt: skip
            d_query = d_query + d_old_query[0]
            for total, part in zip((d_key, d_value), old, strict=True):
                _add_to_ancestors(group, total, self._by_key_head(part[0]))
        return d_query

    def _own(self) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values [m, h, l, w] of the siblings."""
        shared = (tensor.repeat_interleave(self.sharing, 0) for tensor in (self.key, self.value))
        return tuple(map(self._padded, (self.query, *shared)))

    def _old(self) -> tuple[torch.Tensor, ...]:
        """Queries [1, h, n, w] of the siblings, keys and values [1, h, before, w] of their ancestors."""
        old = (_ancestors(self.group, tensor) for tensor in (self.key, self.value))
        return self.query[None, :, self.span], *(tensor.repeat_interleave(self.sharing, 0)[None] for tensor in old)

    def _padded(self, tensor: torch.Tensor) -> torch.Tensor:
        """[m, h, l, ...] of [h, tokens, ...]."""
        rows = tensor.index_select(1, self.group.padded)
        return rows.unflatten(1, (len(self.group.lengths), self.group.longest)).transpose(0, 1)

    def _unpadded(self, rows: torch.Tensor) -> torch.Tensor:
        """[h, n, ...] of [m, h, l, ...]."""
        return rows.transpose(0, 1).flatten(1, 2).index_select(1, self.group.real)

    def _by_key_head(self, gradient: torch.Tensor) -> torch.Tensor:
        """[key heads, tokens, w], float32, of [h, tokens, w]: the sum over the heads that share a key."""
        return gradient.unflatten(0, (-1, self.sharing)).sum(dim=1, dtype=torch.float32)


class _Maps:
    """The attention of a group by whole maps: "own" is what a sibling sees of itself, "old" what of the ancestors.

    Shapes: g key heads, m siblings, c queries a key (heads that share it times the longest sibling), w width.
    """

    def __init__(
        self, group: Siblings, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> None:
        self.group, self.scaling, self.key_heads = group, scaling, len(key)
        self.query, self.key, self.value = map(self.by_sibling, (query, key, value))
        self.old_key, self.old_value = (
            _ancestors(group, tensor) if group.ancestors else None for tensor in (key, value)
        )

    def by_sibling(self, tensor: torch.Tensor) -> torch.Tensor:
        """[g, m, c, w] of queries [heads, tokens, w], or of keys or values, where c is the longest sibling."""
        rows = tensor.index_select(1, self.group.padded)
        rows = rows.view(self.key_heads, -1, len(self.group.lengths), self.group.longest, tensor.shape[-1])
        return rows.transpose(1, 2).flatten(2, 3)

    def unpadded(self, rows: torch.Tensor) -> torch.Tensor:
        """[heads, tokens of the group, w] of [g, m, c, w], or of the same of keys."""
        rows = rows.unflatten(2, (-1, self.group.longest)).transpose(1, 2)  # g, heads that share it, m, longest, w
        return rows.reshape(-1, len(self.group.padded), rows.shape[-1]).index_select(1, self.group.real)

    def products(self, left: torch.Tensor, own: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
        """[g, m, c, before + longest]: `left` [g, m, c, w] with each of the `old` and the `own` keys (or values)."""
        by_own = left @ own.transpose(-1, -2)
        if old is None:
            return by_own
        by_old = left.flatten(1, 2) @ old.transpose(-1, -2)
        return torch.cat([by_old.unflatten(1, left.shape[1:3]), by_own], dim=-1)

    def forward(self) -> tuple[torch.Tensor, None]:
        """The group's values [heads, tokens of the group, w]; what they were divided by is made again."""
        return self.unpadded(self.weighted_values(self.probabilities())), None

    def probabilities(self) -> torch.Tensor:
        """[g, m, c, before + longest], float32."""
        scores = self.products(self.query, self.key, self.old_key).float().mul_(self.scaling)
        own = scores[..., self.group.before :].unflatten(2, (-1, self.group.longest))
        own.masked_fill_(self.group.hidden, -torch.inf)
        return scores.softmax(dim=-1)

    def weighted_values(self, probabilities: torch.Tensor) -> torch.Tensor:
        """[g, m, c, w]"""
        probabilities = probabilities.to(self.value.dtype)
        return self._sums(probabilities, self.value, self.old_value)

    def _sums(self, weights: torch.Tensor, own: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
        before = self.group.before
        sums = weights[..., before:] @ own
        if old is not None:
            sums += (weights[..., :before].flatten(1, 2) @ old).unflatten(1, weights.shape[1:3])
        return sums

    def backward(
        self, gradient: torch.Tensor, out: torch.Tensor, sums: torch.Tensor, d_key: torch.Tensor, d_value: torch.Tensor
    ) -> torch.Tensor:
        """See `_Blocks.backward`."""
        group, before = self.group, self.group.before
        probabilities = self.probabilities()
        d_out = _padded_gradient(group, gradient)
        d_out = d_out.view(self.key_heads, -1, len(group.lengths), group.longest, gradient.shape[-1])
        d_out = d_out.transpose(1, 2).flatten(2, 3)
        d_probabilities = self.products(d_out, self.value, self.old_value).float()
        mean = (d_probabilities * probabilities).sum(dim=-1, keepdim=True)
        d_scores = d_probabilities.sub_(mean).mul_(probabilities).mul_(self.scaling).to(self.key.dtype)
        probabilities = probabilities.to(self.value.dtype)
        for weights, right, total in ((d_scores, self.query, d_key), (probabilities, d_out, d_value)):
            own = weights[..., before:].transpose(-1, -2) @ right
            total[:, group.start : group.end] += self.unpadded(own)
            if before:
                old = weights[..., :before].flatten(1, 2).transpose(-1, -2) @ right.flatten(1, 2)
                _add_to_ancestors(group, total, old)
        return self.unpadded(self._sums(d_scores, self.key, self.old_key))
