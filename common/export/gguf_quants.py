"""What each tensor of a GGUF is stored in, and its bytes: llama.cpp's own mixtures, by llama.cpp's own kernels.

Q4_K_M and Q5_K_M are mixtures: the tensors that answers depend on most are kept in Q6_K, as `llama_tensor_get_type` has
it for dense models (src/llama-quant.cpp of llama.cpp at commit 007dbbf3). Layers count by their number, as the loader
there sorts tensors; in older files they count in the order "0, 1, 10, 11, ..., 2".
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from common.models.gguf_architectures import WHOLE

if TYPE_CHECKING:
    import gguf

DEFAULT = {"Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}  # of a mixture's tensors
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # where rows are not made of blocks of 256 weights
VALUES = ("attn_v", "attn_qkv")  # llama.cpp counts both alike
OUTPUT, EMBEDDING = "output.weight", "token_embd.weight"


@dataclass
class Mixture:
    """The kinds of a model's tensors, asked for in the order of the layers.

    Attributes:
        quant: one of `formats.QUANTS`.
        layers: of the model.
        tied: the head is the embedding.
        is_70b: what llama.cpp calls so (`is_70b`): there, 8 heads share the values.
        values: layers that have one of VALUES, which count by themselves; None: all of them.
    """

    quant: str
    layers: int
    tied: bool
    is_70b: bool = False
    values: int | None = None
    seen: dict[str, int] = field(default_factory=dict)

    def kind_of(self, name: str, shape: Sequence[int]) -> gguf.GGMLQuantizationType:
        """What a tensor is stored in. Vectors (norms, biases) and `WHOLE` are F32; what no blocks fit is F16.

        Args:
            name: in GGUF: "blk.0.attn_v.weight".
            shape: [rows, columns] or [numbers].
        """
        import gguf

        kinds = gguf.GGMLQuantizationType
        if len(shape) == 1 or WHOLE.fullmatch(name):
            return kinds.F32
        wanted = self._wanted(name)
        for kind in (wanted, FALLBACK.get(wanted, wanted), "F16"):
            if shape[-1] % gguf.GGML_QUANT_SIZES[kinds[kind]][0] == 0:
                return kinds[kind]
        raise AssertionError("F16 fits every row")

    def _wanted(self, name: str) -> str:
        if self.quant not in DEFAULT:
            return self.quant
        if name == OUTPUT or (self.tied and name == EMBEDDING):
            return "Q6_K"
        part = name.removesuffix(".weight").rpartition(".")[2]
        part = "values" if part in VALUES else part
        if part in ("values", "ffn_down"):
            index = self.seen.get(part, 0)
            self.seen[part] = index + 1
            of = self.layers if part == "ffn_down" or self.values is None else self.values
            if _needs_more_bits(index, of):
                return "Q6_K"
            if part == "values" and self.is_70b and self.quant == "Q4_K_M":
                return "Q5_K"
        return DEFAULT[self.quant]


def is_70b(architecture: str, layers: int, heads: int, kv_heads: int) -> bool:
    """Whether llama.cpp takes a model for a 70B one (src/models/llama.cpp, qwen2.cpp): by its layers, and of a Llama by
    its heads, since the first 65B has 80 layers, too."""
    return layers == 80 and (architecture == "qwen2" or (architecture == "llama" and heads != kv_heads))


def _needs_more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def quantize(array: np.ndarray, kind: gguf.GGMLQuantizationType, importance: np.ndarray | None = None) -> np.ndarray:
    """A float32 tensor as the bytes of `kind` [rows, bytes].

    Args:
        importance: of each column, how much an error in it counts: the mean square of what it is multiplied with.

    Raises:
        UserError: llama.cpp is needed for this kind and not installed.
    """
    import gguf

    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16):
        return gguf.quants.quantize(array, kind)
    if kind == gguf.GGMLQuantizationType.Q8_0:
        return gguf.quants.quantize(array, kind)  # the same bytes as llama.cpp's, without it

    from common.models import llama_cpp

    array = np.ascontiguousarray(array, dtype=np.float32)
    rows, columns = array.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    result = np.empty((rows, columns // block * size), dtype=np.uint8)
    floats = ctypes.POINTER(ctypes.c_float)
    weights = None
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        weights = importance.ctypes.data_as(floats)
    written = llama_cpp.library().ggml_quantize_chunk(
        int(kind), array.ctypes.data_as(floats), result.ctypes.data, 0, rows, columns, weights
    )
    assert written == result.nbytes, f"{kind.name} has {written} bytes instead of {result.nbytes}"
    return result
