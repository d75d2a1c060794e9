"""Where a model comes from and how it is loaded, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.models.gguf_model import GgufModel
    from common.models.onnx_runtime import OnnxModel

TORCH, LLAMA_CPP = ENGINES = ("torch", "llama_cpp")


class CannotDo(UserError):
    """What was asked for is beyond the engine that runs the model; the message names one that can."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, and in which precision its weights are loaded.

    Attributes:
        model_dir: a run folder (an adapter on its base), a model's folder, or a Hub id.
        base: base of the adapter, where it has moved from where it was trained; None: as the adapter says.
        load_in_4bit: "on", "off", or "auto" for on where there is a CUDA device: NF4 with bfloat16 compute.
        dtype: "float32", "bfloat16", "float16", or "auto" for the fastest that the device has.
        trust_remote_code: run code that comes with the model.
        engine: one of `ENGINES`: "llama_cpp" runs the GGUF of `model_dir` (`gguf_import.file_of`) as it is, packed, on
            the CPU.
    """

    model_dir: str
    base: str | None = None
    load_in_4bit: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    engine: str = TORCH


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use, and how much it may read at a time.

    Attributes:
        model: in eval mode.
        tokenizer: aligned with the model (`tokenizers.align`).
        max_batch_tokens: tokens in one forward pass, within what the memory allows.
    """

    model: PreTrainedModel | PeftModel | GgufModel | OnnxModel
    tokenizer: PreTrainedTokenizerBase
    max_batch_tokens: int


def unreadable() -> tuple[type[Exception], ...]:
    """What transformers raises where a model's files are not there or its config.json describes no model."""
    from huggingface_hub.errors import StrictDataclassError

    return OSError, ValueError, TypeError, AttributeError, StrictDataclassError


def looks_local(name: str) -> bool:
    """Whether a model name is meant as a folder here, not as a Hub id (`owner/name` or `name`)."""
    return Path(name).exists() or name.startswith(("/", ".", "~", "runs/", "models/")) or name.count("/") > 1
