"""The LM head where only some of its work is wanted: few positions of a long batch, few tokens in full precision.

What a model does to its logits after the head (soft caps, scaling) stays the model's own: these hooks stand around the
head alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def multiply_once(model: PreTrainedModel) -> None:
    """Have the LM head multiply the positions of all rows in one product.

    The last positions of each row (`logits_to_keep`) are no contiguous tensor, and torch multiplies one such with a
    weight that asks for no gradient row by row, with a copy of the weight for each.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_contiguous)


def _contiguous(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].contiguous(), *inputs[1:])


@contextlib.contextmanager
def exact_logits(model: PreTrainedModel | PeftModel, tokens: Sequence[int]) -> Iterator[None]:
    """While it lasts the model's logits are float32, and those of `tokens` are multiplied in float32.

    In bfloat16 a logit of 20 has steps of 0.125: a few labels that are compared by them would be tied every now and
    then. Of all others only the sum is asked for, in which the steps average out. A head that is no plain linear layer
    (one that has an adapter) keeps its own precision.
    """
    from common.models.packed_weights import PackedLinear

    head = model.get_output_embeddings()
    ids = torch.tensor(sorted(set(tokens)))

    def exact(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], logits: torch.Tensor) -> torch.Tensor:
        if logits.dtype == torch.float32:
            return logits
        logits = logits.float()
        if type(module) in (torch.nn.Linear, PackedLinear):
            from accelerate.utils import align_module_device

            with align_module_device(module):  # fetches a weight that is offloaded
                weight = module.weight[ids].float()
                bias = None if module.bias is None else module.bias[ids].float()
                logits[..., ids] = functional.linear(inputs[0].float(), weight, bias)
        return logits

    handles = [head.register_forward_pre_hook(_contiguous), head.register_forward_hook(exact)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
