"""RMSNorm of frozen weights in training, its backward pass by hand: autograd takes it through a dozen whole copies."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FrozenRMSNorm(torch.autograd.Function):
    """y = w x / rms(x) of a frozen w (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4), computed in float32.

    Only the input is kept, which is the residual stream that is there anyway, and one number a row.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """
        Args:
            x: [..., width], normed in float32 and rounded to its own type before it is weighted.
            weight: [width], frozen.
            epsilon: added to the mean of squares.
        """
        wide = x.float()
        squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = squares.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of x."""
        if not ctx.needs_input_grad[0]:
            return None, None, None
        x, weight, scale = ctx.saved_tensors
        normed, d_normed = x.float() * scale, (gradient * weight).float()
        along = (d_normed * normed).sum(dim=-1, keepdim=True).div_(-x.shape[-1])
        return d_normed.addcmul_(normed, along).mul_(scale).to(x.dtype), None, None


def install(model: PreTrainedModel) -> None:
    """Have the frozen norms of `model` that are RMSNorm by their values computed so; others are left as they are."""
    for module in model.modules():
        if is_frozen_rms_norm(module):
            module.forward = types.MethodType(_forward, module)


def is_frozen_rms_norm(module: torch.nn.Module) -> bool:
    """Whether `module` weights a root mean square norm by its frozen `weight`, as it is, and does nothing more."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if weight is None or weight.ndim != 1 or weight.requires_grad or not isinstance(epsilon, float):
        return False
    with torch.no_grad():
        x = torch.linspace(-2, 3, len(weight), dtype=weight.dtype, device=weight.device)
        ours, theirs = FrozenRMSNorm.apply(x, weight, epsilon), module(x)
        return torch.allclose(ours, theirs, rtol=4 * torch.finfo(weight.dtype).eps)


def _forward(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return FrozenRMSNorm.apply(x, module.weight, module.variance_epsilon)
