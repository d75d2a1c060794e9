"""Weights in the order in which a CPU multiplies them, for models that write several texts together.

Between about 4 and 64 rows, a product of float32 matrices spends most of its time on bringing the weight into the
order of the processor's registers, every time anew. oneDNN does it once (`_reorder_linear_weight`), and a step of 8
rows takes half as long (`docs/results.md`). One row alone is multiplied faster as it was, so a model is packed when the
first batch of several comes. There is no way back: the plain weights are freed, and nothing can be trained, saved or
adapted any more.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from common.models.loading import has_bfloat16, is_large

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FEWEST_ROWS = 4  # from here on it is faster
TYPICAL_ROWS = 16  # what oneDNN is told to expect

_for_text: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


class PackedLinear(torch.nn.Module):
    """y = Wx + b of a plain linear layer.

    Args:
        keep_weight: the plain weight stays, too: it is another module's, or read by rows.
    """

    def __init__(self, linear: torch.nn.Linear, keep_weight: bool) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.weight = linear.weight if keep_weight else None
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]"""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def allow(model: PreTrainedModel | PeftModel) -> None:
    """Let a model be packed when it pays: from now on nothing but texts is asked of it."""
    _for_text.add(model)


def pack_for(model: PreTrainedModel | PeftModel, rows: int) -> None:
    """Pack a model that is to write so many texts together, where it may be and that pays; does nothing else."""
    if rows < FEWEST_ROWS or model not in _for_text:
        return
    _for_text.discard(model)
    if not _pays(model):
        return
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        if isinstance(parent, torch.nn.ModuleDict):  # of the adapters' own matrices, which are narrow
            continue
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                packed = PackedLinear(child, keep_weight=child is head)
                packed._forward_pre_hooks = child._forward_pre_hooks  # `heads.multiply_once`
                setattr(parent, name, packed)


def _pays(model: PreTrainedModel | PeftModel) -> bool:
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not is_large(model.config):
        return False
    if torch.cpu.get_capabilities()["architecture"] != "x86_64":
        return False
    return model.dtype == torch.float32 or (model.dtype == torch.bfloat16 and has_bfloat16())
