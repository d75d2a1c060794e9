"""How much goes through a model at a time, wherever it is trained, asked or predicted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MAX_BATCH_TOKENS = 8192  # of a batch to score or to write for
TEXT_BATCH_TOKENS = (32_768, 16_384, MAX_BATCH_TOKENS)  # of texts: writing reads all weights a token, for any number
CPU_BATCH_TOKENS = 2048  # where a CPU is fastest: what passes between layers still fits its caches (docs/results.md)
LOGITS_AT_ONCE = 1 << 24  # rows x scored columns x vocabulary of a batch of labels, unless one row has more
KEPT_TOKENS = 512  # of prefixes whose keys and values are kept
REFERENCE_TOKENS = 2048  # of a batch that DPO's reference scores before training
CHUNK_LOGITS = 1 << 26  # of a distillation loss: 256 MB in float32
EFFECTIVE_BATCH = 16  # rows an optimizer step, unless flags say otherwise
MAPS_AT_ONCE = 1 << 22  # numbers of attention maps made at a time where they are made: 16 MB in float32
CPU_TOKENS_PER_BATCH = 16_384  # of a training batch on a CPU
UNLIMITED = 1 << 30  # tokens that a model can read whose config names no limit


def first_batch(accumulation: int | None, world: int) -> int:
    """Rows in one pass of each of `world` processes so that an optimizer step has EFFECTIVE_BATCH, as far as it can.

    Args:
        accumulation: passes an optimizer step; None: they follow from the rows (`accumulation_of`).
    """
    return max(1, EFFECTIVE_BATCH // (world * (accumulation or 1)))


def first_cpu_batch(tokens_a_row: int, accumulation: int | None, world: int) -> int:
    """`first_batch`, halved until it is within CPU_TOKENS_PER_BATCH: what a CPU trains with where no batch is given.

    Args:
        tokens_a_row: of the longest row; of a preference both answers with their prompts.
    """
    batch = first_batch(accumulation, world)
    while batch > 1 and batch * tokens_a_row > CPU_TOKENS_PER_BATCH:
        batch //= 2
    return batch


def accumulation_of(batch: int, world: int) -> int:
    """Passes an optimizer step that has at least EFFECTIVE_BATCH rows, where nothing else is asked for."""
    return max(1, math.ceil(EFFECTIVE_BATCH / (batch * world)))


def by_token_budget(
    lengths: Sequence[int], max_tokens: int, *, added: int = 0, most_rows: int | None = None
) -> Iterator[list[int]]:
    """Row numbers in batches, the longest rows first; rows of one length keep their order. One row always goes.

    Args:
        lengths: tokens of each row.
        max_tokens: bounds rows x (longest row + `added`) of a batch.
        added: columns that every row of a batch gets behind its own tokens.
        most_rows: of a batch, whatever their length; None: no bound.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while order:
        rows = max_tokens // (lengths[order[0]] + added)
        rows = max(1, rows if most_rows is None else min(rows, most_rows))
        yield order[:rows]
        order = order[rows:]


def context_of(config: PreTrainedConfig) -> int:
    """Tokens that a model of this config can read."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or UNLIMITED


def layer_kinds(config: PreTrainedConfig) -> set[str]:
    """What the layers of a model of this config are, as transformers names it: "full_attention", "conv", ..."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    return set(kinds or ["full_attention" if window_of(config) == UNLIMITED else "sliding_attention"])


def head_size(config: PreTrainedConfig) -> int:
    """Numbers of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def window_of(config: PreTrainedConfig) -> int:
    """Tokens back that a model of this config sees at most, in any of its layers (sliding window attention)."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if "sliding_attention" not in kinds or not getattr(config, "use_sliding_window", True):
        return UNLIMITED
    return getattr(config, "sliding_window", None) or UNLIMITED
