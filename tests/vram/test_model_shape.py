"""A model's shape against the model itself, built without memory for its weights."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.training import prefix_tree
from common.vram import model_shape
from common.vram.model_shape import DENSE, UnknownShape

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def config_of(kind: str, **more):
    return AutoConfig.for_model(kind, **(SIZES | more))


def matrices(config) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)


@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": True}, {"head_dim": 24}], ids=["plain", "tied", "heads"])
@pytest.mark.parametrize("kind", sorted(DENSE))
def test_families_known_by_heart(kind, more):
    if kind in ("qwen2", "phi3") and "head_dim" in more:
        more = {}  # these have none of their own
    if kind.startswith("gemma") and not more:
        more = {"tie_word_embeddings": True}  # their default
    config = config_of(kind, **more)
    parts = model_shape.from_config(config.to_dict()).parameters()
    assert parts["embeddings"] + parts["head"] + parts["linear"] == matrices(config)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        (
            "qwen3_5_text",
            {"layer_types": ["linear_attention"] * 2 + ["full_attention"]},
            "only dense decoders with gated MLPs are known",
        ),
        ("lfm2", {"layer_types": ["conv", "conv", "full_attention"]}, "only dense decoders with gated MLPs are known"),
        ("phi", {}, r"it has [\d,]+ parameters, where a dense decoder with gated MLPs has"),
        ("mixtral", {}, "only dense decoders with gated MLPs are known"),
        ("gpt2", {}, "only dense decoders with gated MLPs are known"),
    ],
)
def test_others_are_refused(kind, more, message, tmp_path):
    config_of(kind, **more).save_pretrained(tmp_path)
    with pytest.raises(UnknownShape, match=message):
        model_shape.of(str(tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        AutoConfig.for_model("mamba").to_dict(),  # which has no heads
        {"text_config": None},
        ["a list"],
        SIZES | {"model_type": "llama", "num_hidden_layers": "3"},
        SIZES | {"model_type": "llama", "num_attention_heads": 0},
        SIZES | {"model_type": "llama", "num_key_value_heads": [2, 2, 4]},
    ],
)
def test_what_says_too_little_is_of_an_unknown_shape(config, tmp_path):
    """From the Hub, too, where nothing else would catch it."""
    with pytest.raises(UnknownShape):
        model_shape.from_config(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownShape):
        model_shape.of(str(tmp_path))


def test_another_family_of_the_same_matrices(tmp_path):
    config = config_of("olmo2")
    config.save_pretrained(tmp_path)
    assert "olmo2" not in DENSE
    parts = model_shape.of(str(tmp_path)).parameters()
    config.pad_token_id = config.vocab_size  # with which no model can be built
    config.save_pretrained(tmp_path)
    assert model_shape.of(str(tmp_path)).parameters() == parts
    config.pad_token_id = None
    assert parts["embeddings"] + parts["head"] + parts["linear"] == matrices(config)


@pytest.mark.parametrize("complete", [True, False], ids=["all keys", "few keys"])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        *((kind, {}) for kind in sorted(DENSE)),
        ("mistral", {"sliding_window": None}),
        *((kind, {"sliding_window": 64}) for kind in ("qwen2", "qwen3")),
        *((kind, {"sliding_window": 64, "use_sliding_window": True}) for kind in ("qwen2", "qwen3")),
        ("qwen3", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}),
    ],
)
def test_what_reads_prefix_trees_is_known_from_the_config(kind, more, complete):
    config = config_of(kind, **more)
    shape = model_shape.from_config(config.to_dict() if complete else SIZES | more | {"model_type": kind})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape.reads_prefix_trees == prefix_tree.install(model)
