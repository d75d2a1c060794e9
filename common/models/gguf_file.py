"""A GGUF file as a transformers model: its header, its config and its weights, de-quantised.

The mirror of `export.gguf_writer`, for more architectures. A file is read strictly: every tensor in it must have its
place in the model, and every weight of the model must be in it.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import UserError
from common.files import grant, write_json

if TYPE_CHECKING:
    import gguf
    import numpy as np
    import torch
    from transformers import PreTrainedConfig

MAGIC = b"GGUF"
TASK_KEY = "distill_slm.task"  # metadata of our own exports: `data.task_record` as JSON
UNPROVEN_KEY = "distill_slm.unproven"  # true: exported without a proof
TEXT, LIST = 8, 9  # types of a metadata value; the others are numbers, by struct's codes
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
SHARD_BYTES = 2_000_000_000  # of one file of weights, and so about half of the memory that a conversion takes
CHUNK_NUMBERS = 1 << 24  # de-quantised at a time
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture becomes a transformers model.

    Attributes:
        model_type: of transformers.
        config: from the file to the keys of a config that not all architectures have.
        rotated: tensors whose rows llama.cpp orders by rotated pairs, transformers by halves of a head.
        transposed: tensors stored [out, in] that transformers keeps as [in, out].
        ones_added: tensors that llama.cpp stores with 1 added to each number.
    """

    model_type: str
    config: Callable[[GgufFile], dict[str, Any]] = lambda file: {}
    rotated: str = r"(?!)"
    transposed: str = r"(?!)"
    ones_added: str = r"(?!)"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file: where it lies and how it is stored.

    Attributes:
        kind: a `gguf.GGMLQuantizationType`.
        shape: as torch has it, the side whose neighbours lie together last.
        offset, size: of its bytes in the file.
    """

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


class GgufFile:
    """The header of a GGUF file; weights are read when they are asked for.

    The gguf package's own reader makes an array of every string, which takes ten seconds for a vocabulary.

    Raises:
        UserError: no GGUF, cut short, a part of a split one, or of an architecture that cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as handle:
                is_gguf = handle.read(len(MAGIC)) == MAGIC
                self._bytes = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) if is_gguf else b""
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from error
        if not is_gguf:
            raise UserError(f"{path} is not a GGUF file; give one that Ollama or llama.cpp can run, or a model folder")
        self.values: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        try:
            self._read_header()
        except (struct.error, IndexError, KeyError, ValueError) as error:
            raise UserError(f"{path} is cut short or damaged; download or copy it again") from error
        end = max((tensor.offset + tensor.size for tensor in self.tensors.values()), default=0)
        if end > len(self._bytes):
            raise UserError(f"{path} is cut short ({len(self._bytes):,} of {end:,} bytes); download or copy it again")
        self._check()

    def _check(self) -> None:
        parts, kind = self.get("split.count", 1), self.get("general.type", "model")
        if parts > 1:
            raise UserError(
                f"{self.path} is one of {parts} parts of a GGUF; join them (llama-gguf-split --merge) first"
            )
        self.architecture = str(self.get("general.architecture"))
        if kind == "adapter":
            raise UserError(
                f"{self.path} is a LoRA adapter alone, which is put on no GGUF here but by llama.cpp's --lora and "
                "Ollama; give the run that it was exported from, or a GGUF of the whole (--format gguf)"
            )
        if self.architecture not in ARCHITECTURES or kind != "model":
            what = f"of the architecture {self.architecture}" if kind == "model" else f"no model but of type {kind}"
            raise UserError(
                f"{self.path} is {what}, which cannot be read; GGUF files can be of {', '.join(ARCHITECTURES)}, "
                "other models give as a folder or a Hub id"
            )

    def _read_header(self) -> None:
        """Keys and tensors (github.com/ggml-org/ggml/blob/master/docs/gguf.md); a version of other bytes is damage."""
        import gguf

        version, tensors, keys = struct.unpack_from("<IQQ", self._bytes, len(MAGIC))
        if version not in (2, 3):
            raise ValueError(version)
        self._at = 24
        for _ in range(keys):
            key = self._text()
            self.values[key] = self._value(self._number("I"))
        described = []
        for _ in range(tensors):
            name = self._text()
            shape = tuple(reversed([self._number("Q") for _ in range(self._number("I"))]))
            described.append((name, shape, gguf.GGMLQuantizationType(self._number("I")), self._number("Q")))
        alignment = self.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in described:
            numbers, size = gguf.GGML_QUANT_SIZES[kind]
            self.tensors[name] = Tensor(kind, shape, start + offset, math.prod(shape) // numbers * size)

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._bytes, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _text(self) -> str:
        length = self._number("Q")
        raw = self._bytes[self._at : self._at + length]
        if len(raw) < length:
            raise ValueError(length)
        self._at += length
        return raw.decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == TEXT:
            return self._text()
        if kind != LIST:
            return self._number(NUMBERS[kind])
        kind, count = self._number("I"), self._number("Q")
        if kind in (TEXT, LIST):
            return [self._value(kind) for _ in range(count)]
        values = struct.unpack_from(f"<{count}{NUMBERS[kind]}", self._bytes, self._at)
        self._at += struct.calcsize(f"<{count}{NUMBERS[kind]}")
        return list(values)

    def rows(self, tensor: Tensor) -> np.ndarray:
        """The bytes of a tensor [rows, bytes of a row], as they lie in the file."""
        import numpy as np

        raw = np.frombuffer(self._bytes, dtype=np.uint8, count=tensor.size, offset=tensor.offset)
        return raw.reshape(tensor.shape[0] if len(tensor.shape) > 1 else 1, -1)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key."""
        return self.values.get(key, default)

    def own(self, key: str, default: Any = None) -> Any:
        """The value of a key under the architecture's name; without a default it has to be there."""
        value = self.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise UserError(f"{self.path} lacks {self.architecture}.{key}; give a GGUF that llama.cpp can run")
        return value

    def has(self, tensor: str) -> bool:
        """Whether there is a tensor of that name."""
        return tensor in self.tensors

    @property
    def dtype(self) -> str:
        """What the weights are kept in: the type of the file's matrices; bfloat16 where they are quantised."""
        kinds = {tensor.kind.name for tensor in self.tensors.values() if len(tensor.shape) > 1}
        if not kinds <= FLOATS.keys():
            return "bfloat16"
        return FLOATS[kinds.pop()] if len(kinds) == 1 else "float32"


def read_config(file: GgufFile) -> PreTrainedConfig:
    """The config of the model in a file."""
    from transformers import AutoConfig

    architecture = ARCHITECTURES[file.architecture]
    heads, hidden = file.own("attention.head_count"), file.own("embedding_length")
    kv_heads = file.own("attention.head_count_kv", heads)
    config = {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": file.own("feed_forward_length"),
        "num_hidden_layers": file.own("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": max(kv_heads) if isinstance(kv_heads, list) else kv_heads,
        "head_dim": file.own("attention.key_length", hidden // heads),
        "max_position_embeddings": file.own("context_length"),
        "rms_norm_eps": file.own("attention.layer_norm_rms_epsilon", 0.0),
        "tie_word_embeddings": not file.has("output.weight"),
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
        "dtype": file.dtype,
    }
    for name, value in config.items():  # float32 numbers of the file as a person would write them: 1e-05
        if isinstance(value, float):
            config[name] = float(f"{value:.7g}")
    return AutoConfig.for_model(architecture.model_type, **config | architecture.config(file))


def _rope(file: GgufFile) -> dict[str, Any]:
    """Positions: plain, or stretched linearly, by YaRN or in Llama 3's way."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(file.own("rope.freq_base", 10_000.0))}
    kind = file.get(f"{file.architecture}.rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": float(file.own("rope.scaling.factor"))}
        if kind == "yarn":
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
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    divisors = file.rows(file.tensors["rope_freqs.weight"]).view(np.float32)[0]
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": float(divisors.max()), **LLAMA3_ROPE}
    config = LlamaConfig(head_dim=2 * len(divisors), rope_parameters=rope, max_position_embeddings=1 << 17)
    plain = theta ** -(np.arange(len(divisors)) / len(divisors))
    if not np.allclose(plain / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy(), divisors, rtol=1e-3):
        raise UserError(f"{file.path} scales its positions in an unknown way; give the original model")
    return rope


def _llama(file: GgufFile) -> dict[str, Any]:
    more: dict[str, Any] = {"attention_bias": file.has("blk.0.attn_q.bias"), "mlp_bias": file.has("blk.0.ffn_up.bias")}
    if whole_heads := file.own("rope.dimension_count", 0):  # in files without a key_length
        more["head_dim"] = file.own("attention.key_length", whole_heads)
    return _rope(file) | more


def _qwen3(file: GgufFile) -> dict[str, Any]:
    return _rope(file) | {"attention_bias": file.has("blk.0.attn_q.bias")}


def _gemma3(file: GgufFile) -> dict[str, Any]:
    """Only the layers that see all are stretched, and the largest model scales attention by its own width."""
    rope = _rope(file)["rope_parameters"]
    largest = file.own("block_count") == 62  # as llama.cpp tells it
    head_dim, heads = file.own("attention.key_length"), file.own("attention.head_count")
    local = {"rope_type": "default", "rope_theta": 10_000.0}
    return {
        "rope_parameters": {"full_attention": rope, "sliding_attention": local},
        "sliding_window": file.own("attention.sliding_window"),
        "query_pre_attn_scalar": file.own("embedding_length") // heads if largest else head_dim,
    }


def _lfm2(file: GgufFile) -> dict[str, Any]:
    per_layer = file.own("attention.head_count_kv")
    return _rope(file) | {
        "layer_types": ["full_attention" if heads else "conv" for heads in per_layer],
        "norm_eps": float(f"{file.own('attention.layer_norm_rms_epsilon'):.7g}"),
        "conv_L_cache": file.own("shortconv.l_cache"),
        "block_auto_adjust_ff_dim": False,  # the width in the file is the final one
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


PAIRED = r"blk\.\d+\.attn_[qk]\.(weight|bias)"
ARCHITECTURES = {
    "llama": Architecture("llama", _llama, rotated=PAIRED),
    "qwen2": Architecture("qwen2", _rope),
    "qwen3": Architecture("qwen3", _qwen3),
    "smollm3": Architecture("smollm3", _rope, rotated=PAIRED),
    "gemma3": Architecture("gemma3_text", _gemma3, ones_added=r".*norm\.weight"),
    "lfm2": Architecture("lfm2", _lfm2),
    "phi3": Architecture("phi3", _phi3),
    "gpt2": Architecture("gpt2", _gpt2, transposed=r"blk\.\d+\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight"),
}
NO_WEIGHTS = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight|blk\.\d+\.rope_freqs\.weight")


def empty_model(config: PreTrainedConfig) -> torch.nn.Module:
    """The model of a config, without its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def tensor_names(file: GgufFile, config: PreTrainedConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name of a weight in transformers: (its tensor in the file, its shape in transformers)}.

    Raises:
        UserError: the file has tensors without a place, or lacks some.
    """
    import gguf

    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    places = gguf.get_tensor_name_map(key, config.num_hidden_layers)
    head = "lm_head.weight" if config.tie_word_embeddings else None
    names = {
        name: (places.get_name(name, try_suffixes=(".weight", ".bias")) or name, tuple(weight.shape))
        for name, weight in empty_model(config).state_dict().items()
        if name != head
    }
    wanted = {target for target, _ in names.values()}
    if missing := sorted(wanted - file.tensors.keys()):
        raise UserError(f"{file.path} lacks {missing[0]}, which its architecture has; give a GGUF of the whole model")
    left = sorted(name for name in file.tensors.keys() - wanted if not NO_WEIGHTS.fullmatch(name))
    if left:
        raise UserError(f"{file.path} holds {left[0]}, which {config.model_type} has no place for; give the original")
    return names


def read_weight(file: GgufFile, name: str, shape: tuple[int, ...], config: PreTrainedConfig) -> torch.Tensor:
    """One weight as transformers has it, de-quantised, in the file's `dtype`.

    Args:
        name: of the tensor in the file.
        shape: in transformers.
    """
    import torch

    architecture, tensor, dtype = ARCHITECTURES[file.architecture], file.tensors[name], getattr(torch, file.dtype)
    rows, size = file.rows(tensor), tensor.shape
    step = max(1, CHUNK_NUMBERS // math.prod(size[1:]))
    pieces = []
    try:
        for start in range(0, len(rows), step):  # float32 needs several times the memory of the result
            piece = torch.from_numpy(_numbers(rows[start : start + step], tensor.kind))
            if re.fullmatch(architecture.ones_added, name):
                piece = piece - 1
            pieces.append(piece.to(dtype))
    except NotImplementedError as error:
        raise UserError(f"{file.path} is quantised as {tensor.kind.name}, which cannot be read") from error
    weight = torch.cat(pieces).reshape(size)
    if re.fullmatch(architecture.rotated, name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        weight = weight.reshape(heads, size[0] // heads // 2, 2, *size[1:]).transpose(1, 2).reshape(size)
    if re.fullmatch(architecture.transposed, name):
        weight = weight.T
    if weight.numel() != math.prod(shape) or (weight.ndim == len(shape) and tuple(weight.shape) != shape):
        raise UserError(f"{file.path}: {name} is {list(size)}, not {list(shape)} as its header says; give another GGUF")
    return weight.reshape(shape).contiguous()


def _numbers(rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The float32 numbers that some rows' bytes stand for."""
    import gguf
    import numpy as np

    plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    return rows.view(plain).astype(np.float32) if plain else gguf.quants.dequantize(rows, kind)


def write_weights(file: GgufFile, config: PreTrainedConfig, folder: Path) -> None:
    """Write the model's weights into a folder, in shards of which one is in memory at a time."""
    import torch
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    names, width = tensor_names(file, config), getattr(torch, file.dtype).itemsize
    plan = split_state_dict_into_shards_factory(
        {name: math.prod(shape) for name, (_, shape) in names.items()},
        get_storage_size=lambda numbers: numbers * width,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for target, members in plan.filename_to_tensors.items():
        shard = {name: read_weight(file, *names[name], config) for name in members}
        save_file(shard, folder / target, metadata={"format": "pt"})
        grant(folder / target)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def size_of_weights(file: GgufFile) -> int:
    """Bytes of the model folder's weights."""
    width = {"float32": 4}.get(file.dtype, 2)
    return sum(math.prod(tensor.shape) for tensor in file.tensors.values()) * width
