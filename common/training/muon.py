"""Muon, for CPUs that do not multiply bfloat16.

torch.optim.Muon (2.13) orthogonalises in bfloat16, whatever it trains. Without AVX512-BF16 or AMX, as on most laptops,
those products take about 20 times as long as float32 ones, and were more than half of the miniature's schooling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of the quintic iteration, as in torch.optim.Muon
ITERATIONS = 5
EPSILON = 1e-7


class Float32Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with Nesterov momentum and decoupled weight decay, as torch's, but in float32.

    Args:
        params: matrices in float32.
        lr: of a square matrix; one of more rows than columns takes sqrt(rows / columns) times as much.
        momentum: share of the running mean that stays.
        weight_decay: share of a weight that one step of `lr` 1 takes away.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], *, lr: float, momentum: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """One step of all matrices that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                mean = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalized(weight.grad.lerp(mean, group["momentum"]))
                rows, columns = weight.shape
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix [rows, columns] with its singular values moved to about 1 (0.5 to 1.5), by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
