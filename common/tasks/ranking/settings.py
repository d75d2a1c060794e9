"""How rows are scored: what the scoring flags of a command mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.models.batching import MAX_BATCH_TOKENS


@dataclass(frozen=True)
class ScoringSettings:
    """How rows are scored and calibrated, beside the model and the task.

    Attributes:
        max_batch_tokens: tokens in one forward pass.
        auto_fit: where memory is short, take settings that fit, and say so; else that is an error.
        num_null_prompts: content-free prompts behind the prior; None: all of the task.
        calibration: "none", "prior", "batch" or "fitted"; None: fitted where the model's folder has one, else none of
            a model that was trained for the task, and prior of any other.
        label_bias: hand-set offsets on the scores by label, in nats.
    """

    max_batch_tokens: int = MAX_BATCH_TOKENS
    auto_fit: bool = False
    num_null_prompts: int | None = None
    calibration: str | None = None
    label_bias: Mapping[str, float] = field(default_factory=dict)


DEFAULT = ScoringSettings()
