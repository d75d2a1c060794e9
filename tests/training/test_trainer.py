"""The trainers against each other: accumulation, checkpointing, KD on the same texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from support.inputs import read_rows, write_rows
from support.models import distance, run_json, weights
from support.training import loss_curve, train

import kd_train
import sft_train

pytestmark = pytest.mark.processes


def accuracies(run: Path) -> list[float]:
    """Of each step."""
    lines = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    return [line["mean_token_accuracy"] for line in lines if "loss" in line]


def test_accumulation_equals_a_real_batch(base, uneven, tmp_path, monkeypatch):
    """Also on a model whose own loss takes no items of a step.

    So does what is judged, whose batches are of the same size: 13 rows of uneven answers.
    """
    held_out = write_rows(tmp_path / "held_out.jsonl", read_rows(uneven)[:13])
    runs = []
    for size, accumulation, takes_items in ((4, 1, True), (2, 2, True), (1, 4, False)):
        monkeypatch.setattr(transformers.Qwen2ForCausalLM, "accepts_loss_kwargs", takes_items, raising=False)
        cut = ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", accumulation)
        more = ("--max_steps", 6, "--lora_dropout", 0, "--eval_data", held_out)
        runs.append(train(sft_train.main, base, uneven, tmp_path / f"{size}x{accumulation}", *cut, *more))
    assert max(t.abs().max() for name, t in weights(runs[0]).items() if "lora_B" in name) > 1e-3
    for run in runs[1:]:
        assert distance(runs[0], run) < 1e-5
        assert loss_curve(runs[0]) == pytest.approx(loss_curve(run), abs=1e-5)
        assert accuracies(runs[0]) == pytest.approx(accuracies(run), abs=1e-5)
    judged = [run_json(run)["final_eval_loss"] for run in runs]
    assert judged == pytest.approx([judged[0]] * 3, abs=1e-4)
    assert {run_json(run)["effective_batch"] for run in runs} == {4}


def test_gradient_checkpointing_changes_nothing(base, uneven, tmp_path):
    runs = [
        train(sft_train.main, base, uneven, tmp_path / f"gc_{switch}", "--gradient_checkpointing", switch,
              "--max_steps", 3, "--lora_dropout", 0)
        for switch in ("on", "off")
    ]  # fmt: skip
    assert distance(*runs) < 1e-6


def test_kd_on_the_same_texts_is_sft(base, rows, tmp_path):
    one = train(sft_train.main, base, rows["sft"], tmp_path / "sft", "--max_steps", 4)
    other = train(kd_train.main, base, rows["kd"], tmp_path / "kd", "--max_steps", 4)
    assert distance(one, other) == 0
    assert run_json(other)["method"] == "kd"
