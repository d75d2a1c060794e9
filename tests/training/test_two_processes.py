"""Two processes that train together, against one."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
from support.inputs import ROOT
from support.models import distance, run_json
from support.processes import LONGEST, join, wait_for
from support.training import RESUMABLE, checkpoint, flags, loss_curve, train
from torch.distributed.run import main as torchrun

import sft_train
from common import cli
from common.training.checkpoints import newest_checkpoint

pytestmark = pytest.mark.processes

TOGETHER = ("--max_steps", 6, "--lora_dropout", 0, "--seed", 1)


def equal(two: Path, one: Path) -> None:
    # AdamW divides the first gradient by itself: where it is all rounding noise, that is a part of a step of 0.01,
    # 6e-5 on a CPU without AVX512. Other rows or another mean would move weights by whole steps, and change the curve.
    assert distance(two, one) < 1e-4
    assert loss_curve(two) == pytest.approx(loss_curve(one), abs=1e-5)
    assert run_json(two)["effective_batch"] == run_json(one)["effective_batch"] == 2
    assert run_json(two)["state"] == "done"


def test_torchrun_equals_one_process(base, uneven, spawn, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    launcher = ["--standalone", "--nproc_per_node", "2", str(ROOT / "sft_train.py")]
    argv = flags(base, uneven, two, *TOGETHER, "--per_device_train_batch_size", 1)
    child = spawn(torchrun, [*launcher, *argv], tmp_path / "log")
    train(sft_train.main, base, uneven, one, *TOGETHER, "--per_device_train_batch_size", 2)
    child.join(LONGEST)
    assert child.exitcode == 0, (tmp_path / "log").read_text()[-3000:]
    equal(two, one)


@pytest.mark.parametrize("kind", ["kd", "dpo", "dpo from sft"])
def test_two_processes_equal_one(kind, unbroken, spawn, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    task = unbroken.task(kind)
    start = unbroken.settings(kind)[len(RESUMABLE) :]
    children = spawn.ranks(
        task[0], flags(*task[1:], two, *TOGETHER, *start, "--per_device_train_batch_size", 1), tmp_path
    )
    train(*task, one, *TOGETHER, *start, "--per_device_train_batch_size", 2)
    join(children, tmp_path)
    equal(two, one)


def test_two_processes_stop_together(base, rows, spawn, tmp_path):
    """Signals may reach one process only, or twice (from the terminal and from torchrun)."""
    save_dir = tmp_path / "run"
    more = ("--epochs", 100, "--per_device_train_batch_size", 1, "--save_steps", 10)
    children = spawn.ranks(sft_train.main, flags(base, rows["sft"], save_dir, *more), tmp_path)
    wait_for(lambda: checkpoint(save_dir, 10) or not children[0].is_alive())
    os.kill(children[0].pid, signal.SIGINT)
    wait_for(lambda: "stopping after this step" in (tmp_path / "rank0.log").read_text())
    with contextlib.suppress(ProcessLookupError):  # it may have stopped already
        os.kill(children[0].pid, signal.SIGINT)
    for rank, child in enumerate(children):
        child.join(LONGEST)
        assert child.exitcode == cli.INTERRUPTED, (tmp_path / f"rank{rank}.log").read_text()[-3000:]
    assert run_json(save_dir)["error"] == "interrupted"
    newest = max(int(path.name[11:]) for path in (save_dir / "checkpoints").glob("checkpoint-*"))
    assert 10 < newest < 1200
    assert newest_checkpoint(str(save_dir)).endswith(f"checkpoint-{newest}")
