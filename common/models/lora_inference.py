"""LoRA without its detours, for adapters that are only used: y = Wx + s BAx, the second term added in place.

PEFT's own layers make BAx, s BAx and their sum each as a tensor as wide as the layer's output, and pass four modules on
the way. For inference one matrix product with an accumulator does (`addmm_`): less time, and at the widest place of a
decoder layer, its MLP, two of four tensors less memory. Whatever else PEFT's layers can do, they still do.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer


def install(model: PeftModel) -> None:
    """Have the LoRA layers of `model` take the short way wherever no gradient is asked for; may be called again."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), torch.nn.Linear):  # 4-bit ones too
            module.forward = types.MethodType(forward, module)


def forward(layer: LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Of a linear layer with its active adapters (Hu et al. 2021, arXiv:2106.09685, equation 3)."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = not (args or kwargs or layer.merged or layer.disable_adapters)
    plain = plain and not any(layer.lora_bias.get(name) or name in layer.lora_variant for name in active)
    offloaded = any(hasattr(layer.lora_A[name], "_hf_hook") for name in active)  # then calling the module fetches it
    if torch.is_grad_enabled() or layer.training or offloaded or not plain:
        return type(layer).forward(layer, x, *args, **kwargs)
    result = layer.base_layer(x)
    rows = result.view(-1, result.shape[-1])
    for name in active:
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        low = functional.linear(x.to(down.dtype), down)
        low = low.view(-1, low.shape[-1]).to(rows.dtype)
        rows.addmm_(low, up.to(rows.dtype).t(), alpha=layer.scaling[name])
    return result
