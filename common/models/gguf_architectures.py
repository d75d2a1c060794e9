"""The architectures of GGUF files, each both ways: a file's metadata as a transformers config, and the reverse.

What llama.cpp takes for granted of an architecture (that every fourth layer of a SmolLM3 knows no positions) stands in
no file, so a config that has it otherwise is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from common.cli import UserError
from common.models.batching import UNLIMITED, window_of

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from transformers import PreTrainedConfig

    from common.models.gguf_file import GgufFile

# Layers, as transformers names them.
FULL, SLIDING, CONV, LINEAR = "full_attention", "sliding_attention", "conv", "linear_attention"
YARN, LLAMA3 = "yarn", "llama3"  # ways of stretching positions, as both name them
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN_ROPE = {
    **{"beta_fast": 32, "beta_slow": 1, "truncate": True},
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim")),
}
GEMMA3_PERIOD = 6  # the last of so many layers of a Gemma 3 sees all; where a file does not say
GEMMA3_LOCAL_THETA = 10_000.0  # of its other layers' positions, likewise
GEMMA3_LARGEST = 62  # layers of the one that scales attention by its own width, as llama.cpp tells it
SMOLLM3_STEP = 4  # every so manieth layer of a SmolLM3 knows no positions


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture becomes a transformers model, and a transformers model a file of it.

    Attributes:
        model_type: of transformers.
        config: from the file to the keys of a config that not all architectures have.
        keys: from a config to the metadata that not all architectures have, without the architecture's name; it raises
            UserError for a config that llama.cpp has no equal of. None: such files are read, and not written.
        also: further model types that are written as this architecture.
        activation: of the MLPs.
        rotated: tensors whose rows llama.cpp orders by rotated pairs, transformers by halves of a head.
        transposed: tensors stored [out, in] that transformers keeps as [in, out].
        ones_added: tensors that llama.cpp stores with 1 added to each number.
        decays: tensors that llama.cpp stores as -exp(x).
        tiled: tensors in whose last rows, and
        tiled_columns: in whose columns stand the value heads of a gated delta net: transformers has those together that
            share a key head, llama.cpp has them as many times over as there are key heads.
    """

    model_type: str
    config: Callable[[GgufFile], dict[str, Any]] = lambda file: {}
    keys: Callable[[PreTrainedConfig], dict[str, Any]] | None = None
    also: tuple[str, ...] = ()
    activation: str = "silu"
    rotated: str = r"(?!)"
    transposed: str = r"(?!)"
    ones_added: str = r"(?!)"
    decays: str = r"(?!)"
    tiled: str = r"(?!)"
    tiled_columns: str = r"(?!)"


def refusal(config: PreTrainedConfig, what: str) -> UserError:
    """Of a model that llama.cpp would run as another one."""
    return UserError(f"llama.cpp knows no {config.model_type} with {what}; use --format merged")


def place(names: gguf.TensorNameMap, name: str) -> str | None:
    """What llama.cpp calls a weight of transformers; None where it knows none such."""
    return names.get_name(name.replace(".dt_bias", ".dt_proj.bias"), try_suffixes=(".weight", ".bias"))


