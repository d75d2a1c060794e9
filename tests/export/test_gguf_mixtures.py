"""What each tensor is stored in, against a table of what llama.cpp's own quantiser chooses.

The table was worked out by hand from `llama_tensor_get_type_impl` and `tensor_type_fallback` in src/llama-quant.cpp of
github.com/ggml-org/llama.cpp at commit 007dbbf3, and from what src/models/llama.cpp (069be0ae) and qwen2.cpp there call
a 70B model. A letter is a layer.
"""

from __future__ import annotations

import pytest

from common.export.gguf_quants import Mixture, is_70b

KINDS = {"4": "Q4_K", "5": "Q5_K", "6": "Q6_K", "8": "Q8_0", "a": "Q5_0", "b": "Q5_1"}
LAYERS_24 = "666446446446446446446666"
LAYERS_32 = "6666" + "446" * 8 + "6666"
LAYERS_26 = "666" + "446" * 6 + "46666"
LAYERS_16 = "66" + "446" * 4 + "66"
LAYERS_18 = "66" + "446" * 4 + "4666"
LAYERS_36 = "6666" + "446" * 9 + "66666"
LAYERS_80 = "6" * 10 + "446" * 20 + "6" * 10
# where rows are not made of blocks of 256
ODD_18, ODD_24, ODD_26, ODD_80 = (
    layers.replace("4", "a").replace("6", "8") for layers in (LAYERS_18, LAYERS_24, LAYERS_26, LAYERS_80)
)
MODELS = {  # architecture, layers, heads, heads of keys, hidden, of all heads, intermediate, tied
    "llama 8B": ("llama", 32, 32, 8, 4096, 4096, 14336, False),
    "llama 70B": ("llama", 80, 64, 8, 8192, 8192, 28672, False),
    "llama 65B": ("llama", 80, 64, 64, 8192, 8192, 22016, False),
    "qwen2 0.5B": ("qwen2", 24, 14, 2, 896, 896, 4864, True),
    "qwen2 72B": ("qwen2", 80, 64, 8, 8192, 8192, 29568, False),
    "gemma3 270M": ("gemma3", 18, 4, 1, 640, 1024, 2048, True),
    "gemma3 1B": ("gemma3", 26, 4, 1, 1152, 1024, 6912, True),
    "smollm3 3B": ("smollm3", 36, 16, 4, 2048, 2048, 11008, True),
    "lfm2 350M": ("lfm2", 16, 16, 8, 1024, 1024, 4608, True),
    "qwen3.5 0.8B": ("qwen35", 24, 8, 2, 1024, 2048, 3584, True),
}
ATTENTION = {"lfm2 350M": (2, 5, 8, 10, 12, 14)}  # layers that have it, where not all do
DELTA_NET = {"qwen3.5 0.8B": [layer for layer in range(24) if layer % 4 != 3]}  # whose attn_qkv counts as an attn_v
# (model, quant): output, token_embd, attn_q of every layer, attn_output of every layer, attn_v, ffn_down
TABLE = {
    ("llama 8B", "Q4_K_M"): ("6", "4", "4", "4", LAYERS_32, LAYERS_32),
    ("llama 8B", "Q5_K_M"): ("6", "5", "5", "5", LAYERS_32.replace("4", "5"), LAYERS_32.replace("4", "5")),
    ("llama 8B", "Q6_K"): ("6", "6", "6", "6", "6" * 32, "6" * 32),
    ("llama 70B", "Q4_K_M"): ("6", "4", "4", "4", LAYERS_80.replace("4", "5"), LAYERS_80),
    ("llama 70B", "Q5_K_M"): ("6", "5", "5", "5", LAYERS_80.replace("4", "5"), LAYERS_80.replace("4", "5")),
    ("llama 65B", "Q4_K_M"): ("6", "4", "4", "4", LAYERS_80, LAYERS_80),
    ("qwen2 72B", "Q4_K_M"): ("6", "4", "4", "4", LAYERS_80.replace("4", "5"), ODD_80),
    ("qwen2 0.5B", "Q4_K_M"): (None, "8", "a", "a", ODD_24, LAYERS_24),
    ("qwen2 0.5B", "Q5_K_M"): (None, "8", "b", "b", ODD_24.replace("a", "b"), LAYERS_24.replace("4", "5")),
    ("qwen2 0.5B", "Q8_0"): (None, "8", "8", "8", "8" * 24, "8" * 24),
    ("gemma3 1B", "Q4_K_M"): (None, "8", "a", "4", ODD_26, LAYERS_26),
    ("gemma3 1B", "Q5_K_M"): (None, "8", "b", "5", ODD_26.replace("a", "b"), LAYERS_26.replace("4", "5")),
    ("gemma3 270M", "Q4_K_M"): (None, "8", "a", "4", ODD_18, LAYERS_18),
    ("smollm3 3B", "Q4_K_M"): (None, "6", "4", "4", LAYERS_36, LAYERS_36),
    ("lfm2 350M", "Q4_K_M"): (None, "6", "4", "4", "446446", LAYERS_16),
    ("lfm2 350M", "Q5_K_M"): (None, "6", "5", "5", "556556", LAYERS_16.replace("4", "5")),
    ("qwen3.5 0.8B", "Q4_K_M"): (None, "6", "4", "4", LAYERS_24, LAYERS_24),
    ("qwen3.5 0.8B", "Q5_K_M"): (None, "6", "5", "5", LAYERS_24.replace("4", "5"), LAYERS_24.replace("4", "5")),
    ("lfm2 350M", "Q6_K"): (None, "6", "6", "6", "666666", "6" * 16),
}  # fmt: skip


