"""4-bit weights on a CPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.inputs import LABELS, PROMPTS
from support.models import build_base, distance, run_json, weights
from support.training import loss_curve, train

import dpo_train
import sft_train
from common.models import chats
from common.models import loading as models
from common.models.source import ModelSource
from common.training import batches, losses

pytestmark = pytest.mark.processes

# 4-bit on a CPU.


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory, tokenizer, rows) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("four_bit")
    base = build_base(folder / "base", tokenizer, embeddings=0.3, hidden=64)
    more = ("--load_in_4bit", "on", "--max_steps", 12, "--per_device_train_batch_size", 8, "--lora_dropout", 0)
    return base, train(sft_train.main, base, rows["sft"], folder / "run", *more)


def test_4bit_training_learns(four_bit):
    _, run = four_bit
    curve = loss_curve(run)
    assert all(map(math.isfinite, curve))
    assert curve[-1] < curve[0] - 1
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())
    assert run_json(run)["settings"]["load_in_4bit"] == "on"


def test_a_base_that_is_stored_in_4_bits_stays_unpacked(tokenizer, tmp_path, monkeypatch):
    """As one that is loaded in 4 bits does, whatever is asked for; on a CPU that would have repacked it."""
    base = build_base(tmp_path / "base", tokenizer, hidden=64)
    models.load_base(ModelSource(base, load_in_4bit="on")).save_pretrained(tmp_path / "stored")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    for load_in_4bit in ("off", "on"):
        stored = models.load_base(ModelSource(str(tmp_path / "stored"), load_in_4bit=load_in_4bit))
        layers = [module for module in stored.modules() if type(module).__name__ == "Linear4bit"]
        assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_a_4bit_adapter_loads_in_either_precision(four_bit):
    base, run = four_bit
    mean = {}
    for switch in ("on", "off"):
        for folder in (base, str(run)):
            model, tokenizer = models.load_for_inference(ModelSource(folder, load_in_4bit=switch, dtype="auto"))
            four = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
            assert bool(four) == (switch == "on")
            assert not any(getattr(m, "base_layer", m).support_avx512bf16_for_cpu for m in four)
            encoded = [chats.encode(tokenizer, p, LABELS[i % 3]) for i, p in enumerate(PROMPTS)]
            with torch.no_grad():
                loss, _ = losses.completion_loss(model, batches.collate(encoded, tokenizer.pad_token_id))
            mean[switch, folder] = loss.item()
    for switch in ("on", "off"):
        assert mean[switch, str(run)] < mean[switch, base] - 1
    assert mean["on", str(run)] == pytest.approx(mean["off", str(run)], abs=0.2)


def test_4bit_layers_stay_as_loaded(four_bit):
    model = models.load_base(ModelSource(four_bit[0], load_in_4bit="on"), training=True)
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    before = [layer.weight.detach().clone() for layer in layers]
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(12)[None])
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))


def test_evaluating_between_4bit_epochs_changes_nothing(four_bit, rows, tmp_path):
    _, run = four_bit
    argv = run_json(run)["argv"][1:]
    argv[argv.index(str(run))] = str(tmp_path / "judged")
    sft_train.main([*argv, "--eval_data", rows["sft"]])
    assert distance(tmp_path / "judged", run) == 0


def test_4bit_dpo(four_bit, rows, tmp_path):
    run = train(dpo_train.main, four_bit[0], rows["dpo"], tmp_path / "run", "--load_in_4bit", "on", "--max_steps", 6,
                "--per_device_train_batch_size", 8)  # fmt: skip
    curve = loss_curve(run)
    assert curve[0] == pytest.approx(math.log(2), abs=1e-3)
    assert curve[-1] < 0.6