def tiled_order(config: PreTrainedConfig, rows: int) -> np.ndarray:
    """Which of transformers' rows (see `Architecture.tiled`) is each of llama.cpp's [rows]."""
    import numpy as np

    heads, keys = config.linear_num_value_heads, config.linear_num_key_heads
    of_values = heads if rows == heads else heads * config.linear_value_head_dim
    order = np.arange(rows)
    order[rows - of_values :] = order[rows - of_values :].reshape(keys, heads // keys, -1).swapaxes(0, 1).ravel()
    return order


# Positions.


def _rope(file: GgufFile) -> dict[str, Any]:
    """Positions: plain, or stretched linearly, by YaRN (with its usual settings) or in Llama 3's way."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(file.own("rope.freq_base", 10_000.0))}
    kind = file.get(f"{file.architecture}.rope.scaling.type", "none")
    if kind in ("linear", YARN):
        rope |= {"rope_type": kind, "factor": float(file.own("rope.scaling.factor"))}
        if kind == YARN:
            rope["original_max_position_embeddings"] = file.own("rope.scaling.original_context_length")
    elif kind != "none" or file.has("rope_factors_long.weight"):
        kind = "longrope" if kind == "none" else kind
        raise UserError(f"{file.path} scales its positions by {kind}, which cannot be read; give the original model")
    if file.has("rope_freqs.weight"):
        rope |= _llama3_rope(file, rope["rope_theta"])
    return {"rope_parameters": rope}


def _llama3_rope(file: GgufFile, theta: float) -> dict[str, Any]:
    """Llama 3's stretching, of which a GGUF keeps one divisor for each frequency (convert_hf_to_gguf.py)."""
    import numpy as np
    from transformers import LlamaConfig

    divisors = file.rows(file.tensors["rope_freqs.weight"]).view(np.float32)[0]
    rope = {"rope_type": LLAMA3, "rope_theta": theta, "factor": float(divisors.max()), **LLAMA3_ROPE}
    config = LlamaConfig(head_dim=2 * len(divisors), rope_parameters=rope, max_position_embeddings=1 << 17)
    if not np.allclose(rope_divisors(config), divisors, rtol=1e-3):
        raise UserError(f"{file.path} scales its positions in an unknown way; give the original model")
    return rope


def rope_divisors(config: PreTrainedConfig) -> np.ndarray | None:
    """What the tensor rope_freqs.weight divides each frequency by [half a head], where Llama 3's way stretches them."""
    import numpy as np
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if config.rope_parameters.get("rope_type") != LLAMA3:
        return None
    stretched = ROPE_INIT_FUNCTIONS[LLAMA3](config, "cpu")[0].numpy()
    plain = config.rope_parameters["rope_theta"] ** -(np.arange(len(stretched)) / len(stretched))
    return (plain / stretched).astype(np.float32)


def _rope_keys(config: PreTrainedConfig, rope: dict[str, Any], *others: str, part: float = 1.0) -> dict[str, Any]:
    """Metadata of positions.

    Args:
        others: the ways of stretching them, besides the linear one, that llama.cpp has for the architecture.
        part: of each head that is turned there.
    """
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", *others):
        raise UserError(f"positions scaled by {kind} are not written to GGUF; choose another format")
    if rope.get("partial_rotary_factor", 1.0) != part:
        raise refusal(config, f"{rope.get('partial_rotary_factor', 1.0):g} of each head turned")
    keys = {"rope.freq_base": float(rope["rope_theta"])}
    if kind in ("linear", YARN):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == YARN:
        if changed := [key for key, usual in YARN_ROPE.items() if rope.get(key, usual) not in (None, usual)]:
            raise refusal(config, f"{changed[0]} {rope[changed[0]]}")
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return keys


def _full(config: PreTrainedConfig, *others: str) -> dict[str, Any]:
    """Metadata of a model whose layers all see the whole text; `others`: see `_rope_keys`."""
    if window_of(config) != UNLIMITED:
        raise refusal(config, "a sliding window")
    return _rope_keys(config, config.rope_parameters, YARN, *others)


# The architectures, each with its config and its metadata.


def _llama(file: GgufFile) -> dict[str, Any]:
    more: dict[str, Any] = {"attention_bias": file.has("blk.0.attn_q.bias"), "mlp_bias": file.has("blk.0.ffn_up.bias")}
    if whole_heads := file.own("rope.dimension_count", 0):  # in files without a key_length
        more["head_dim"] = file.own("attention.key_length", whole_heads)
    return _rope(file) | more


def _llama_keys(config: PreTrainedConfig) -> dict[str, Any]:
    return _full(config, LLAMA3)


def _qwen3(file: GgufFile) -> dict[str, Any]:
    return _rope(file) | {"attention_bias": file.has("blk.0.attn_q.bias")}


def _smollm3_keys(config: PreTrainedConfig) -> dict[str, Any]:
    if config.attention_bias or config.mlp_bias:
        raise refusal(config, "biases")
    if config.no_rope_layers != [int((layer + 1) % SMOLLM3_STEP != 0) for layer in range(config.num_hidden_layers)]:
        raise refusal(config, f"other layers without positions than every {SMOLLM3_STEP}th")
    return _full(config)


def _gemma3(file: GgufFile) -> dict[str, Any]:
    """Only the layers that see all are stretched."""
    layers = file.own("block_count")
    shape = layers, file.own("embedding_length"), file.own("attention.head_count"), file.own("attention.key_length")
    local = {"rope_type": "default", "rope_theta": float(file.own("rope.freq_base_swa", GEMMA3_LOCAL_THETA))}
    return {
        "rope_parameters": {FULL: _rope(file)["rope_parameters"], SLIDING: local},
        "sliding_window": file.own("attention.sliding_window"),
        "layer_types": _periodic(SLIDING, layers, file.own("attention.sliding_window_pattern", GEMMA3_PERIOD)),
        "query_pre_attn_scalar": _gemma3_scalar(*shape),
    }


def _gemma3_keys(config: PreTrainedConfig) -> dict[str, Any]:
    layers, rope = config.num_hidden_layers, config.rope_parameters
    if config.attention_bias:
        raise refusal(config, "biases")
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        raise refusal(config, "capped logits")
    if config.use_bidirectional_attention:
        raise refusal(config, "attention to what comes later")
    scalar = _gemma3_scalar(layers, config.hidden_size, config.num_attention_heads, config.head_dim)
    if config.query_pre_attn_scalar != scalar:
        raise refusal(config, f"query_pre_attn_scalar {config.query_pre_attn_scalar} instead of {scalar}")
    if rope[SLIDING].get("rope_type", "default") != "default":
        raise refusal(config, "scaled positions in its sliding layers")
    periods = (GEMMA3_PERIOD, *range(2, layers + 2))
    period = next((p for p in periods if _periodic(SLIDING, layers, p) == config.layer_types), None)
    if period is None:
        raise refusal(config, "this order of sliding layers and layers that see all")
    keys = _rope_keys(config, rope[FULL]) | {
        "rope.freq_base_swa": float(rope[SLIDING]["rope_theta"]),
        "attention.sliding_window": config.sliding_window,
    }
    return keys if period == GEMMA3_PERIOD else keys | {"attention.sliding_window_pattern": period}


def _periodic(kind: str, layers: int, period: int) -> list[str]:
    """Layers of a kind, of which the last of every so many sees all."""
    return [kind if (layer + 1) % period else FULL for layer in range(layers)]


def _gemma3_scalar(layers: int, hidden: int, heads: int, head_dim: int) -> int:
    """Of whose root attention is divided by."""
    return hidden // heads if layers == GEMMA3_LARGEST else head_dim


def _lfm2(file: GgufFile) -> dict[str, Any]:
    per_layer = file.own("attention.head_count_kv")
    return _rope(file) | {
        "layer_types": [FULL if heads else CONV for heads in per_layer],
        "norm_eps": float(f"{file.own('attention.layer_norm_rms_epsilon'):.7g}"),
        "conv_L_cache": file.own("shortconv.l_cache"),
        "block_auto_adjust_ff_dim": False,  # the width in the file is the final one
    }


def _lfm2_keys(config: PreTrainedConfig) -> dict[str, Any]:
    if config.conv_bias:
        raise refusal(config, "biases")
    return _full(config) | {
        "attention.head_count_kv": [config.num_key_value_heads * (kind == FULL) for kind in config.layer_types],
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "shortconv.l_cache": config.conv_L_cache,
    }


def _qwen35(file: GgufFile) -> dict[str, Any]:
    layers, period, heads = file.own("block_count"), file.own("full_attention_interval"), file.own("ssm.time_step_rank")
    rope = _rope(file)["rope_parameters"]
    rope["partial_rotary_factor"] = file.own("rope.dimension_count") / file.own("attention.key_length")
    return {
        "rope_parameters": rope,
        "layer_types": _periodic(LINEAR, layers, period),
        "linear_conv_kernel_dim": file.own("ssm.conv_kernel"),
        "linear_key_head_dim": file.own("ssm.state_size"),
        "linear_value_head_dim": file.own("ssm.inner_size") // heads,
        "linear_num_key_heads": file.own("ssm.group_count"),
        "linear_num_value_heads": heads,
    }


def _qwen35_keys(config: PreTrainedConfig) -> dict[str, Any]:
    layers, rope = config.num_hidden_layers, config.rope_parameters
    periods = (p for p in range(1, layers + 1) if _periodic(LINEAR, layers, p) == config.layer_types)
    if (period := next(periods, None)) is None:
        raise refusal(config, "this order of recurrent layers and layers that see all")
    if config.attention_bias:
        raise refusal(config, "biases")
    if config.linear_key_head_dim != config.linear_value_head_dim:
        raise refusal(config, "value heads of another size than those of keys")
    turned = rope.get("partial_rotary_factor", 1.0)
    pairs = int(config.head_dim * turned) // 2
    return _rope_keys(config, rope, part=turned) | {
        "rope.dimension_count": 2 * pairs,
        "rope.dimension_sections": [*rope.get("mrope_section", [pairs - 2 * (pairs // 3), *[pairs // 3] * 2]), 0],
        "full_attention_interval": period,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
    }


def _phi3(file: GgufFile) -> dict[str, Any]:
    window = file.own("attention.sliding_window", 0)
    part = file.own("rope.dimension_count") / (file.own("embedding_length") // file.own("attention.head_count"))
    rope = _rope(file)["rope_parameters"] | {"partial_rotary_factor": part}
    return {"rope_parameters": rope, "sliding_window": window or None}


def _gpt2(file: GgufFile) -> dict[str, Any]:
    return {
        "n_inner": file.own("feed_forward_length"),
        "layer_norm_epsilon": float(f"{file.own('attention.layer_norm_epsilon'):.7g}"),
    }


# Matrices that stay in float32 whatever type the others have: no matrix product reads them.
WHOLE = re.compile(r"blk\.\d+\.(shortconv\.conv|ssm_conv1d)\.weight|position_embd\.weight")
PAIRED = r"blk\.\d+\.attn_[qk]\.(weight|bias)"
ARCHITECTURES = {
    "llama": Architecture("llama", _llama, _llama_keys, also=("mistral",), rotated=PAIRED),
    "qwen2": Architecture("qwen2", _rope, _full),
    "qwen3": Architecture("qwen3", _qwen3, _full),
    "smollm3": Architecture("smollm3", _rope, _smollm3_keys, rotated=PAIRED),
    "gemma3": Architecture(
        "gemma3_text", _gemma3, _gemma3_keys, activation="gelu_pytorch_tanh", ones_added=r".*norm\.weight"
    ),
    "lfm2": Architecture("lfm2", _lfm2, _lfm2_keys),
    "qwen35": Architecture(
        "qwen3_5_text",
        _qwen35,
        _qwen35_keys,
        ones_added=r"(?!.*ssm_norm).*norm\.weight",
        decays=r"blk\.\d+\.ssm_a",
        tiled=r"blk\.\d+\.(attn_qkv|attn_gate|ssm_alpha|ssm_beta|ssm_conv1d|ssm_dt|ssm_a)(\.weight|\.bias)?",
        tiled_columns=r"blk\.\d+\.ssm_out\.weight",
    ),
    "phi3": Architecture("phi3", _phi3),
    "gpt2": Architecture("gpt2", _gpt2, transposed=r"blk\.\d+\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight"),
}
