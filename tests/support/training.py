"""What the tests of the trainers share: a short run by a script's main, its losses, its checkpoints."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import dpo_train
import kd_train
import sft_train
from common.training.checkpoints import newest_checkpoint

SCRIPTS = {"sft": sft_train.main, "kd": kd_train.main, "dpo": dpo_train.main}
QUICK = ("--learning_rate", "0.01", "--logging_steps", "1", "--gradient_accumulation_steps", "1")


def flags(base: str, data: str, save_dir: Path, *more: object) -> list[str]:
    return ["--student", base, "--data", data, "--save_dir", str(save_dir), *QUICK, *map(str, more)]


def train(main, base: str, data: str, save_dir: Path, *more: object) -> Path:
    main(flags(base, data, save_dir, *more))
    return save_dir


def loss_curve(folder: Path) -> list[float]:
    with open(folder / "loss.csv", newline="") as handle:
        return [float(row["loss"]) for row in csv.DictReader(handle) if row["loss"]]


RESUMABLE = ("--epochs", 3, "--per_device_train_batch_size", 2, "--save_steps", 5, "--lora_dropout", 0.2)
KINDS = ("sft", "dpo", "dpo from sft")


def checkpoint(save_dir: Path, step: int) -> bool:
    found = newest_checkpoint(str(save_dir))
    return found is not None and int(found.rpartition("-")[2]) >= step


def slowly(main, argv) -> int | None:
    """`main` with a pause in every step, so that it can be caught in the middle."""
    from transformers import Trainer

    step = Trainer.training_step

    def training_step(*args, **kwargs):
        time.sleep(0.1)
        return step(*args, **kwargs)

    Trainer.training_step = training_step
    return main(argv)
