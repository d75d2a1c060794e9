"""Which layers an adapter is put on, by family."""

from __future__ import annotations

import pytest
from support.families import config_of
from transformers import AutoConfig, AutoModelForCausalLM

from common.models import adapters
from common.models.adapters import LORA_TARGETS

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MLP = ["gate_proj", "up_proj", "down_proj"]
GATED_DELTA = ["in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z", "out_proj"]
LFM2 = ["in_proj", "out_proj", "w1", "w2", "w3"]


def build(kind: str, **more):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | more)))


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        *((kind, {}, list(LORA_TARGETS)) for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "smollm3")),
        ("phi3", {}, ["o_proj", "down_proj", "gate_up_proj", "qkv_proj"]),
        ("gpt2", {}, ["c_attn", "c_fc", "c_proj"]),
        (
            "qwen3_5_text",
            {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16},
            ["q_proj", "k_proj", "v_proj", "o_proj", *MLP, *GATED_DELTA],
        ),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, ["q_proj", "k_proj", "v_proj", *LFM2]),
    ],
)
def test_targets(kind, more, expected):
    model = build(kind, **more)
    assert adapters.lora_targets(model) == expected
    linear = sum(
        1 for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and name != "lm_head"
    )
    adapted = adapters.add_lora(model, r=2, alpha=2, dropout=0.0, seed=0)
    counts = adapters.adapted_layers(adapted)
    assert set(counts) == set(expected) and sum(counts.values()) == linear


def test_a_vision_tower_gets_no_adapter():
    """No text goes through it, though its layers have the names of those that text goes through."""
    config = config_of("gemma3 with images", vocab_size=64, pad_token_id=0)
    adapted = adapters.add_lora(AutoModelForCausalLM.from_config(config), r=2, alpha=2, dropout=0.0, seed=0)
    assert adapters.adapted_layers(adapted) == dict.fromkeys(LORA_TARGETS, 4)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert all(".language_model." in name for name in trained)
