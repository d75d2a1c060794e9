"""How answers are decoded, for processes that need no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

LEAST_TEMPERATURE = 1e-5  # logits that are divided by much less leave the range of float32
LOOKUP = 10  # tokens, as in transformers' examples and in vLLM's


@dataclass(frozen=True)
class Decoding:
    """How a model's answers are decoded.

    Attributes:
        max_new_tokens: budget of one answer.
        temperature: 0, or less than `LEAST_TEMPERATURE`, is greedy.
        top_p: sample from the fewest tokens that have this much probability together (nucleus sampling, Holtzman et
            al. 2020, arXiv:1904.09751).
        num_samples: answers to each prompt.
        seed: of the samples.
        thinking: let the model think before it answers, where its chat template knows of that.
        prompt_lookup_num_tokens: how many tokens are looked up at most where an answer repeats its prompt or itself,
            and then read at once (`prompt_lookup`); 0: none. It decides how long an answer takes, not what it is.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    num_samples: int = 1
    seed: int = 0
    thinking: bool = False
    prompt_lookup_num_tokens: int = LOOKUP

    @property
    def greedy(self) -> bool:
        """The likeliest token is taken each time."""
        return self.temperature < LEAST_TEMPERATURE

    def as_dict(self) -> dict[str, Any]:
        """For keys of what is kept: thinking is named only where it is asked for, as before there was any."""
        settings = asdict(self)
        del settings["prompt_lookup_num_tokens"]
        if not self.thinking:
            del settings["thinking"]
        return settings
