"""What a model is made to write."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor


class Only(LogitsProcessor):
    """Allows, step by step, one token of each row's list."""

    def __init__(self, wanted: list[list[int]]) -> None:
        self.wanted, self.step = wanted, 0

    def __call__(self, input_ids, scores):
        masked = torch.full_like(scores, float("-inf"))
        for row, tokens in enumerate(self.wanted):
            masked[row, tokens[min(self.step, len(tokens) - 1)]] = 0
        self.step += 1
        return masked
