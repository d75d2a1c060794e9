"""How answers are decoded, for processes that need no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoding:
    """How a model's answers are decoded.

    Attributes:
        max_new_tokens: budget of one answer.
        temperature: 0 is greedy.
        top_p: sample from the fewest tokens that have this much probability together (nucleus sampling, Holtzman et
            al. 2020, arXiv:1904.09751).
        num_samples: answers to each prompt.
        seed: of the samples.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    num_samples: int = 1
    seed: int = 0
