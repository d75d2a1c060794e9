"""From the flags of a training or an inference to a plan, on a card or on this machine's CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from common.models import loading
from common.models.batching import first_cpu_batch
from common.models.loading import is_on
from common.vram.formulas import BFLOAT16, FLOAT32, Training
from common.vram.model_shape import ModelShape


def training_plan(
    student: ModelShape,
    *,
    cuda: bool,
    lora_r: int,
    max_len: int,
    batch: int | None,
    load_in_4bit: str,
    gradient_checkpointing: str,
    accumulation: int | None = None,
    world: int = 1,
    **more: Any,
) -> Training:
    """What a training takes under flags of these names, whose switches are "on", "off" or "auto".

    Args:
        batch: rows (DPO: pairs) in a pass; None: what the trainer takes first.
        accumulation: passes an optimizer step; None: as many as the batch wants.
        world: processes that train together.
        more: fields of the plan.
    """
    max_len = min(max_len, student.context)
    four_bit = lora_r > 0 and is_on(load_in_4bit, cuda)
    by_hand = student.large and lora_r > 0 and not (cuda or four_bit)
    plan = Training(
        student,
        max_len=max_len,
        batch=batch or 1,
        lora_r=lora_r,
        four_bit=four_bit,
        checkpointing=is_on(gradient_checkpointing, cuda),
        cuda=cuda,
        bfloat16=by_hand and loading.has_bfloat16(),
        by_hand=by_hand,
        **more,
    )
    # A batch that is not given is fitted by the trainer: on a card by trying, on a CPU by a token budget.
    return plan if batch or cuda else replace(plan, batch=first_cpu_batch(plan.tokens, accumulation, world))


def inference_width(model: ModelShape, *, cuda: bool, four_bit: bool) -> int:
    """Bytes of a weight that is not in 4 bits, as `common.models.loading.fastest_dtype` chooses."""
    return BFLOAT16 if cuda or four_bit or (model.large and loading.has_bfloat16()) else FLOAT32
