"""Two processes that distil together, against one."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.distillation import distill, flags, loss_column
from support.models import distance, run_json
from support.processes import join

import distill_train
from common.models import adapters

pytestmark = pytest.mark.processes


def table(folder: Path) -> dict[str, list[float]]:
    """What was logged: the loss, each of its terms, the learning rate."""
    with open(folder / "loss.csv", newline="") as handle:
        names = next(csv.reader(handle))
    return {name: loss_column(folder, name) for name in names}


def equal(two: Path, one: Path) -> None:
    tables = table(two), table(one)
    assert tables[0].keys() == tables[1].keys()
    for name, values in tables[0].items():
        assert values == pytest.approx(tables[1][name], abs=1e-5 if name == "loss" else 2e-5), name  # terms are rounded
    records = run_json(two), run_json(one)
    assert records[0]["effective_batch"] == records[1]["effective_batch"] == 4
    assert records[0]["final_loss"] == pytest.approx(records[1]["final_loss"], abs=1e-5)
    if adapters.is_adapter(one):
        assert distance(two, one) < 1e-5
    else:
        a, b = (load_file(folder / "model.safetensors") for folder in (two, one))
        assert a.keys() == b.keys()
        assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5


@pytest.mark.parametrize(
    "more",
    [
        ("--forward_kl", 1, "--ce", 0.5, "--temperature", 2),
        ("--forward_kl", 1, "--hidden_mse", 1, "--lora_r", 0),
        ("--hidden_mse", 1, "--hidden_cosine", 0.1, "--layer_map", "1:1"),
        ("--attention_mse", 1, "--layer_map", "1:1", "--lora_r", 0),
    ],
    ids=["lora", "all weights and a projection", "an inner layer and a projection", "attention of an inner layer"],
)
def test_two_processes_equal_one(more, base, teacher, uneven, spawn, tmp_path):
    """Beside a live teacher. Some objectives give the later layers no gradient, for which nobody must wait."""
    more = ("--teacher", teacher, "--data", uneven, "--learning_rate", 0.001, *more)
    argv = flags(base, tmp_path / "two", *more, "--per_device_train_batch_size", 2)
    children = spawn.ranks(distill_train.main, argv, tmp_path)
    one = distill(base, tmp_path / "one", *more)
    join(children, tmp_path)
    equal(tmp_path / "two", one)


def test_two_processes_write_a_cache_and_train_from_it(base, teacher, uneven, spawn, tmp_path):
    more = ("--teacher", teacher, "--data", uneven, "--forward_kl", 1, "--ce", 0.5, "--hidden_mse", 1, "--cache_k", 16)
    theirs = ("--teacher_cache", tmp_path / "theirs")
    argv = flags(base, tmp_path / "two", *more, *theirs, "--per_device_train_batch_size", 2)
    children = spawn.ranks(distill_train.main, argv, tmp_path)
    mine = distill(base, tmp_path / "mine", *more, "--teacher_cache", tmp_path / "mine_cache")
    join(children, tmp_path)
    equal(tmp_path / "two", distill(base, tmp_path / "one", *more, *theirs))  # which finds the cache complete
    assert len(list((tmp_path / "theirs").glob("*.rows"))) == 2  # each wrote its share
    assert loss_column(mine) == pytest.approx(loss_column(tmp_path / "two"), abs=1e-3)  # float16, of other batches


def test_two_processes_of_labels_equal_one(base, labelled, spawn, tmp_path):
    more = ("--labels", "--data", labelled, "--forward_kl", 1, "--ce", 0.5, "--learning_rate", 0.001)
    children = spawn.ranks(
        distill_train.main, flags(base, tmp_path / "two", *more, "--per_device_train_batch_size", 2), tmp_path
    )
    one = distill(base, tmp_path / "one", *more)
    join(children, tmp_path)
    equal(tmp_path / "two", one)


def test_resumed_on_an_inner_layer(base, teacher, uneven, spawn, tmp_path):
    """The later layers stay out of training when a checkpoint is loaded, too."""
    more = ("--teacher", teacher, "--data", uneven, "--hidden_mse", 1, "--layer_map", "1:1", "--save_steps", 3)
    one, two = distill(base, tmp_path / "one", *more), tmp_path / "two"
    (two / "checkpoints").mkdir(parents=True)
    shutil.copytree(one / "checkpoints" / "checkpoint-3", two / "checkpoints" / "checkpoint-3")
    argv = flags(base, two, *more, "--resume", "--per_device_train_batch_size", 2)
    join(spawn.ranks(distill_train.main, argv, tmp_path), tmp_path)
    equal(two, one)
