"""A model at work, whatever runs it, and the same in torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Runtime(Protocol):
    """A model at work, whatever runs it."""

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after each of the tokens [tokens, vocabulary]."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int]) -> list[list[int]]:
        """The greedy continuation of each prompt, without the token of `ends` that ended it."""
        ...


class TorchRuntime:
    """A model in torch: an adapter on its base, or a plain model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """See `Runtime`."""
        import torch

        with torch.inference_mode():
            return self.model(torch.tensor([ids], device=self.model.device)).logits[0].float().cpu().numpy()

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int]) -> list[list[int]]:
        """See `Runtime`."""
        return [self._continue(prompt, max_new_tokens, ends) for prompt in prompts]

    def _continue(self, prompt: Sequence[int], max_new_tokens: int, ends: Collection[int]) -> list[int]:
        import torch
        from transformers import DynamicCache

        answer, ids = [], torch.tensor([prompt], device=self.model.device)
        cache = DynamicCache(config=self.model.config)  # by which it knows of layers that keep a state
        with torch.inference_mode():
            while len(answer) < max_new_tokens:
                logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                ids = logits[:, -1].argmax(dim=-1, keepdim=True)
                if int(ids) in ends:
                    break
                answer.append(int(ids))
        return answer
