"""Memory that does not suffice: said before anything loads, or made to by milder settings."""

from __future__ import annotations

import os

import pytest
import torch
from support.models import run_json
from support.training import train

import sft_train
from common import cli
from common.cli import UserError
from common.models import loading as models
from common.training import run
from common.vram import preflight

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
