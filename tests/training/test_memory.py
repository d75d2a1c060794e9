"""Memory that does not suffice: said before anything loads, made to by milder settings, kept within what was said."""

from __future__ import annotations

import os
import platform

import pytest
import torch
from support.models import run_json
from support.processes import fork_server
from support.training import train

import sft_train
from common import cli
from common.cli import UserError
from common.models import loading as models
from common.training import progress, run
from common.vram import machine, preflight

pytestmark = pytest.mark.processes


@pytest.fixture
def milder(monkeypatch) -> None:
    """A batch of two would help (a miniature is too small for that to be true)."""
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    monkeypatch.setattr(preflight, "advise", lambda plan, flags, free: changes)


def test_what_does_not_fit_is_said_before_anything_loads(base, rows, tmp_path, milder, monkeypatch):
    monkeypatch.setattr(preflight, "free_bytes", lambda: 1000)
    with (
        monkeypatch.context() as before,
        pytest.raises(UserError, match=r"0.0 are free; --per_device_train_batch_size 2"),
    ):
        before.setattr(models, "load_base", lambda *args, **kwargs: pytest.fail("loaded"))
        train(sft_train.main, base, rows["sft"], tmp_path / "run")
    run = train(sft_train.main, base, rows["sft"], tmp_path / "run", "--max_steps", 1, "--auto_fit")
    assert run_json(run)["auto_fit"]["per_device_train_batch_size"] == 2
    assert run_json(run)["effective_batch"] == 4


@pytest.mark.parametrize("auto_fit", [True, False])
def test_out_of_memory_all_the_same(auto_fit, base, rows, tmp_path, milder, monkeypatch):
    """With --auto_fit it goes on from the checkpoint under milder settings, once; without, they are named."""
    from transformers import Trainer

    step, seen, restarts = Trainer.training_step, [], []

    def exhausted(*args, **kwargs):
        seen.append(0)
        if len(seen) == 4:
            raise torch.OutOfMemoryError
        return step(*args, **kwargs)

    def restart(program, argv):
        restarts.append(argv)
        raise SystemExit

    monkeypatch.setattr(Trainer, "training_step", exhausted)
    monkeypatch.setattr(os, "execv", restart)
    monkeypatch.setenv(run.STEPPED_DOWN, "")  # so that it is put back as it was, whatever the run leaves
    monkeypatch.delenv(run.STEPPED_DOWN)
    more = ["--per_device_train_batch_size", 4, "--save_steps", 2, *(["--auto_fit"] if auto_fit else [])]
    ending, words = (SystemExit, None) if auto_fit else (UserError, "ran out of memory; try --per")
    with pytest.raises(ending, match=words):
        train(sft_train.main, base, rows["sft"], tmp_path / "run", *more)
    assert len(restarts) == auto_fit
    assert (run.STEPPED_DOWN in os.environ) == auto_fit
    if auto_fit:
        assert restarts[0][-1] == "--resume"
        args = cli.parse_args(sft_train.build_parser(), restarts[0][2:])
        assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 2)
        seen.clear()
        with pytest.raises(UserError, match="ran out of memory; try"):
            sft_train.main(restarts[0][2:])
        monkeypatch.delenv(run.STEPPED_DOWN)


def test_a_run_keeps_what_was_predicted(base, rows, tmp_path):
    run = train(sft_train.main, base, rows["sft"], tmp_path / "run", "--max_steps", 1)
    record = run_json(run)
    assert record["peak_memory_bytes"]["resident"] > 0.5 * record["predicted_peak_bytes"]


def test_freed_memory_is_kept_until_more_is_held_than_was_predicted(base, rows, tmp_path, monkeypatch):
    """It is looked at after each of six backward passes, three steps of two batches; 100 bytes were predicted."""
    resident, given_back = iter([95, 100, 101]), []
    memory_callback = progress.memory_callback
    monkeypatch.setattr(progress, "memory_callback", lambda predicted: memory_callback(100))
    monkeypatch.setattr(machine, "resident_bytes", lambda: next(resident))
    monkeypatch.setattr(models, "give_back_freed_memory", lambda: given_back.append(next(resident, "at the third")))
    more = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    train(sft_train.main, base, rows["sft"], tmp_path / "run", "--max_steps", 3, *more)
    assert given_back == ["at the third"]


def _leave_gaps(pipe) -> None:
    """Say what is resident with every other one of many tensors freed: kept, given back, and freed after that."""
    models.keep_freed_memory.__wrapped__()  # whatever the process has done before
    tensors = [torch.ones(1 << 20) for _ in range(100)]  # 4 MiB each, so 400 MiB
    kept = tensors[::2]
    del tensors
    sizes = [machine.resident_bytes()]
    models.give_back_freed_memory()
    sizes.append(machine.resident_bytes())
    kept.append(torch.ones(100 << 20))
    kept.pop()
    pipe.send([*sizes, machine.resident_bytes()])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory its own way")
def test_gaps_between_tensors_are_given_back():
    context = fork_server()
    ours, its = context.Pipe()
    child = context.Process(target=_leave_gaps, args=(its,))
    child.start()
    before, after, later = ours.recv()
    child.join()
    assert before - after > 180 << 20 and later < after + (20 << 20)
