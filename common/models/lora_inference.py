"""LoRA without its detours, for adapters that are only used: y = Wx + s BAx, the second term added in place.

PEFT's own layers make BAx, s BAx and their sum each as a tensor as wide as the layer's output, and pass four modules on
the way. For inference one matrix product with an accumulator does (`addmm_`): less time, and at the widest place of a
decoder layer, its MLP, two of four tensors less memory. Whatever else PEFT's layers can do, they still do.

Rows of several adapters can share a pass: Wx is one product for all of them, and each adapter adds its own to its rows
(as in Punica, Chen et al. 2023, arXiv:2310.18547, and S-LoRA, Sheng et al. 2023, arXiv:2311.03285).
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

Segment = tuple[str | None, int]  # an adapter's name within PEFT, or None for the base alone; how many rows it has

_segments: ContextVar[tuple[Sequence[Segment], bool] | None] = ContextVar("segments", default=None)


def install(model: PeftModel) -> None:
    """Have the LoRA layers of `model` take the short way wherever no gradient is asked for; may be called again."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), torch.nn.Linear):  # 4-bit ones too
            module.forward = types.MethodType(forward, module)


@contextlib.contextmanager
def segments(parts: Sequence[Segment] | None, *, of_tokens: bool = False) -> Iterator[None]:
    """While it lasts, the rows of a pass have these adapters, one segment of them after another, whatever is active.

    A pass without gradients; each adapter `can_share` it.

    Args:
        parts: None: passes are as ever, also within another `segments`.
        of_tokens: the parts count tokens, all of them, and not rows.
    """
    token = _segments.set(None if parts is None else (parts, of_tokens))
    try:
        yield
    finally:
        _segments.reset(token)


def adapted(parts: Sequence[Segment], *, of_tokens: bool = False) -> contextlib.AbstractContextManager[None]:
    """`segments`, where one of them has an adapter; else passes are as ever, and what is active answers."""
    return segments(parts if any(name for name, _ in parts) else None, of_tokens=of_tokens)


def can_share(model: PeftModel, name: str) -> bool:
    """Whether rows of an adapter can be a segment: all that it changes are layers that take the short way."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and _adapts(module, name)]
    short = all(getattr(layer.forward, "__func__", None) is forward and _is_plain(layer, name) for layer in layers)
    return bool(layers) and short


def _adapts(layer: LoraLayer, name: str) -> bool:
    return name in layer.lora_A or name in layer.lora_embedding_A


def _is_plain(layer: LoraLayer, name: str) -> bool:
    """Whether an adapter is matrices alone, and at hand: an offloaded one is fetched when its module is called."""
    rest = layer.lora_bias.get(name) or name in layer.lora_variant
    return not (rest or layer.merged or hasattr(layer.lora_A[name], "_hf_hook"))


def forward(layer: LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Of a linear layer with its active adapters (Hu et al. 2021, arXiv:2106.09685, equation 3), or in `segments`."""
    if (segmented := _segments.get()) is not None:
        return _forward_in_segments(layer, x, *segmented)
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = not (args or kwargs or layer.disable_adapters) and all(_is_plain(layer, name) for name in active)
    if torch.is_grad_enabled() or layer.training or layer.merged or not plain:
        return type(layer).forward(layer, x, *args, **kwargs)
    result = layer.base_layer(x)
    for name in active:
        _add(layer, name, x, result)
    return result


def _forward_in_segments(layer: LoraLayer, x: torch.Tensor, parts: Sequence[Segment], of_tokens: bool) -> torch.Tensor:
    result = layer.base_layer(x)
    if not any(name in layer.lora_A for name, _ in parts):
        return result
    read, written = (x.flatten(0, -2), result.flatten(0, -2)) if of_tokens else (x, result)
    if len(read) != sum(rows for _, rows in parts):
        raise ValueError(f"a layer has {len(read)} rows, in segments of {[rows for _, rows in parts]}")
    start = 0
    for name, rows in parts:
        if name in layer.lora_A:
            _add(layer, name, read[start : start + rows], written[start : start + rows])
        start += rows
    return result


def _add(layer: LoraLayer, name: str, x: torch.Tensor, result: torch.Tensor) -> None:
    """Add an adapter's product with `x` to `result`, in place."""
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    rows = result.view(-1, result.shape[-1])
    low = functional.linear(x.to(down.dtype), down)
    low = low.view(-1, low.shape[-1]).to(rows.dtype)
    rows.addmm_(low, up.to(rows.dtype).t(), alpha=layer.scaling[name])
