"""GGUF files for llama.cpp and Ollama: weights, tokenizer and chat template of a plain model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import UserError
from common.data import task_record
from common.export.gguf_quants import Mixture, is_70b, quantize
from common.export.gguf_vocabulary import add_tokenizer
from common.export.merge import Checkpoint, check_architecture
from common.models import gguf_architectures
from common.models.batching import head_size
from common.models.gguf_architectures import Architecture
from common.models.gguf_file import TASK_KEY, UNPROVEN_KEY

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# transformers' model type: llama.cpp's architecture
ARCHITECTURES = {
    kind: name
    for name, facts in gguf_architectures.ARCHITECTURES.items()
    if facts.keys
    for kind in (facts.model_type, *facts.also)
}


def file_name(quant: str) -> str:
    """The name of the model's file."""
    return f"model-{quant}.gguf"


def architecture_of(config: PreTrainedConfig) -> str:
    """llama.cpp's name for it."""
    return ARCHITECTURES[config.model_type]


def check(folder: Path, form: str) -> None:
    """Refuse a model that has no equal in llama.cpp, by its config alone.

    Args:
        form: as it is called by the user, for the message.

    Raises:
        UserError: of another architecture, or one of these with something that llama.cpp's does not have.
    """
    from transformers import AutoConfig

    check_architecture(folder, form, ARCHITECTURES)
    own_keys(AutoConfig.from_pretrained(folder))


def own_keys(config: PreTrainedConfig) -> dict[str, Any]:
    """The metadata that not all architectures have, without the architecture's name.

    Raises:
        UserError: the model has something that llama.cpp's architecture does not have.
    """
    facts = _facts_of(config)
    found = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None) or facts.activation
    if found != facts.activation:
        raise gguf_architectures.refusal(config, f"{found} for an activation")
    return facts.keys(config)


def _facts_of(config: PreTrainedConfig) -> Architecture:
    return gguf_architectures.ARCHITECTURES[architecture_of(config)]


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
        quant: one of `formats.QUANTS`.
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
    plan = planned(checkpoint, config, quant)
    writer = gguf.GGUFWriter(path, architecture_of(config), use_temp_file=True)  # or all weights are in memory at once
    width = next(checkpoint.shapes[name][0] for name, target, _ in plan if target == "blk.0.ffn_up.weight")
    for key, value in (shape_keys(config) | {"feed_forward_length": width} | own_keys(config)).items():
        _add(writer, f"{architecture_of(config)}.{key}", value)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quant}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if task:
        writer.add_string(TASK_KEY, task_record.text_of(task))
    if unproven:
        writer.add_bool(UNPROVEN_KEY, True)
    add_tokenizer(writer, config, tokenizer, stops)
    for name, target, kind in plan:
        array = as_llama_cpp(target, checkpoint.read(name).to(torch.float32).numpy(), config)
        writer.add_tensor(target, quantize(array, kind, (importance or {}).get(name)), raw_dtype=kind)
    if (divisors := gguf_architectures.rope_divisors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
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
    mixture = Mixture(
        quant,
        layers,
        tied="output.weight" not in targets.values(),
        is_70b=is_70b(architecture_of(config), layers, heads, kv_heads),
        values=sum(target.endswith(".attn_v.weight") for target in targets.values()),
    )
    ordered = sorted(targets, key=_layer_first)
    return [(name, targets[name], mixture.kind_of(targets[name], checkpoint.shapes[name])) for name in ordered]


def predicted_bytes(folder: str | Path, quant: str) -> int:
    """Of the file that `write` would make of a plain model, or of the base of an adapter; without its metadata."""
    import gguf
    from transformers import AutoConfig

    checkpoint, config = Checkpoint(folder), AutoConfig.from_pretrained(folder)
    divisors = gguf_architectures.rope_divisors(config)
    total = 0 if divisors is None else divisors.nbytes
    for name, _, kind in planned(checkpoint, config, quant):
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        total += math.prod(checkpoint.shapes[name]) // numbers * size
    return total


def _layer_first(name: str) -> tuple[int, str]:
    """By layer, whatever the order of the files: a mixture depends on it."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return (numbers[0] if numbers else -1, name)


def as_llama_cpp(target: str, array: np.ndarray, config: PreTrainedConfig) -> np.ndarray:
    """A tensor, or the B of a LoRA on it, as llama.cpp has it.

    Args:
        target: its name in GGUF.
        array: [out, ...] in transformers, float32.
    """
    facts = _facts_of(config)
    if re.fullmatch(facts.ones_added, target):
        array = array + 1
    if re.fullmatch(facts.rotated, target):
        heads = config.num_attention_heads if ".attn_q." in target else config.num_key_value_heads
        array = _interleave(array, heads)
    return array[:, 0] if array.ndim == 3 else array  # a convolution of each column alone: [columns, 1, kernel]


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of a head, transformers those half a head apart."""
    rows = len(weight)
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def shape_keys(config: PreTrainedConfig) -> dict[str, Any]:
    """The metadata that all architectures have, without the architecture's name."""
    head_dim = head_size(config)
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(getattr(config, "rms_norm_eps", 0)),  # LFM2 has its own
        "rope.dimension_count": head_dim,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """In the types that llama.cpp expects: 32 bits each."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)
