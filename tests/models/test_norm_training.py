"""RMSNorm by hand against transformers' own: outputs, gradients, what is kept, and where it is left alone."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from common.models import norm_training

WIDTH = 48


def norm(kind: type[torch.nn.Module] = LlamaRMSNorm, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    module = kind(WIDTH, eps=1e-5)
    module.weight.data = torch.randn(WIDTH)
    return module.to(dtype).requires_grad_(False)


def made(module: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `module` makes of x, and the gradient of x for some gradient of that."""
    x = x.clone().requires_grad_()
    y = module(x)
    (gradient,) = torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return y.detach(), gradient


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("shape", [(2, 7, WIDTH), (2, 3, 7, WIDTH)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.6e-2)])
def test_values_and_gradients_are_the_models(kind, shape, dtype, tolerance):
    module, x = norm(kind, dtype), (3 * torch.randn(shape)).to(dtype)
    y, gradient = made(module, x)
    before = x.clone()
    norm_training.install(module)
    ours, of_ours = made(module, x)
    assert "forward" in vars(module)
    assert torch.allclose(ours, y, rtol=tolerance, atol=tolerance)
    assert torch.allclose(of_ours, gradient, rtol=tolerance, atol=tolerance)
    assert torch.equal(x, before)


def test_only_the_input_and_a_number_a_row_are_kept():
    module, x = norm(), torch.randn(5, WIDTH, requires_grad=True)
    norm_training.install(module)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(x)
    assert [tuple(tensor.shape) for tensor in kept] == [(5, WIDTH), (WIDTH,), (5, 1)]
    assert kept[0].data_ptr() == x.data_ptr()


class _Shifted(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + 1


@pytest.mark.parametrize(
    "module",
    [norm(Gemma3RMSNorm), norm(_Shifted), norm().requires_grad_(True), torch.nn.LayerNorm(WIDTH).requires_grad_(False)],
    ids=["1 + weight", "something more", "trained", "another norm"],
)
def test_others_are_left_alone(module):
    norm_training.install(module)
    assert "forward" not in vars(module)
