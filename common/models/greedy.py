"""Greedy answers to several prompts at once, whatever reads them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

# (ids and positions [rows, new columns], mask [rows, all columns]) to the logits of the last column [rows, vocabulary]
Step = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, shared: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids and positions [rows, longest], mask [rows, shared + longest]) of what follows a shared start."""
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), pad_id)
    mask = np.ones((len(prompts), shared + longest), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, shared : shared + longest - len(prompt)] = 0
    positions = (mask.cumsum(axis=1) - 1).clip(min=0)[:, shared:]
    return ids, mask, positions


def answers(
    step: Step, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int]
) -> list[list[int]]:
    """The greedy continuation of each prompt, without the token of `ends` that ended it; all go on together.

    Args:
        step: reads the new columns behind those of its earlier calls.
    """
    ids, mask, positions = left_padded(prompts, 0)
    written: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        ids = step(ids, mask, positions).argmax(axis=1)[:, None]
        going -= {row for row in going if ids[row, 0] in ends}
        if not going:
            break
        for row in going:
            written[row].append(int(ids[row, 0]))
        positions = positions[:, -1:] + 1
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
    return written
