"""How much an error in each weight counts, from a model at work on rows: what llama.cpp calls an importance matrix."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from common.models.tokenizers import Encoded


def importance_of(folder: Path, rows: Iterable[Encoded]) -> dict[str, np.ndarray]:
    """Of every linear layer's weight, by name: the mean square of each input, over all tokens of the rows [columns].

    A layer's error is the error of W x, so an error in a column of W counts as much as x is large there.

    Args:
        folder: a plain model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str):
        def hook(module, inputs) -> None:
            squares = inputs[0].flatten(0, -2).double().square()
            sums[name] = sums.get(name, 0) + squares.sum(dim=0)
            counts[name] = counts.get(name, 0) + len(squares)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(f"{name}.weight"))
    with torch.inference_mode():
        for row in rows:
            model(torch.tensor([row.input_ids]), use_cache=False)
    return {name: (total / counts[name]).float().numpy() for name, total in sums.items()}