@pytest.mark.parametrize(("model", "quant"), TABLE)
def test_every_tensor_is_stored_as_llama_cpp_stores_it(model, quant):
    architecture, layers, heads, kv_heads, hidden, queries, intermediate, tied = MODELS[model]
    attention = ATTENTION.get(model, range(layers))
    mixture = Mixture(quant, layers, tied, is_70b(architecture, layers, heads, kv_heads), len(attention))
    output, embedding, attn_q, attn_output, attn_v, ffn_down = TABLE[model, quant]

    def kind(name: str, columns: int, rows: int = 64) -> str:
        return mixture.kind_of(name, (rows, columns)).name

    if output:
        assert kind("output.weight", hidden) == KINDS[output]
    assert kind("token_embd.weight", hidden) == KINDS[embedding]
    found = {"attn_v": "", "ffn_down": ""}
    letters = {name: letter for letter, name in KINDS.items()}
    for layer in range(layers):
        at = f"blk.{layer}."
        for part in ("ffn_gate", "ffn_up", "shortconv.in_proj", "shortconv.out_proj", "attn_q", "attn_k"):
            assert kind(f"{at}{part}.weight", hidden) == KINDS[attn_q]
        assert mixture.kind_of(f"{at}shortconv.conv.weight", (hidden, 3)).name == "F32"
        assert kind(f"{at}attn_output.weight", queries) == KINDS[attn_output]
        if layer in DELTA_NET.get(model, ()):
            for part in ("attn_gate", "ssm_alpha", "ssm_beta"):
                assert kind(f"{at}{part}.weight", hidden) == KINDS[attn_q]
            assert kind(f"{at}ssm_out.weight", queries) == KINDS[attn_q]
            assert mixture.kind_of(f"{at}ssm_conv1d.weight", (6144, 4)).name == "F32"
            found["attn_v"] += letters[kind(f"{at}attn_qkv.weight", hidden)]
        elif layer in attention:
            found["attn_v"] += letters[kind(f"{at}attn_v.weight", hidden)]
        found["ffn_down"] += letters[kind(f"{at}ffn_down.weight", intermediate)]
        for norm in ("attn_norm", "ffn_norm", "attn_q_norm", "post_attention_norm", "post_ffw_norm"):
            assert mixture.kind_of(f"{at}{norm}.weight", (hidden,)).name == "F32"
        assert mixture.kind_of(f"{at}attn_q.bias", (hidden,)).name == "F32"
    assert found == {"attn_v": attn_v, "ffn_down": ffn_down}
