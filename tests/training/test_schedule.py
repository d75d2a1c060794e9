"""The learning rate of the first steps, and checkpoints by the clock."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest
import torch
from support.training import SCRIPTS, train
from transformers import get_scheduler

import sft_train
from common.cli import UserError
from common.training import progress
from common.training.checkpoints import CHECKPOINTS
from common.training.flags import SCHEDULES
from common.training.schedule import warm_from_the_start


def rates(name: str, steps: int, warmup: int, *, warm: bool) -> list[float]:
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=2.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    if warm:
        warm_from_the_start(scheduler, warmup)
    found = []
    for _ in range(steps):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert [first, second] == scheduler.get_last_lr()
        found.append(first)
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_step_of_a_warm_up_has_no_learning_rate(name, warmup):
    plain, warm = (rates(name, 20, warmup, warm=warm) for warm in (False, True))
    assert all(rate > 0 for rate in warm)
    assert warm[warmup:] == plain[warmup:]
    if warmup and name != "constant":  # which has no warm-up
        assert plain[0] == 0
        assert warm[:warmup] == pytest.approx([2.0 * (step + 1) / (warmup + 1) for step in range(warmup)])
    else:
        assert warm == plain


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_first_step_of_a_training_learns(base, rows, tmp_path, kind):
    more = ("--max_steps", 4, "--per_device_train_batch_size", 2)
    run = train(SCRIPTS[kind], base, rows[kind], tmp_path / "run", *more)
    with open(run / "loss.csv", newline="") as handle:
        learning_rates = [float(row["learning_rate"]) for row in csv.DictReader(handle) if row["learning_rate"]]
    assert learning_rates[0] == pytest.approx(0.01 / 2)  # a warm-up of 3 % is one step of 4
    assert learning_rates[1] == pytest.approx(0.01)


def test_a_checkpoint_is_due_by_the_clock():
    now = [0.0]
    saving = progress.timed_save_callback(10, clock=lambda: now[0])

    def step(seconds: float) -> bool:
        now[0] += seconds
        control = SimpleNamespace(should_save=False)
        saving.on_step_end(None, None, control)
        if control.should_save:
            saving.on_save(None, None, control)
        return control.should_save

    now[0] = 3600.0  # loading took long
    saving.on_train_begin(None, None, None)
    assert [step(599), step(2), step(300), step(300), step(1)] == [False, True, False, True, False]
    step(400)
    saving.on_save(None, None, None)  # by --save_steps
    assert [step(500), step(100)] == [False, True]


@pytest.mark.processes
def test_minutes_between_checkpoints(base, rows, tmp_path):
    more = ("--max_steps", 3, "--per_device_train_batch_size", 2)
    often = train(sft_train.main, base, rows["sft"], tmp_path / "often", *more, "--save_minutes", 1e-6)
    seldom = train(sft_train.main, base, rows["sft"], tmp_path / "seldom", *more)
    names = [sorted(path.name for path in (run / CHECKPOINTS).glob("checkpoint-*")) for run in (often, seldom)]
    assert names == [["checkpoint-2", "checkpoint-3"], ["checkpoint-3"]]  # the two newest are kept
    with pytest.raises(UserError, match=r"--save_minutes -1\.0 must be above 0, or 0 for checkpoints by steps alone"):
        train(sft_train.main, base, rows["sft"], tmp_path / "none", "--save_minutes", -1)
