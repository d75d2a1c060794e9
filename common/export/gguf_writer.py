"""GGUF files for llama.cpp and Ollama: weights, tokenizer and chat template of a plain model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import UserError
from common.data import task_record
from common.export.gguf_quants import Mixture, is_70b, quantize
from common.export.gguf_vocabulary import add_tokenizer
from common.export.merge import Checkpoint
from common.models.gguf_file import TASK_KEY, UNPROVEN_KEY

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# transformers' model type: llama.cpp's architecture
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def file_name(quant: str) -> str:
    """The name of the model's file."""
    return f"model-{quant}.gguf"


def architecture_of(config: PreTrainedConfig) -> str:
    """llama.cpp's name for it."""
    return ARCHITECTURES[config.model_type]


def tensor_names(config: PreTrainedConfig) -> gguf.TensorNameMap:
    """What llama.cpp calls the tensors of a model."""
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture_of(config))
    return gguf.get_tensor_name_map(architecture, config.num_hidden_layers)


def write(
    merged: str | Path,
    path: Path,
    quant: str,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    importance: Mapping[str, np.ndarray] | None = None,
    task: task_record.Record | None = None,
    unproven: bool = False,
) -> None:
    """Write the plain model in `merged` as one GGUF file.

    Args:
        quant: one of `gguf_quants.QUANTS`.
        stops: every token that ends an answer, EOS first.
        importance: of the columns of weights, by transformers' names (see `gguf_quants.quantize`).
        task: what the model was trained for, which the file then tells wherever it goes.
        unproven: nobody will compare it with the run, which it tells likewise.

    Raises:
        UserError: a tokenizer that llama.cpp has no equal of, or a weight that the architecture does not have there.
    """
    import gguf
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(merged)
    checkpoint = Checkpoint(merged)
    writer = gguf.GGUFWriter(path, architecture_of(config), use_temp_file=True)  # or all weights are in memory at once
    _add_shape(writer, config, quant)
    if task:
        writer.add_string(TASK_KEY, task_record.text_of(task))
    if unproven:
        writer.add_bool(UNPROVEN_KEY, True)
    add_tokenizer(writer, config, tokenizer, stops)
    for name, target, kind in planned(checkpoint, config, quant):
        array = as_llama_cpp(name, checkpoint.read(name).to(torch.float32).numpy(), config)
        writer.add_tensor(target, quantize(array, kind, (importance or {}).get(name)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def planned(
    checkpoint: Checkpoint, config: PreTrainedConfig, quant: str
) -> list[tuple[str, str, gguf.GGMLQuantizationType]]:
    """(name in transformers, name in GGUF, what it is stored in) of each tensor of a file, in its order.

    Raises:
        UserError: a weight that the architecture does not have there.
    """
    names = tensor_names(config)
    targets = {}
    for name in checkpoint.shapes:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        targets[name] = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if targets[name] is None:
            raise UserError(f"{name} has no place in a GGUF of {config.model_type}; choose another format")
    layers, heads, kv_heads = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    large = is_70b(architecture_of(config), layers, heads, kv_heads)
    mixture = Mixture(quant, layers, tied="output.weight" not in targets.values(), is_70b=large)
    ordered = sorted(targets, key=_layer_first)
    return [(name, targets[name], mixture.kind_of(targets[name], checkpoint.shapes[name])) for name in ordered]


def predicted_bytes(folder: str | Path, quant: str) -> int:
    """Of the file that `write` would make of a plain model, or of the base of an adapter; without its metadata."""
    import gguf
    from transformers import AutoConfig

    checkpoint = Checkpoint(folder)
    total = 0
    for name, _, kind in planned(checkpoint, AutoConfig.from_pretrained(folder), quant):
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        total += math.prod(checkpoint.shapes[name]) // numbers * size
    return total


def _layer_first(name: str) -> tuple[int, str]:
    """By layer, whatever the order of the files: a mixture depends on it."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return (numbers[0] if numbers else -1, name)


def as_llama_cpp(name: str, rows: np.ndarray, config: PreTrainedConfig) -> np.ndarray:
    """A weight (or the B of a LoRA) [out, ...] with its rows in llama.cpp's order."""
    if architecture_of(config) != "llama":
        return rows
    if ".q_proj." in name:
        return _interleave(rows, config.num_attention_heads)
    return _interleave(rows, config.num_key_value_heads) if ".k_proj." in name else rows


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of a head, transformers those half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _add_shape(writer: gguf.GGUFWriter, config: PreTrainedConfig, quant: str) -> None:
    import gguf

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"positions scaled by {rope['rope_type']} are not written to GGUF; choose another format")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quant}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
