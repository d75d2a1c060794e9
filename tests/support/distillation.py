"""What the tests of distillation share: a short run of distill_train.py and the columns of its loss curve."""

from __future__ import annotations

import csv
from pathlib import Path

import distill_train

QUICK = ("--learning_rate", 0.01, "--logging_steps", 1, "--max_steps", 6, "--per_device_train_batch_size", 4,
         "--gradient_accumulation_steps", 1, "--lora_dropout", 0)  # fmt: skip


def flags(student: str, save_dir: Path, *more: object) -> list[str]:
    return ["--student", student, "--save_dir", str(save_dir), *map(str, (*QUICK, *more))]


def distill(student: str, save_dir: Path, *more: object) -> Path:
    distill_train.main(flags(student, save_dir, *more))
    return save_dir


def loss_column(folder: Path, name: str = "loss") -> list[float]:
    with open(folder / "loss.csv", newline="") as handle:
        return [float(row[name]) for row in csv.DictReader(handle) if row[name]]
