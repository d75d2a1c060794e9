"""Folders for onnxruntime-genai, the runtime of ONNX that writes text by itself, by its own model builder.

The builder draws a graph of ONNX Runtime's fused operators for each architecture, so it takes fewer than torch's
exporter does, and takes seconds. It reads a plain folder, and asks no network.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import UserError, reason
from common.export.merge import Checkpoint, check_architecture
from common.export.modelfile import LONGEST_CONTEXT
from common.export.onnx_writer import quiet_exporter
from common.models import genai_model
from common.models import loading as models
from common.models.batching import head_size
from common.vram.formulas import FLOAT32

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# by model type the kinds of RoPE that the builder writes rightly: of others it scales all layers of a Gemma 3, say, and
# none of a Llama
ROPES = {
    "llama": ("default", "llama3"),
    "mistral": ("default",),
    "qwen2": ("default",),
    "qwen3": ("default",),
    "gemma3_text": ("default",),
}
ARCHITECTURES = tuple(ROPES)
PRECISIONS = {"int4": "int4", "int8": "int8", "float32": "fp32"}  # on a CPU, as `--dtype` and as the builder call them
BITS = {"int4": 4, "int8": 8, "float32": 32}
ROUNDED = ("int4", "int8")
HEAD_STEP = 16  # of the sizes of heads that the runtime takes
BLOCK = 32  # weights that share a scale
OPTIONS = ["hf_token=false", "hf_remote=false", "windowed_kv_cache=false"]
EMBEDDINGS, HEAD = "embed_tokens", "lm_head"


def check(folder: str | Path) -> None:
    """Refuse a model folder that the builder would not write, or not as it is.

    Raises:
        UserError: it says why.
    """
    kind = check_architecture(folder, "onnx_genai", ARCHITECTURES)
    config = models.load_config(str(folder))
    if (size := head_size(config)) % HEAD_STEP:
        raise UserError(
            f"onnx_genai is for attention heads of a multiple of {HEAD_STEP} numbers, and those of {folder} have "
            f"{size}; use --format onnx"
        )
    positions = config.rope_parameters.get("full_attention", config.rope_parameters)["rope_type"]
    if positions not in ROPES[kind]:
        raise UserError(
            f"onnx_genai is for positions of the kind {' or '.join(ROPES[kind])} in {kind}, and those of {folder} are "
            f"{positions}; use --format onnx"
        )


def write(
    source: str | Path,
    folder: str | Path,
    dtype: str,
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int],
    context: int,
) -> None:
    """Write `folder` of a plain model folder: graph, weights, genai_config.json and tokenizer.

    Args:
        dtype: a key of `PRECISIONS`.
        tokenizer: aligned with the model.
        ends: every token that ends an answer.
        context: tokens that the model can read.

    Raises:
        UserError: the builder cannot write the model.
    """
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    source, folder = Path(source), Path(folder)
    cache = folder.with_name(f"{folder.name}.cache")
    folder.mkdir()
    cache.mkdir()
    place = ("", str(source), str(folder), PRECISIONS[dtype], "cpu", str(cache))
    try:
        with quiet_exporter(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            options = parse_extra_options(*place, OPTIONS)
            _spell_out(options["hf_details"]["hf_config"])
            create_model(*place, **options)
    except Exception as error:  # whatever the builder meets
        raise UserError(
            f"onnxruntime-genai's builder cannot write {source} ({reason(error)}); use --format onnx, or gguf"
        ) from error
    tokenizer.save_pretrained(folder)
    _complete(folder / genai_model.CONFIG_FILE, tokenizer, ends, context)


def _spell_out(config: PreTrainedConfig) -> None:
    """Give a config what the builder looks for under older names, and would go without.

    Layers of a Mistral, which have no list of kinds, would see all tokens whatever its window is; those of a Gemma 3
    would be turned by the builder's own frequencies, or not be built.
    """
    if config.model_type == "mistral" and config.sliding_window:
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    if config.model_type == "gemma3_text":
        config.rope_local_base_freq = config.rope_parameters["sliding_attention"]["rope_theta"]
        config.rope_parameters = dict(config.rope_parameters["full_attention"])


def predicted_bytes(folder: str | Path, dtype: str) -> int:
    """The size of the weights that will be written of a model folder, at most: matrices in `dtype`, with a scale for
    each block, vectors in float32, and what positions are turned by.

    Embeddings are in float32, too, unless a head in 4 bits is tied to them, which then is both; with one in 8 bits they
    are written twice.
    """
    shapes, config = Checkpoint(folder).shapes, models.load_config(str(folder))
    tied = not any(HEAD in name for name in shapes)
    kinds = 2 if config.model_type == "gemma3_text" else 1
    total = kinds * config.max_position_embeddings * head_size(config) * FLOAT32
    for name, shape in shapes.items():
        numbers = math.prod(shape)
        rounded = numbers * BITS[dtype] // 8 + (numbers // BLOCK * FLOAT32 if dtype in ROUNDED else 0)
        if EMBEDDINGS in name and not (tied and dtype != "int8"):
            total += numbers * FLOAT32 + (rounded if tied else 0)
        else:
            total += rounded if len(shape) == 2 else numbers * FLOAT32
    return total


def _complete(path: Path, tokenizer: PreTrainedTokenizerBase, ends: Collection[int], context: int) -> None:
    """Put into genai_config.json what ends an answer, and greedy text of a length that a laptop has the memory for."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"] |= {"eos_token_id": list(ends), "pad_token_id": tokenizer.pad_token_id}
    config["search"] |= {"max_length": min(context, LONGEST_CONTEXT), "do_sample": False}
    path.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
