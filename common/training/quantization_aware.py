"""Quantisation-aware training, by torchao: the forward pass rounds weights and activations as the quantised model will.

The weights stay in floating point and are what is saved: an ordinary model, whose numbers have learnt to bear rounding
(Jacob et al. 2018, arXiv:1712.05877). `quantized` gives torchao's own INT8 or INT4 of it, which computes exactly what
training saw; other runtimes round a little differently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common.cli import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = ("int8", "int4")
GROUP = 32  # weights that share a scale in INT4; in INT8 those of an output do


def check(kind: str | None, lora_r: int) -> None:
    """Refuse what would not train what is shipped.

    Raises:
        UserError: with LoRA, or torchao is not installed.
    """
    if kind is None:
        return
    if lora_r:
        raise UserError(
            "--quantization_aware trains all weights: with LoRA the rounding would be learnt for "
            "the base's weights, and merging the adapter changes them; pass --lora_r 0"
        )
    from importlib.util import find_spec

    if find_spec("torchao") is None:
        raise UserError("--quantization_aware needs torchao; pip install -r requirements/export.txt")


def prepare(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Make every linear layer but the head round in its forward pass; the gradient passes through unchanged."""
    return _apply(model, kind, qat=True)


def quantized(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """torchao's quantised form of a model: weights of `kind`, activations INT8 per token."""
    return _apply(model, kind, qat=False)


def _apply(model: PreTrainedModel, kind: str, qat: bool) -> PreTrainedModel:
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    config: Any = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=getattr(torch, kind), weight_granularity=PerAxis(0) if kind == "int8" else PerGroup(GROUP)
    )
    if qat:
        config = QATConfig(config, step="prepare")

    def is_rounded(module: torch.nn.Module, name: str) -> bool:  # a head that is tied to the embeddings would be untied
        return isinstance(module, torch.nn.Linear) and "lm_head" not in name

    quantize_(model, config, filter_fn=is_rounded)
    return model
