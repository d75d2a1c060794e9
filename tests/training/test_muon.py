"""Muon in float32 against torch's, which rounds to bfloat16."""

from __future__ import annotations

import pytest
import torch

from common.training import miniature
from common.training.muon import Float32Muon, orthogonalized


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_steps_are_torchs_but_for_its_rounding(shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(3, *shape)
    weights = []
    for kind in (torch.optim.Muon, Float32Muon):
        weight = torch.nn.Parameter(start.clone())
        optimizer = kind([weight], lr=0.02, momentum=0.95, weight_decay=0.01)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        weights.append(weight.detach())
    moved = (weights[0] - start).norm()
    assert (weights[1] - weights[0]).norm() < 0.02 * moved  # bfloat16 has 8 bits
    assert moved > 0.02


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_singular_values_are_about_one(shape):
    torch.manual_seed(1)
    values = torch.linalg.svdvals(orthogonalized(1e-3 * torch.randn(shape)))
    assert values.min() > 0.3 and values.max() < 1.5
    assert orthogonalized(torch.zeros(shape)).abs().max() == 0


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_the_miniature_takes_what_the_cpu_multiplies(has_bfloat16, monkeypatch):
    monkeypatch.setattr(miniature.loading, "has_bfloat16", lambda: has_bfloat16)
    optimizer = miniature.muon([torch.nn.Parameter(torch.zeros(2, 2))], 0.01)
    assert type(optimizer) is (torch.optim.Muon if has_bfloat16 else Float32Muon)
    assert optimizer.param_groups[0] | {"lr": 0.01, "momentum": 0.95, "weight_decay": 0.01} == optimizer.param_groups[0]
