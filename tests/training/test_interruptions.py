"""Resumed runs against unbroken ones, a full disk, a loss that is not a number."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
from support.models import distance, run_json
from support.processes import LONGEST, wait_for
from support.training import KINDS, checkpoint, flags, loss_curve, slowly, train

import sft_train
from common import cli
from common.cli import UserError
from common.models import adapters
from common.training import checkpoints, progress
from common.training.checkpoints import newest_checkpoint

pytestmark = pytest.mark.processes


@pytest.fixture
def steps(unbroken, monkeypatch) -> list:
    """Grows by one with every batch that is trained on in this process, once the unbroken runs are done."""
    from transformers import Trainer

    for kind in KINDS:
        unbroken(kind)
    seen: list = []
    step = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda *args, **kwargs: seen.append(0) or step(*args, **kwargs))
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_equals_unbroken(kind, unbroken, spawn, steps, tmp_path):
    main, base, data = unbroken.task(kind)
    save_dir = tmp_path / "run"
    child = spawn(partial(slowly, main), flags(base, data, save_dir, *unbroken.settings(kind)), tmp_path / "log")
    wait_for(lambda: checkpoint(save_dir, 15) or not child.is_alive())
    child.kill()
    child.join(LONGEST)
    assert child.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
    assert run_json(save_dir)["state"] == "running"
    assert not adapters.is_adapter(save_dir)
    with pytest.raises(UserError, match="holds an unfinished run; pass --resume"):
        train(main, base, data, save_dir, *unbroken.settings(kind))
    before = int(newest_checkpoint(str(save_dir)).rpartition("-")[2])
    train(main, base, data, save_dir, *unbroken.settings(kind), "--resume")
    assert len(steps) == 36 - before
    whole = unbroken(kind)
    assert distance(save_dir, whole) <= (1e-6 if kind == "sft" else 1e-5)
    assert loss_curve(save_dir) == pytest.approx(loss_curve(whole), abs=1e-6)
    assert run_json(save_dir)["final_loss"] == pytest.approx(run_json(whole)["final_loss"], abs=1e-6)
    assert run_json(save_dir)["train_loss"] == pytest.approx(run_json(whole)["train_loss"], abs=1e-6)


def test_interrupted_and_resumed_equals_unbroken(unbroken, spawn, tmp_path):
    main, base, data = unbroken.task("sft")
    save_dir = tmp_path / "run"
    child = spawn(partial(slowly, main), flags(base, data, save_dir, *unbroken.settings("sft")), tmp_path / "log")
    wait_for(lambda: checkpoint(save_dir, 15) or not child.is_alive())
    os.kill(child.pid, signal.SIGINT)
    child.join(LONGEST)
    log = (tmp_path / "log").read_text()
    assert child.exitcode == cli.INTERRUPTED, log[-2000:]
    assert "a checkpoint will be saved" in log
    assert "Traceback" not in log
    record = run_json(save_dir)
    assert (record["state"], record["error"]) == ("failed", "interrupted")
    stopped = json.loads(Path(newest_checkpoint(str(save_dir)), "trainer_state.json").read_text())
    assert 15 <= stopped["global_step"] < 36
    train(main, base, data, save_dir, *unbroken.settings("sft"), "--resume")
    assert distance(save_dir, unbroken("sft")) <= 1e-6
    assert loss_curve(save_dir) == pytest.approx(loss_curve(unbroken("sft")), abs=1e-6)
    assert run_json(save_dir)["state"] == "done"


class Step:
    """A callback in the middle of a step, whose last one took 60 s, in a call that Python's handlers wait for."""

    def __init__(self, monkeypatch):
        self.said, times = [], iter((0.0, 60.0, 100.0, 120.0))
        monkeypatch.setattr(progress, "log", self.said.append)
        self.callback = progress.interruption_callback(lambda: next(times))
        self.callback.on_train_begin(None, None, None)
        self.callback.on_step_begin(None, None, None)
        self.callback.on_step_end(None, None, None)
        self.callback.on_step_begin(None, None, None)

    def compute(self, during):
        """Returns when another thread has done `during`, with this one in a system call."""
        reading, writing = os.pipe()
        running = Path("/proc/self/task", str(threading.get_native_id()), "syscall")
        if not running.exists():
            pytest.skip("needs a kernel that says in which call a thread is")

        def other():
            try:
                wait_for(lambda: running.read_text().split()[1:2] == [f"{reading:#x}"])  # the call's first argument
                during()
            finally:
                os.write(writing, b".")

        thread = threading.Thread(target=other)
        thread.start()
        ctypes.CDLL(None).read(reading, ctypes.create_string_buffer(1), 1)
        thread.join()


