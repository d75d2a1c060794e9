"""From flags to a plan: the batch that a CPU trains with, and the flags that make it smaller."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.training.settings import DpoSettings, TrainSettings
from common.training.trainer import fit_batch_size
from common.vram import preflight as vram
from common.vram.formulas import predict


@pytest.mark.parametrize("longest", [600, 1024, 1500])
@pytest.mark.parametrize("accumulation", [None, 4, 16])
@pytest.mark.parametrize("kind", [TrainSettings, DpoSettings])
def test_a_batch_that_is_not_given_is_the_one_that_a_cpu_trains_with(
    tiny_base, monkeypatch, kind, accumulation, longest
):
    settings = kind(
        student=tiny_base, data="-", save_dir="runs/x", max_len=2048, gradient_accumulation_steps=accumulation
    )
    rows = 2 * longest if kind is DpoSettings else longest  # as each trainer counts its longest
    for world in (1, 2):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        plan, (batch, passes) = settings.plan(longest=longest), fit_batch_size(settings, rows, pytest.fail)
        assert plan.batch == batch and batch * passes * world == max(16, world * (accumulation or 1))
    monkeypatch.setenv("WORLD_SIZE", "1")
    plan = settings.plan(longest=longest)
    if plan.batch > 1:
        free = predict(replace(plan, batch=plan.batch // 2)).total
        milder = replace(settings, **vram.advise(plan, settings.memory_flags(plan.batch), free))
        batch, passes = fit_batch_size(milder, rows, pytest.fail)
        assert batch == plan.batch // 2 and batch * passes == 16


def test_a_smaller_batch_keeps_the_rows_of_a_step(tiny_base):
    """Also where the accumulation was left to the trainer, which makes 32 x 1 of a batch of 32, but 8 x 2 of 8."""
    settings = TrainSettings(
        student=tiny_base, data="-", save_dir="runs/x", max_len=256, per_device_train_batch_size=32
    )
    plan = settings.plan()
    flags, free = settings.memory_flags(plan.batch), predict(replace(plan, batch=8)).total
    assert vram.advise(plan, flags, free) == {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
