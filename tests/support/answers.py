"""Answers that are written in one continuous batch."""

from __future__ import annotations

from collections.abc import Sequence

from common.generation.continuous_batch import ContinuousBatch, Wanted


def run(model, tokenizer, wanted: Sequence[Wanted], max_batch_tokens: int = 8192) -> tuple[ContinuousBatch, dict]:
    """(the batch, the answers by their keys)."""
    batch = ContinuousBatch(model, tokenizer, max_batch_tokens)
    for each in wanted:
        batch.add(each)
    return batch, {each.key: answer for each, answer in batch.run()}
