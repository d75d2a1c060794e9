"""A LoRA adapter alone as GGUF, for llama.cpp's --lora and Ollama's ADAPTER: a few MB beside a GGUF of its base."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.cli import UserError
from common.export.gguf_writer import (
    TOWER,
    architecture_of,
    columns_as_llama_cpp,
    rows_as_llama_cpp,
    tensor_names,
)
from common.export.merge import Deltas
from common.models.gguf_architectures import place
from common.models.gguf_file import UNPROVEN_KEY
from common.models.loading import load_config

ADAPTER_FILE = "adapter.gguf"


def write(model_dir: str | Path, base: Path, path: Path, unproven: bool = False) -> None:
    """Write the adapter in `model_dir` beside its base as one GGUF file, its matrices in F32.

    llama.cpp adds alpha / rank x B A; what alpha and rank mean elsewhere (rslora's square root) is folded into alpha.

    Raises:
        UserError: an adapter of another kind, or a layer that the architecture does not have there.
    """
    import gguf

    config = load_config(str(base))
    deltas = Deltas(model_dir)
    writer = gguf.GGUFWriter(path, architecture_of(config))
    writer.add_type(gguf.GGUFType.ADAPTER)
    if unproven:
        writer.add_bool(UNPROVEN_KEY, True)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    names, alpha = tensor_names(config), None
    for name in sorted(deltas.names):
        target = place(names, name.replace(TOWER, ""))
        if target is None:
            raise UserError(f"{name} has no place in a GGUF of {config.model_type}; choose another format")
        a, b = (factor.float().numpy() for factor in deltas.factors(name))
        if deltas.transposed:
            raise UserError(f"{config.model_type} stores its weights transposed; choose another format than gguf_lora")
        if alpha is None:
            alpha = deltas.scale * len(a)
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for side, factor in (  # [rank, in], [out, rank]
            ("a", columns_as_llama_cpp(target, a, config)),
            ("b", rows_as_llama_cpp(target, b, config)),
        ):
            writer.add_tensor(f"{target}.lora_{side}", np.ascontiguousarray(factor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
