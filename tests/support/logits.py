"""What a model is made to write."""

from __future__ import annotations

import torch

from common.generation.steering import Steering


class Only(Steering):
    """Allows, step by step, one token of a list."""

    def __init__(self, wanted: list[int]) -> None:
        self.wanted, self.step = wanted, 0

    def change(self, scores):
        masked = torch.full_like(scores, float("-inf"))
        masked[self.wanted[min(self.step, len(self.wanted) - 1)]] = 0
        self.step += 1
        return masked
