"""Rows that begin alike, as one sequence that holds each shared beginning once; exact, in both directions.

Prompts of a task share their instruction, pairs of answers their whole prompt. In a causal decoder what a token becomes
depends on the tokens before it alone, so that rows with a common beginning have common states there, and the gradient
of such a state is the sum of the rows'. A batch becomes a tree whose segments lie one after the other in a single
sequence: everything but attention goes through it as through any sequence, without padding, and attention lets a
segment see its ancestors and itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from common.models import loading
from common.models.batching import MAPS_AT_ONCE
from common.models.tokenizers import Encoded
from common.training import batches
from common.training.tree_attention import QUERIES, TreeAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "prefix_tree"  # of the attention, in transformers' registry
LEAST_SHARED = 16  # tokens; a shorter common beginning is not worth a segment of its own
LONG = 192  # tokens of a sibling whose attention gains nothing from company (docs/results.md)
MULTIPLE = 32  # tokens of a sequence; for each number of them oneDNN compiles its products anew (2 ms) and keeps them
LONGEST = 2048  # tokens of a row; beyond, SDPA, which never has a whole map, is the better choice


@dataclass(frozen=True)
class Siblings:
    """Segments with the same ancestors, side by side in the sequence.

    Attributes:
        ancestors: spans (start, end) of the sequence that come before each of them, from the root on.
        start: position in the sequence of the first one.
        lengths: tokens of each.
        queries: how attention cuts them, by the type of its numbers; it fills this in.
    """

    ancestors: tuple[tuple[int, int], ...]
    start: int
    lengths: tuple[int, ...]
    queries: dict[torch.dtype, list] = field(default_factory=dict, compare=False, repr=False)

    @property
    def end(self) -> int:
        """Position after the last one."""
        return self.start + sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest one, filled up so that products have few shapes."""
        longest = max(self.lengths)
        return longest + -longest % (QUERIES // 2 if longest > QUERIES else 8)

    @property
    def before(self) -> int:
        """Tokens of the ancestors together."""
        return sum(end - start for start, end in self.ancestors)

    def parts(self, heads: int) -> Iterator[Siblings]:
        """The same in groups of neighbours whose attention maps at a time have at most MAPS_AT_ONCE numbers.

        A sibling that is LONG is alone, as it fills a product by itself.
        """
        first, start = 0, self.start
        while first < len(self.lengths):
            last, longest = first + 1, self.lengths[first]
            for length in self.lengths[last:]:
                longest = max(longest, length)
                maps = (last + 1 - first) * heads * min(longest, QUERIES) * (self.before + longest)
                if longest >= LONG or maps > MAPS_AT_ONCE:
                    break
                last += 1
            lengths = self.lengths[first:last]
            yield Siblings(self.ancestors, start, lengths)
            first, start = last, start + sum(lengths)

    @cached_property
    def padded(self) -> torch.Tensor:
        """Positions in the sequence [siblings * longest], one row a sibling; padding repeats its last token."""
        ends = torch.tensor(self.lengths).cumsum(0) + self.start
        starts = ends - torch.tensor(self.lengths)
        return torch.minimum(starts[:, None] + torch.arange(self.longest), ends[:, None] - 1).flatten()

    @cached_property
    def real(self) -> torch.Tensor:
        """Which of `padded` are no padding: their numbers [tokens], in the order of the sequence."""
        inside = torch.arange(self.longest) < torch.tensor(self.lengths)[:, None]
        return inside.flatten().nonzero()[:, 0]


@dataclass
class PrefixTree:
    """Rows as one sequence.

    Attributes:
        ids: token ids, in the order of the sequence.
        positions: of each token in its row.
        groups: the sequence cut into siblings.
        sources: where in the sequence each token that is learnt is predicted from, row by row.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    groups: list[Siblings] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    _parts: dict[int, list[Siblings]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[Encoded]) -> PrefixTree:
        """The tree of a batch's rows; only prompts are shared, so that each completion token has a place of its own."""
        tree, sources = cls(), [[] for _ in rows]
        tree._grow(list(enumerate(rows)), 0, (), sources)
        tree.sources = [source for of_row in sources for source in of_row]
        return tree

    def parts(self, heads: int) -> list[Siblings]:
        """The groups, cut where the attention maps of all their siblings would be too large."""
        if heads not in self._parts:
            self._parts[heads] = [part for group in self.groups for part in group.parts(heads)]
        return self._parts[heads]

    def _grow(
        self, rows: list[tuple[int, Encoded]], start: int, ancestors: tuple[tuple[int, int], ...], sources: list
    ) -> None:
        """Add what comes from token `start` on of rows (with their numbers) that are alike up to there."""
        buckets: dict[tuple[int, ...], list[tuple[int, Encoded]]] = {}
        for number, row in rows:
            beginning = tuple(row.input_ids[start : min(start + LEAST_SHARED, row.prompt_length)])
            key = beginning if len(beginning) == LEAST_SHARED else (number,)  # which no other row has
            buckets.setdefault(key, []).append((number, row))
        members = [(bucket, end_of(bucket, start)) for bucket in buckets.values()]
        # Those that branch no further come first, and the shorter ones, so that neighbours need little padding.
        members.sort(key=lambda member: (len(member[0]), member[1]))
        self.groups.append(Siblings(ancestors, len(self.ids), tuple(end - start for _, end in members)))
        spans = []
        for bucket, end in members:
            spans.append((len(self.ids), len(self.ids) + end - start))
            self.ids += bucket[0][1].input_ids[start:end]
            self.positions += range(start, end)
        for (bucket, end), span in zip(members, spans, strict=True):
            if len(bucket) > 1:
                self._grow(bucket, end, (*ancestors, span), sources)
                continue
            ((number, row),) = bucket
            for index in row.learnt:
                if index == 0:  # no token before it could predict it
                    continue
                sources[number].append(span[0] + index - 1 - start if index > start else ancestors[-1][1] - 1)


def collate(rows: Sequence[Encoded], pad_id: int) -> dict[str, Any]:
    """`batches.collate`'s `labels` [rows, longest], and the tree with its `input_ids` and `position_ids` [1, tokens].

    Behind the tree there are tokens that nothing sees, up to a MULTIPLE.
    `attention_mask` says nothing, and keeps transformers from making one of the positions. Rows that are very long make
    a batch without a tree.
    """
    if max(len(row.input_ids) for row in rows) > LONGEST:
        return batches.collate(rows, pad_id)
    tree = PrefixTree.of(rows)
    padding = -len(tree.ids) % MULTIPLE
    return {
        "labels": batches.collate(rows, pad_id)["labels"],
        "input_ids": torch.tensor([tree.ids + [pad_id] * padding]),
        "position_ids": torch.tensor([tree.positions + [0] * padding]),
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        NAME: tree,
    }


def end_of(bucket: Sequence[tuple[int, Encoded]], start: int) -> int:
    """Where the segment of rows ends that are alike from token `start` on; of a lone row at its own end."""
    rows = [row for _, row in bucket]
    return common_length(rows, start) if len(rows) > 1 else len(rows[0].input_ids)


def common_length(rows: Sequence[Encoded], start: int) -> int:
    """Tokens at the beginning of all prompts of `rows` that are the same, of which `start` are known to be."""
    first, last = min(row.input_ids for row in rows), max(row.input_ids for row in rows)  # what they share, all share
    end = min(row.prompt_length for row in rows)
    while start < end and first[start] == last[start]:
        start += 1
    return start


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    prefix_tree: PrefixTree | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: with a tree each segment sees its ancestors and itself, else SDPA's.

    Args:
        query: [1, heads, tokens, width].
        key, value: [1, key heads, tokens, width].

    Returns:
        [1, tokens, heads, width].
    """
    if prefix_tree is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    parts = prefix_tree.parts(query.shape[1])
    return TreeAttention.apply(query[0], key[0], value[0], parts, scaling).transpose(0, 1)[None], None


def understood_by(model: PreTrainedModel) -> bool:
    """Whether `install` was called for this model."""
    return model.config._attn_implementation == NAME


def install_where_it_pays(model: PreTrainedModel) -> bool:
    """`install`, for a large model on a CPU; whether it was."""
    return model.device.type == "cpu" and loading.is_large(model.config) and install(model)


def install(model: PreTrainedModel) -> bool:
    """Make `model` understand the keyword argument `prefix_tree`; False where its architecture cannot."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if not loading.reads_prefix_trees(model.config.to_dict()):
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True
