"""GGUF files for llama.cpp and Ollama: weights, tokenizer and chat template of a plain model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.cli import UserError
from common.data import task_record
from common.export.gguf_quants import VALUES, Mixture, is_70b, quantize
from common.export.gguf_vocabulary import add_tokenizer
from common.export.merge import Checkpoint, check_architecture, empty_model, places_in
from common.models import gguf_architectures, gguf_file
from common.models.batching import head_size
from common.models.gguf_architectures import Architecture
from common.models.gguf_file import TASK_KEY, UNPROVEN_KEY
from common.models.loading import load_config

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

VALUE_WEIGHTS = tuple(f".{part}.weight" for part in VALUES)
TOWER = "language_model."  # in the names of weights beside which there are others than a language model's
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
    check_architecture(folder, form, ARCHITECTURES, text=True)
    own_keys(load_config(str(folder)))


def text_names(checkpoint: Checkpoint, config: PreTrainedConfig) -> dict[str, str]:
    """{name of a tensor in a checkpoint: of the weight in its language model}, without what that does not read: a
    vision tower, heads for further tokens."""
    places = places_in(empty_model(checkpoint.folder, trust_remote_code=False), checkpoint.shapes)
    names = {name: place.replace(TOWER, "") for name, place in places.items()}
    read = gguf_file.empty_model(config).state_dict().keys()
    return {name: weight for name, weight in names.items() if weight in read}


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

    config = load_config(str(merged))
    checkpoint = Checkpoint(merged)
    weights = text_names(checkpoint, config)
    plan = planned(checkpoint, config, quant, weights)
    importance = {name.replace(TOWER, ""): matters for name, matters in (importance or {}).items()}
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
        matters = importance.get(weights[name])
        if matters is not None:
            matters = columns_as_llama_cpp(target, matters, config)
        writer.add_tensor(target, quantize(array, kind, matters), raw_dtype=kind)
    if (divisors := gguf_architectures.rope_divisors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def planned(
    checkpoint: Checkpoint, config: PreTrainedConfig, quant: str, weights: Mapping[str, str]
) -> list[tuple[str, str, gguf.GGMLQuantizationType]]:
    """(name in transformers, name in GGUF, what it is stored in) of each tensor of a file, in its order.

    Args:
        weights: see `text_names`.

    Raises:
        UserError: a weight that the architecture does not have there.
    """
    names = tensor_names(config)
    targets = {}
    for name, weight in weights.items():
        if weight == "lm_head.weight" and config.tie_word_embeddings:
            continue
        targets[name] = gguf_architectures.place(names, weight)
        if targets[name] is None:
            raise UserError(f"{name} has no place in a GGUF of {config.model_type}; choose another format")
    layers, heads, kv_heads = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    mixture = Mixture(
        quant,
        layers,
        tied="output.weight" not in targets.values(),
        is_70b=is_70b(architecture_of(config), layers, heads, kv_heads),
        values=sum(target.endswith(VALUE_WEIGHTS) for target in targets.values()),
    )
    ordered = sorted(targets, key=_layer_first)
    return [(name, targets[name], mixture.kind_of(targets[name], checkpoint.shapes[name])) for name in ordered]


def predicted_bytes(folder: str | Path, quant: str) -> int:
    """Of the file that `write` would make of a plain model, or of the base of an adapter; without its metadata."""
    import gguf

    checkpoint, config = Checkpoint(folder), load_config(str(folder))
    divisors = gguf_architectures.rope_divisors(config)
    total = 0 if divisors is None else divisors.nbytes
    for name, _, kind in planned(checkpoint, config, quant, text_names(checkpoint, config)):
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        total += math.prod(checkpoint.shapes[name]) // numbers * size
    return total


def _layer_first(name: str) -> tuple[int, str]:
    """By layer, whatever the order of the files: a mixture depends on it."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return (numbers[0] if numbers else -1, name)


def as_llama_cpp(target: str, array: np.ndarray, config: PreTrainedConfig) -> np.ndarray:
    """A tensor as llama.cpp has it.

    Args:
        target: its name in GGUF.
        array: [out, ...] in transformers, float32.
    """
    facts = _facts_of(config)
    if re.fullmatch(facts.ones_added, target):
        array = array + 1
    if re.fullmatch(facts.decays, target):
        array = -np.exp(array)
    return columns_as_llama_cpp(target, rows_as_llama_cpp(target, array, config), config)


def rows_as_llama_cpp(target: str, array: np.ndarray, config: PreTrainedConfig) -> np.ndarray:
    """A tensor, or the B of a LoRA on it [out, ...], with llama.cpp's order of rows."""
    facts = _facts_of(config)
    if re.fullmatch(facts.rotated, target):
        heads = config.num_attention_heads if ".attn_q." in target else config.num_key_value_heads
        array = _interleave(array, heads)
    if re.fullmatch(facts.tiled, target):
        array = array[gguf_architectures.tiled_order(config, len(array))]
    return array[:, 0] if array.ndim == 3 else array  # a convolution of each column alone: [columns, 1, kernel]


def columns_as_llama_cpp(target: str, array: np.ndarray, config: PreTrainedConfig) -> np.ndarray:
    """A tensor, the A of a LoRA on it or what its columns matter [..., in], with llama.cpp's order of columns."""
    if re.fullmatch(_facts_of(config).tiled_columns, target):
        array = array[..., gguf_architectures.tiled_order(config, array.shape[-1])]
    return array


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
