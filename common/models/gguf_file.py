"""A GGUF file as a transformers model: its header, its config and its weights, de-quantised.

The mirror of `export.gguf_writer`, for more architectures. A file is read strictly: every tensor in it must have its
place in the model, and every weight of the model must be in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import UserError, reason
from common.files import grant, write_json
from common.models.gguf_architectures import ARCHITECTURES, WHOLE, place, tiled_order

if TYPE_CHECKING:
    import gguf
    import numpy as np
    import torch
    from transformers import PreTrainedConfig

MAGIC = b"GGUF"
TASK_KEY = "distill_slm.task"  # metadata of our own exports: `data.task_record` as JSON
UNPROVEN_KEY = "distill_slm.unproven"  # true: exported without a proof
STOPS_KEY = "distill_slm.stop_token_ids"  # all that end an answer, where some have no place
TEXT, LIST = 8, 9  # types of a metadata value; the others are numbers, by struct's codes
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
SHARD_BYTES = 2_000_000_000  # of one file of weights, and so about half of the memory that a conversion takes
CHUNK_NUMBERS = 1 << 24  # de-quantised at a time
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NO_WEIGHTS = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight|blk\.\d+\.rope_freqs\.weight")


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
        except (struct.error, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
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
            if not shape or shape[-1] % numbers:
                raise ValueError(name)
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
        matrices = {name: tensor for name, tensor in self.tensors.items() if len(tensor.shape) > 1}
        kinds = {tensor.kind.name for name, tensor in matrices.items() if not WHOLE.fullmatch(name)}
        if not kinds <= FLOATS.keys():
            return "bfloat16"
        return FLOATS[kinds.pop()] if len(kinds) == 1 else "float32"


@contextlib.contextmanager
def reading(file: GgufFile, what: str) -> Iterator[None]:
    """Raises UserError where libraries refuse what a file says of a model: its header is whole, and damaged."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # tokenizers knows only this one, transformers' checks raise many
        sentence = f"{file.path} has {what} that cannot be ({reason(error)}); download or copy it again"
        raise UserError(sentence) from error


def read_config(file: GgufFile) -> PreTrainedConfig:
    """The config of the model in a file.

    Raises:
        UserError: the file describes none.
    """
    with reading(file, "a shape"):
        return _config(file)


def _config(file: GgufFile) -> PreTrainedConfig:
    from transformers import AutoConfig

    architecture, layers = ARCHITECTURES[file.architecture], file.own("block_count")
    for tensor in ("token_embd.weight", f"blk.{layers - 1}.attn_norm.weight"):  # before so many layers are made
        if not file.has(tensor):
            raise UserError(f"{file.path} lacks {tensor}, which its architecture has; give a GGUF of the whole model")
    heads, hidden = file.own("attention.head_count"), file.own("embedding_length")
    kv_heads = file.own("attention.head_count_kv", heads)
    config = {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": file.own("feed_forward_length"),
        "num_hidden_layers": layers,
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
        name: (place(places, name) or name, tuple(weight.shape))
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
    size, turned = tensor.shape, re.fullmatch(architecture.transposed, name)
    wanted = shape[::-1] if turned else shape
    if math.prod(size) != math.prod(wanted) or (len(size) == len(wanted) and size != wanted):
        raise UserError(f"{file.path}: {name} is {[*size]}, not {[*wanted]} as its header says; give another GGUF")
    rows = file.rows(tensor)
    step = max(1, CHUNK_NUMBERS // math.prod(size[1:]))
    pieces = []
    try:
        for start in range(0, len(rows), step):  # float32 needs several times the memory of the result
            piece = torch.from_numpy(_numbers(rows[start : start + step], tensor.kind))
            if re.fullmatch(architecture.ones_added, name):
                piece = piece - 1
            if re.fullmatch(architecture.decays, name):
                piece = (-piece).log()
            pieces.append(piece.to(dtype))
    except NotImplementedError as error:
        raise UserError(f"{file.path} is quantised as {tensor.kind.name}, which cannot be read") from error
    weight = torch.cat(pieces).reshape(size)
    if re.fullmatch(architecture.rotated, name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        weight = weight.reshape(heads, size[0] // heads // 2, 2, *size[1:]).transpose(1, 2).reshape(size)
    if re.fullmatch(architecture.tiled, name):
        weight = weight[torch.from_numpy(tiled_order(config, size[0]).argsort())]
    if re.fullmatch(architecture.tiled_columns, name):
        weight = weight[:, torch.from_numpy(tiled_order(config, size[1]).argsort())]
    return (weight.T if turned else weight).reshape(shape).contiguous()


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
