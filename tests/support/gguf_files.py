"""Small GGUF files of many architectures, written as llama.cpp's converter writes them, and llama.cpp to read them."""

from __future__ import annotations

import json
import math
import re
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from support.families import WIDER

TOKENS = {"vocab_size": 288, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SHAPE = WIDER | TOKENS | {"intermediate_size": 128}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # architecture of the file: (model_type, more of its config)
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 7, "sliding_window": 8},
    ),
    "lfm2": ("lfm2", {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]}),
    "qwen35": (
        "qwen3_5_text",
        {
            "num_hidden_layers": 4,
            **{"head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 6},
        },
    ),
    "phi3": ("phi3", {"num_key_value_heads": 4, "tie_word_embeddings": False, "sliding_window": None}),
    "gpt2": ("gpt2", {"n_inner": 128}),
}
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ANSWER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATE = "{% for m in messages %}" + TURN + "{% endfor %}" + ANSWER
SPECIAL = ["<s>", "<|im_end|>", "<pad>", "<|im_start|>", "<think>"]


def build(family: str, **changes: Any) -> torch.nn.Module:
    """A model of random weights, large enough that its answers differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, more = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SHAPE | more | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.08 + (parameter.ndim == 1 and "gemma" not in model_type))
    return model.eval()


def write(
    model: torch.nn.Module,
    family: str,
    path: Path,
    kind: str = "F32",
    *,
    keys: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """The model as a GGUF whose matrices are of a kind (F32, F16, Q8_0, ...).

    Args:
        keys: metadata that replaces the usual, None to leave one out.
        extra: tensors that are no weights of the model.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, (keys or {}).get("general.architecture", family))
    for key, value in (_shape(config, family) | _tokenizer(config) | dict(keys or {})).items():
        if value is not None and key != "general.architecture":
            _add(writer, key, value)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(name.replace("dt_bias", "dt_proj.bias"), try_suffixes=(".weight", ".bias")) or name
        array = _as_llama_cpp(family, target, weight.float().numpy(), config)
        whole = (
            array.ndim == 1 or "conv.conv" in target or "conv1d" in target or target == "position_embd.weight"
        )  # as its converter does
        number_type = gguf.GGMLQuantizationType["F32" if whole else kind]
        writer.add_tensor(target, gguf.quants.quantize(np.ascontiguousarray(array), number_type), raw_dtype=number_type)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_llama_cpp(family: str, target: str, array: np.ndarray, config: Any) -> np.ndarray:
    if family in ("llama", "smollm3") and re.search(r"attn_[qk]\.", target):
        heads = config.num_attention_heads if "attn_q" in target else config.num_key_value_heads
        array = array.reshape(heads, 2, len(array) // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
    if family == "gemma3" and target.endswith("norm.weight"):
        array = array + 1
    if family == "qwen35":
        array = _qwen35(target, array, config)
    if array.ndim == 3:
        array = array[:, 0]
    if family == "gpt2" and re.search(r"(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", target):
        array = array.T
    return array


def _qwen35(target: str, array: np.ndarray, config: Any) -> np.ndarray:
    """Value heads one of each key in turn, decays as they are multiplied with, norms with 1 added."""
    keys, heads, size = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim
    turn = [key * (heads // keys) + number for number in range(heads // keys) for key in range(keys)]
    part = target.split(".")[2] if target.startswith("blk.") else target
    if part in ("attn_qkv", "ssm_conv1d"):
        apart = [array[(2 * keys + head) * size :][:size] for head in turn]
        return np.concatenate([array[: 2 * keys * size], *apart])
    if part == "attn_gate":
        return np.concatenate([array[head * size :][:size] for head in turn])
    if part == "ssm_out":
        return np.concatenate([array[:, head * size :][:, :size] for head in turn], axis=1)
    if part in ("ssm_alpha", "ssm_beta", "ssm_dt", "ssm_a"):
        array = array[turn]
        return -np.exp(array) if part == "ssm_a" else array
    return array + 1 if "norm" in target and part != "ssm_norm" else array


def _shape(config: Any, family: str) -> dict[str, Any]:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", None) or config.n_inner,
        "attention.head_count": heads,
    }
    if family == "gpt2":
        keys["attention.layer_norm_epsilon"] = float(config.layer_norm_epsilon)
    else:
        rope = config.rope_parameters
        keys |= {
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": float(getattr(config, "rms_norm_eps", None) or config.norm_eps),
            "rope.freq_base": float((rope.get("full_attention") or rope)["rope_theta"]),
            "rope.dimension_count": head_dim,
        }
    if family in ("qwen3", "qwen35", "gemma3"):
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if family == "gemma3":
        keys["attention.sliding_window"] = config.sliding_window
    if family == "lfm2":
        per_layer = [config.num_key_value_heads * (kind == "full_attention") for kind in config.layer_types]
        keys |= {"attention.head_count_kv": per_layer, "shortconv.l_cache": config.conv_L_cache}
        keys["vocab_size"] = config.vocab_size
    if family == "qwen35":
        inner = config.linear_num_value_heads * config.linear_value_head_dim
        keys |= {"full_attention_interval": 4, "rope.dimension_count": 8, "rope.dimension_sections": [2, 1, 1, 0]}
        keys |= {"ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.group_count": config.linear_num_key_heads}
        keys |= {"ssm.time_step_rank": config.linear_num_value_heads, "ssm.inner_size": inner}
    return {f"{family}.{key}": value for key, value in keys.items()}


def byte_tokens() -> list[str]:
    """The 256 bytes as a byte-level tokenizer writes them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def _tokenizer(config: Any) -> dict[str, Any]:
    """Five special tokens, the bytes, some merges, and padding up to the embedding's rows."""
    merges = ["t h", "Ġ t", "Ġt h", "1 2", "Ġ Ġ", "a n", "e r", "Ċ Ċ", "o n", "i n", "Ġ a"]
    tokens = [*SPECIAL, *byte_tokens(), *(merge.replace(" ", "") for merge in merges)]
    kinds = [3, 3, 3, 3, 4] + [1] * (len(tokens) - len(SPECIAL))
    spare = config.vocab_size - len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens + [f"[PAD{len(tokens) + i}]" for i in range(spare)],
        "tokenizer.ggml.token_type": kinds + [5] * spare,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


class LlamaCpp:
    """A GGUF in llama.cpp's server, asked over HTTP."""

    def __init__(self, path: Path | str, context: int = 512) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = context, 1, False, -1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        self._server = xllamacpp.Server(parameters)

    def ask(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Token ids, with special tokens where their names stand in the text; `special`: with BOS and EOS."""
        return self.ask("/tokenize", {"content": text, "add_special": special, "parse_special": True})["tokens"]

    def next_log_probabilities(self, ids: Sequence[int], n: int) -> dict[int, float]:
        """Log-probabilities of the n likeliest next tokens."""
        body = {"prompt": list(ids), "n_predict": 1, "n_probs": n, "temperature": 0.0, "cache_prompt": False}
        (first,) = self.ask("/completion", body)["completion_probabilities"]
        return {each["id"]: each["logprob"] for each in first["top_logprobs"] if math.isfinite(each["logprob"])}