@pytest.fixture
def step(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    step = Step(monkeypatch)
    yield step
    step.callback.restore()
    signal.signal(signal.SIGINT, before)


def test_a_signal_is_answered_before_what_is_computed_ends(step):
    heard = []

    def during():
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        wait_for(lambda: step.said)
        heard.append(step.callback.received)

    step.compute(during)
    assert heard == [None]  # the handler has not run, and it does not say it again
    assert step.callback.received == signal.SIGTERM
    assert step.said == ["stopping after this step, in about 40 s; a checkpoint will be saved (again to stop at once)"]
    assert signal.getsignal(signal.SIGTERM) == step.callback.previous[signal.SIGTERM]  # the next one kills


def test_a_second_signal_counts_though_the_first_has_not_been_handled(step):
    def during():
        for count in (1, 2):
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            wait_for(lambda count=count: step.callback.heard == count)

    with pytest.raises(KeyboardInterrupt):
        step.compute(during)
    assert len(step.said) == 1


@pytest.mark.parametrize("damage", [
    "no trainer_state.json", "half a trainer_state.json", "no optimizer.pt", "half a optimizer.pt",
    "half a adapter_model.safetensors", "half a rng_state.pth", "half a adapter_config.json",
])  # fmt: skip
def test_a_checkpoint_cut_short_is_passed_over(damage, unbroken, tmp_path, capsys):
    main, base, data = unbroken.task("sft")
    save_dir = tmp_path / "run"
    shutil.copytree(unbroken("sft"), save_dir)
    older, newest = sorted((save_dir / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    file = newest / damage.rpartition(" ")[2]
    content = file.read_bytes()
    file.unlink()
    if damage.startswith("half"):
        file.write_bytes(content[: len(content) // 2])
    assert newest_checkpoint(str(save_dir)) == str(older)
    (save_dir / "run.json").write_text(json.dumps(run_json(save_dir) | {"state": "running"}))
    train(main, base, data, save_dir, *unbroken.settings("sft"), "--resume")
    assert f"going on from {older}" in capsys.readouterr().err
    assert distance(save_dir, unbroken("sft")) <= 1e-6


def test_resuming_without_a_checkpoint_starts_afresh(base, rows, tmp_path, capsys):
    train(sft_train.main, base, rows["sft"], tmp_path / "run", "--max_steps", 1, "--resume")
    assert "no complete checkpoint to go on from; starting afresh" in capsys.readouterr().err


def test_a_full_disk(base, rows, spawn, tmp_path):
    save_dir = tmp_path / "run"
    child = spawn(sft_train.main, flags(base, rows["sft"], save_dir, "--max_steps", 1), tmp_path / "log", 30_000)
    child.join(LONGEST)
    log = (tmp_path / "log").read_text()
    assert child.exitcode == cli.FAILED, log[-2000:]
    assert "error: cannot write" in log
    assert "Traceback" not in log
    assert run_json(save_dir)["state"] == "failed"
    assert not (save_dir / "adapter_model.safetensors").exists()
    assert not list(save_dir.glob(".*"))


def test_an_adapter_is_put_in_place_whole(base, rows, tmp_path, monkeypatch):
    """The disk fills up after the last checkpoint, with the adapter written and the rest of its files not."""
    save = checkpoints.save_student

    def fill_up(model, tokenizer, folder, state=None):
        save(model, tokenizer, folder, state)
        if "checkpoint-" not in str(folder):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_student", fill_up)
    with pytest.raises(OSError, match="No space left"):
        train(sft_train.main, base, rows["sft"], tmp_path / "run", "--max_steps", 1)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"checkpoints", "progress.jsonl", "run.json", "task.json", "train_groups.txt"}
    assert run_json(tmp_path / "run")["state"] == "failed"


def test_a_loss_that_is_not_a_number_fails_the_run(base, rows, tmp_path):
    with pytest.raises(UserError, match=r"the loss became nan; lower --learning_rate"):
        train(sft_train.main, base, rows["sft"], tmp_path / "run", "--learning_rate", 1e30, "--epochs", 3)
    record = run_json(tmp_path / "run")
    assert record["state"] == "failed"
    assert "the loss became nan" in record["error"]
    assert not adapters.is_adapter(tmp_path / "run")
