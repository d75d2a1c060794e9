"""How long a prompt takes to be read on a CPU, said while it is: its first layers tell it of all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING

from torch import nn

from common.cli import duration, log

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LONG = 20.0  # seconds that one may wait without a word
LEAST = 128  # tokens: fewer are read in less by any base that a CPU is for


class ReadingTime:
    """Says of the first prompt that takes long how long it takes; of the others one may think so, too.

    A model's layers of a kind take alike, and what stands before and behind them hardly anything, so that the time of a
    prompt is known when one layer of each kind has read it. On a card, and of layers that are not found, nothing is
    said.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model, config = model, model.config.get_text_config()
        self.kinds = list(getattr(config, "layer_types", None) or ["layer"] * config.num_hidden_layers)
        self.once = False

    @cached_property
    def _first(self) -> nn.ModuleList:
        """So many layers that each kind is among them; two at least, as the very first has more to do at first."""
        lists = (module for module in self.model.modules() if isinstance(module, nn.ModuleList))
        layers = next((found for found in lists if len(found) == len(self.kinds)), nn.ModuleList())
        return layers[: max(2, 1 + max(map(self.kinds.index, self.kinds)))]

    @contextlib.contextmanager
    def said(self, tokens: int) -> Iterator[None]:
        """For the time that a prompt of so many tokens is read in."""
        if self.once or tokens < LEAST or self.model.device.type != "cpu":
            yield
            return
        times: list[float] = []

        def tick(*_) -> None:
            times.append(perf_counter())
            if len(times) > len(self._first):
                self._say(tokens, times)

        hooks = [layer.register_forward_hook(tick) for layer in self._first]
        hooks += [layer.register_forward_pre_hook(tick) for layer in self._first[:1]]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _say(self, tokens: int, times: list[float]) -> None:
        of_kind = dict(zip(self.kinds, (end - start for start, end in pairwise(times)), strict=False))
        seconds = sum(map(of_kind.__getitem__, self.kinds))
        if seconds > LONG:
            log(f"to read a prompt of {tokens:,} tokens takes about {duration(seconds)} here")
            self.once = True
