"""LoRA without its detours, for training: y = Wx + b + s B A x as matrix products with a backward pass by hand.

PEFT's layers cast their whole input to float32, keep that and a dropped-out copy of it for each of seven matrices, draw
a random number for each element, and let autograd hold every step between. All that the gradient needs of a layer is
its input, once for all matrices that read it, and the few numbers A makes of it; a frozen matrix keeps nothing.

Products are of the base's precision, as under autocast; A and B stay float32, so that no small update is lost.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer


class LoraProduct(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T of a frozen W (Hu et al. 2021, arXiv:2106.09685, equation 3)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """
        Args:
            x: [..., inputs], of the type of `weight`.
            weight, bias: [outputs, inputs] and [outputs] or None, frozen.
            down, up: A [rank, inputs] and B [outputs, rank], of any type.
            scaling: s.
        """
        rows = x.reshape(-1, x.shape[-1])
        down, up = down.to(x.dtype), (up * scaling).to(x.dtype)
        low = rows @ down.t()
        # The adapter's word first, and x W^T summed up with it before it is rounded. Added to a product that is rounded
        # already, what a young adapter says would be less than half a step of bfloat16, and always lost.
        y = (low @ up.t()).addmm_(rows, weight.t())
        if bias is not None:
            y += bias
        ctx.save_for_backward(rows, low, weight, down, up)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, A and B; those of A and B in float32."""
        rows, low, weight, down, up = ctx.saved_tensors
        dy = gradient.reshape(-1, gradient.shape[-1])
        d_low = dy @ up
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (d_low @ down).addmm_(dy, weight).view(*gradient.shape[:-1], -1)
        d_down = (d_low.t() @ rows).float()
        d_up = (low.t() @ dy).t().float() * ctx.scaling
        return dx, None, None, d_down, d_up, None


def install(model: PeftModel) -> None:
    """Have the LoRA layers on plain frozen matrices of `model` take the short way in training."""
    from peft.tuners.lora import Linear

    for module in model.modules():
        if isinstance(module, Linear) and type(module.get_base_layer()) is torch.nn.Linear:
            module.forward = types.MethodType(_forward, module)


def _forward(layer: LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    base = layer.get_base_layer()
    plain = len(active) == 1 and not (args or kwargs or layer.merged or layer.disable_adapters or layer.lora_variant)
    if not plain or layer.lora_bias.get(active[0]) or x.dtype != base.weight.dtype or base.weight.requires_grad:
        return type(layer).forward(layer, x, *args, **kwargs)
    name = active[0]
    down = layer.lora_A[name].weight
    share = getattr(layer.lora_dropout[name], "p", 0.0)
    if layer.training and share:
        down = down * kept_inputs(down, share)
    return LoraProduct.apply(x, base.weight, base.bias, down, layer.lora_B[name].weight, layer.scaling[name])


def kept_inputs(down: torch.Tensor, share: float) -> torch.Tensor:
    """Dropout of an adapter's inputs, the same ones for all tokens of a pass: factors [inputs] of A's columns.

    One draw an input, not one an element of the batch, and nothing as large as the batch to keep: dropping x's columns
    before A is dropping A's columns. Sharing a mask along the tokens of a sequence is Gal and Ghahramani's (2016,
    arXiv:1512.05287); each matrix and each pass has a mask of its own.
    """
    kept = torch.rand(down.shape[1], device=down.device) >= share
    return kept.to(down.dtype) / (1 - share)
