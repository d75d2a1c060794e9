"""What a run that goes on must share with the run as it was, and the lock that keeps a second one out of its folder."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.cli import UserError

try:
    import fcntl
except ModuleNotFoundError:  # native Windows
    fcntl = None

# Settings that may change: where things lie (their contents are compared), what is reported, and how a step's rows are
# cut into passes.
FREE = frozenset({
    *("save_dir", "config", "resume", "overwrite", "with_changes", "report_to", "logging_steps", "save_steps"),
    "save_minutes",
    *("student", "data", "eval_data", "skip_bad_rows", "trust_remote_code", "teacher_cache"),
    *("ignore_collapse", "dry_run"),
    *("auto_fit", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
    "max_batch_tokens",
})  # fmt: skip
BEGUN_WITH = ("base_fingerprint", "effective_batch")  # facts of a training that are known once its models are loaded
IF_GIVEN = ("teacher",)  # what a cache has from it may be enough to go on; another one is a change
ELSEWHERE = ("path",)  # of a data file's description: where it lies


def differences(before: Mapping[str, Any], settings: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """How a run differs from the one that it goes on with, as words: "--epochs 3.0, not 5.0", "another data file".

    Args:
        before: run.json as the run left it; what it does not say is not compared.
        settings: those that are asked for now and decide something (see `TrainSettings.deciding`).
        data: what is asked for now, as run.json would keep it.
    """
    settings, data = json.loads(json.dumps(settings)), json.loads(json.dumps(data))  # tuples are lists there
    known = before.get("settings")
    known = known if isinstance(known, dict) else {}
    changed = [
        name
        for name in settings
        if name in known
        and name not in FREE
        and settings[name] != known[name]
        and not (name in IF_GIVEN and None in (settings[name], known[name]))
    ]
    words = [f"--{name} {known[name]}, now {settings[name]}" for name in changed]
    described = before.get("data") or {}
    if isinstance(described, dict):
        parts = [name for name in data if name in described and name not in ELSEWHERE and data[name] != described[name]]
        if parts:
            words.append(f"other training data ({', '.join(parts)})")
    return words


def refuse_changes(save_dir: str, words: list[str]) -> None:
    """Raises UserError that names what has changed, where anything has."""
    if words:
        raise UserError(
            f"--resume: the run in {save_dir} was begun with {'; '.join(words)}; give what it was begun with, or pass "
            "--with_changes to go on with what is new"
        )


class ResumesExactly:
    """Mixed into a Trainer: a training that goes on ends as one that nobody has disturbed."""

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, which stops after a step: one too many, where the last one lies within the epoch."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's, whose data loader draws from the generator that the next epoch's dropout draws from."""
        import torch

        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            return super().evaluate(*args, **kwargs)


def lock_folder(save_dir: str | Path) -> int | None:
    """Keep other trainings out of a run folder for as long as this process lives; a file descriptor.

    None where the system, or the file system, has no locks.

    Raises:
        UserError: another training has it.
    """
    if fcntl is None:
        return None
    handle = os.open(save_dir, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"another training writes to {save_dir}; wait until it has ended, or choose another --save_dir"
        ) from None
    except OSError:
        os.close(handle)
        return None
    return handle


def unlock(handle: int | None) -> None:
    """Let other trainings in again."""
    if handle is not None:
        with contextlib.suppress(OSError):
            os.close(handle)
