"""A model at work, whatever runs it, and the same in torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from common.models import greedy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Runtime(Protocol):
    """A model at work, whatever runs it."""

    def logits(self, ids: Sequence[int], wanted: int | None = None) -> np.ndarray:
        """Logits after each of the tokens [tokens, vocabulary].

        Args:
            wanted: of this many last tokens only; None: of all.
        """
        ...

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int]) -> list[list[int]]:
        """The greedy continuation of each prompt, without the token of `ends` that ended it."""
        ...


class TorchRuntime:
    """A model in torch: an adapter on its base, or a plain model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def logits(self, ids: Sequence[int], wanted: int | None = None) -> np.ndarray:
        """See `Runtime`."""
        import torch

        given = torch.tensor([ids], device=self.model.device)
        with torch.inference_mode():
            return self.model(given, logits_to_keep=wanted or len(ids)).logits[0].float().cpu().numpy()

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int]) -> list[list[int]]:
        """See `Runtime`."""
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)  # by which it knows of layers that keep a state

        def step(*arrays: np.ndarray) -> np.ndarray:
            ids, mask, positions = (torch.from_numpy(array).to(self.model.device) for array in arrays)
            read = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
            return self.model(ids, **read, logits_to_keep=1).logits[:, -1].float().cpu().numpy()

        with torch.inference_mode():
            return greedy.answers(step, prompts, max_new_tokens, ends)
