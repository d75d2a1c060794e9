"""Quantisation-aware training: it computes what the quantised model will, and saves an ordinary one."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from support.models import run_json

import distill_train
import dpo_train
import sft_train
from common.cli import UserError
from common.models import loading as models
from common.models.source import ModelSource
from common.training import quantization_aware
from common.training.settings import TrainSettings
from common.vram import formulas, model_shape

TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
IDS = torch.arange(5, 25)[None]


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits


def test_lora_is_refused(base, rows, tmp_path):
    argv = ["--student", base, "--data", rows["sft"], "--save_dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"merging the adapter changes them; pass --lora_r 0"):
        sft_train.main([*argv, "--quantization_aware", "int8"])
    assert not (tmp_path / "run").exists()


def test_without_torchao(base, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    argv = ["--student", base, "--data", rows["sft"], "--save_dir", str(tmp_path / "run"), "--lora_r", "0"]
    with pytest.raises(UserError, match=r"needs torchao; pip install -r requirements/export.txt"):
        sft_train.main([*argv, "--quantization_aware", "int8"])


@pytest.mark.processes
@TORCHAO
@pytest.mark.parametrize("kind", quantization_aware.KINDS)
def test_training_sees_the_quantised_model(kind, base, rows, tmp_path):
    """Trained for a few steps and loaded as an ordinary model, torchao quantises it to what training computed with."""
    run = tmp_path / "run"
    argv = ["--student", base, "--data", rows["sft"], "--save_dir", str(run), "--lora_r", "0", "--max_steps", "3"]
    sft_train.main([*argv, "--learning_rate", "0.01", "--quantization_aware", kind])
    assert run_json(run)["settings"]["quantization_aware"] == kind
    plain = models.load_for_inference(ModelSource(str(run), dtype="float32"))[0]
    assert not any("quant" in name for name in plain.state_dict())
    exact = logits(plain)
    assert (exact - logits(models.load_base(ModelSource(base)))).abs().max() > 0.01  # it has learnt something
    prepared = quantization_aware.prepare(models.load_for_inference(ModelSource(str(run), dtype="float32"))[0], kind)
    rounded = logits(prepared)
    assert (rounded - exact).abs().max() > 1e-4
    assert (rounded - logits(quantization_aware.quantized(plain, kind))).abs().max() < 1e-5


@pytest.mark.processes
@TORCHAO
def test_distillation_and_dpo_learn_to_bear_it_too(base, rows, tmp_path):
    more = ["--student", base, "--lora_r", "0", "--max_steps", "2", "--quantization_aware", "int8"]
    argv = [*more, "--data", rows["sft"], "--save_dir", str(tmp_path / "distill"), "--teacher", base]
    distill_train.main([*argv, "--forward_kl", "1", "--hidden_mse", "1"])
    lines = (tmp_path / "distill" / "loss.csv").read_text().splitlines()
    first = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    assert 0 < float(first["forward_kl"]) < 0.1  # the student is its teacher, but for the rounding
    dpo_train.main([*more, "--data", rows["dpo"], "--save_dir", str(tmp_path / "dpo")])
    for name in ("distill", "dpo"):
        plain = models.load_for_inference(ModelSource(str(tmp_path / name), dtype="float32"))[0]
        assert not any("quant" in key for key in plain.state_dict())


def test_what_rounding_keeps_is_predicted(base):
    settings = TrainSettings(student=base, save_dir="-", lora_r=0, gradient_checkpointing="off")
    plain, rounded = (
        formulas.predict(replace(settings, quantization_aware=kind).plan(cuda=False)).tensors for kind in (None, "int8")
    )
    linear = model_shape.of(base).parameters()["linear"]
    assert rounded - plain > 2 * 4 * linear
