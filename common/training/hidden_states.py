"""What a model made of a batch before its LM head, so that logits are made only where and when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from common.cli import UserError
from common.training import prefix_tree
from common.training.batches import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def predicted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Boolean [rows, tokens - 1]: the columns whose next token belongs to a completion."""
    return batch["labels"][:, 1:] != IGNORE


def scored(states: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """[n, ...] of states [rows, tokens, ...], or of those of a prefix tree: what predicts completions, row by row."""
    tree = batch.get(prefix_tree.NAME)
    return states[:, :-1][predicted(batch)] if tree is None else states[0, tree.sources]


@dataclass(frozen=True)
class HiddenStates:
    """What a model made of a batch: states [rows, tokens, width] after its last norm, and by layer where asked for."""

    last: torch.Tensor
    layers: Sequence[torch.Tensor] | None
    attentions: Sequence[torch.Tensor] | None

    def hidden_at(self, batch: dict[str, Any], layers: Sequence[int]) -> torch.Tensor:
        """Hidden states [n, layers, width] of the tokens that predict completions; layers count from 1."""
        states = [self.last if self.layers is None else self.layers[layer] for layer in layers]
        return torch.stack([scored(state, batch) for state in states], dim=1)


class HiddenStateReader:
    """A model's hidden states, and its logits from the last of them, made only where and when they are needed."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int] = ()) -> None:
        """
        Args:
            layers: those whose states are compared; they are kept if one is not the last.

        Raises:
            UserError: the logits are more than the LM head (and a soft cap) of the last hidden state.
        """
        self.model = model
        config = model.config.get_text_config()
        self.head = model.get_output_embeddings()
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.keep_layers = any(layer != config.num_hidden_layers for layer in layers)
        self._last: torch.Tensor | None = None
        # From the decoder itself: mixed precision turns all that the model hands out into float32.
        model.get_decoder().register_forward_hook(self._keep)
        with torch.no_grad():
            ids = torch.arange(1, 5, device=model.device)[None]
            expected = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
            made = self.logits(self._last[0, -1]).float()  # of the same pass: an adapter may have dropout
        if not torch.allclose(made, expected, atol=1e-2, rtol=1e-2):
            raise UserError(
                f"{model.name_or_path}: logits of {config.model_type} models cannot be distilled; use another"
            )

    def _keep(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self._last = output[0]

    def read(self, model: Any, batch: dict[str, torch.Tensor], attentions: bool = False) -> HiddenStates:
        """A forward pass through `model` (this one, or the wrapper it trains in) with the LM head at a single token.

        On a CPU torch copies a frozen head whole for hidden states that learn, unless they have two dimensions.
        """
        shortened = self.head.register_forward_pre_hook(lambda _, inputs: (inputs[0][0, :1].contiguous(),))
        try:
            output = model(
                input_ids=batch["input_ids"],
                attention_mask=batch.get("attention_mask"),
                **{name: batch[name] for name in ("position_ids", prefix_tree.NAME) if name in batch},
                use_cache=False,
                output_hidden_states=self.keep_layers,
                output_attentions=attentions,
                logits_to_keep=1,
            )
        finally:
            shortened.remove()
        last, self._last = self._last, None
        return HiddenStates(last, output.hidden_states if self.keep_layers else None, output.attentions)

    @property
    def frozen_head(self) -> bool:
        """Whether the logits are a product with a weight that is not trained, neither itself nor by an adapter."""
        plain = type(self.head) is torch.nn.Linear and self.head.bias is None and not self.cap
        return plain and not self.head.weight.requires_grad

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, vocabulary] of last hidden states [n, width]."""
        logits = self.head(hidden.to(self.head.weight.dtype))
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits
