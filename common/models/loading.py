"""Loading: a base in 4, 16 or 32 bits, an adapter on its base; CPU offload; the dtype that a device wants."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import distributed as launch
from common.cli import UserError, log, reason
from common.models import adapters, gguf_import, hub
from common.models.genai_model import is_genai
from common.models.source import ModelSource, looks_local, unreadable

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from common.models.gguf_model import GgufModel

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGE = 50_000_000  # parameters of the layers, about; from here on a CPU takes what is fastest for a model
READ_PREFIX_TREES = ("llama", "mistral", "qwen2", "qwen3")

# It offers CPU kernels from the Hub at import, whoever imports it first.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def check_model_dir(model_dir: str, base: str | None = None, *, ask_hub: bool = True, onnx: bool = True) -> None:
    """Fail early, before torch is imported, on a folder without a model, an adapter without its base, or a name that is
    not on the Hub (which is asked unless `ask_hub` is False).

    Args:
        onnx: an ONNX export will do, which ranks labels.
    """
    from common.models.onnx_runtime import is_onnx

    if adapters.is_adapter(model_dir):
        base = base or adapters.base_of(model_dir)
        if looks_local(base) and not Path(base).exists():
            raise UserError(f"the base {base} does not exist; give its folder with --base")
        if adapters.is_adapter(base):
            raise UserError(
                f"the base {base} is an adapter itself; give the model that {model_dir} was trained on with --base, or "
                "merge the one below into its own base first (export_model.py --format merged)"
            )
        if ask_hub and not looks_local(base):
            hub.check(base)
    elif gguf := gguf_import.local_gguf(model_dir):
        gguf_import.check(gguf)
    elif is_genai(model_dir):
        raise UserError(
            f"{model_dir} is an export for onnxruntime-genai, which runs it as its README.md says; here give the run "
            "that it was made from, or an export of it in another format"
        )
    elif not onnx and is_onnx(model_dir):
        raise UserError(
            f"{model_dir} is an ONNX export, which ranks labels and no more here; give the run that it was made from, "
            "or a GGUF of it"
        )
    elif Path(model_dir).is_dir() and not (Path(model_dir) / "config.json").is_file():
        raise UserError(
            f"{model_dir} holds neither {adapters.ADAPTER_CONFIG} nor config.json; give a run folder or a model"
        )
    elif not looks_local(model_dir):
        if ask_hub:
            hub.check(model_dir)
    elif not Path(model_dir).is_dir():
        raise UserError(f"{model_dir} does not exist; train it first or check the path")


def load_config(model_dir: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A language model's shape, of an adapter that of its base; nothing else is loaded.

    Raises:
        UserError: there is none, or the Hub cannot be asked for it.
    """
    return whole_config(model_dir, trust_remote_code).get_text_config()


def whole_config(model_dir: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """As `load_config`, with what a model has beside its language model: a vision tower, say."""
    name = adapters.base_of(model_dir) if adapters.is_adapter(model_dir) else model_dir
    if gguf := gguf_import.named_gguf(name):
        return gguf_import.config_of(gguf)
    if not looks_local(name):
        hub.check(name)
    from transformers import AutoConfig  # seconds, which a name that is not there is not to wait for

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except unreadable() as error:
        raise UserError(
            f"{name} has no readable config.json ({reason(error)}); give a model folder or a Hub id"
        ) from error
    check_causal(name, config)
    return config


def check_causal(name: str, config: PreTrainedConfig) -> None:
    """Raises UserError for a model that is no language model that writes from left to right.

    transformers builds BERT's family as causal language models, too, whose tokens then see what comes after them.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    text = config.get_text_config(decoder=True)
    if text.is_encoder_decoder:
        kind = "an encoder with a decoder"
    elif text.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(text, "is_decoder", True):
        kind = "an encoder, whose tokens see what comes after them"
    else:
        return
    raise UserError(f"{name} ({config.model_type}) is {kind}; give a causal language model, such as a Llama or a Qwen")


def without_stray_pad(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config, its PAD removed where it lies beyond the embedding: no model can be built with it."""
    text = config.get_text_config()
    if (getattr(text, "pad_token_id", None) or 0) >= getattr(text, "vocab_size", 1 << 60):
        config.pad_token_id = text.pad_token_id = None
    return config


def use_4bit(load_in_4bit: str) -> bool:
    """`--load_in_4bit auto|on|off`: auto is on where there is a CUDA device."""
    import torch

    return is_on(load_in_4bit, torch.cuda.is_available())


def is_on(switch: str, cuda: bool) -> bool:
    """Whether a switch of the values "on", "off" and "auto" is on, on a card or not."""
    return switch == "on" or (switch == "auto" and cuda)


def has_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 matrices in hardware (AVX512-BF16, AMX, or ARM's BF16).

    oneDNN supports them on any CPU with AVX512, where they take three times as long as float32 ones.
    """
    import torch

    known = torch.cpu.get_capabilities()
    if known["architecture"] == "x86_64":
        return known["avx512_bf16"] or known["amx_bf16"]
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def is_large(config: PreTrainedConfig) -> bool:
    """Whether a model is as large as those that people use, not one of the offline miniatures.

    Those stay in float32 and are trained by the libraries' own passes, so that their figures are the same on every
    CPU; a large one takes what is fastest.
    """
    config = config.get_text_config()
    size = 12 * getattr(config, "num_hidden_layers", 1) * getattr(config, "hidden_size", 1) ** 2
    return size >= LARGE


def reads_prefix_trees(config: Mapping[str, Any]) -> bool:
    """Whether a decoder is causal in all layers and hands keyword arguments down to the attention, by config.json's
    keys; see `common.training.prefix_tree`."""
    kind = config.get("model_type")
    # what transformers takes for keys that are not there
    window = config.get("sliding_window", 4096 if kind == "mistral" else None)
    windowed = window and config.get("use_sliding_window", kind not in ("qwen2", "qwen3"))
    everywhere = set(config.get("layer_types") or ["full_attention"]) == {"full_attention"}
    return kind in READ_PREFIX_TREES and everywhere and not windowed


def fastest_dtype(source: ModelSource, config: PreTrainedConfig | None = None) -> torch.dtype:
    """What a plain model is loaded in: as asked, else the fastest that the device has for its size.

    Args:
        config: the model's, where it has been read already; else it is read if its size decides.
    """
    import torch

    if source.dtype != "auto":
        return getattr(torch, source.dtype)
    if torch.cuda.is_available():
        return torch.bfloat16
    if not has_bfloat16():
        return torch.float32
    if config is None:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(source.model_dir, trust_remote_code=source.trust_remote_code)
    return torch.bfloat16 if is_large(config) else torch.float32


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library keep what torch frees on a CPU, for its next tensor.

    It gives large blocks back to the kernel, which hands out zeroed pages again one fault at a time: without that a
    training step takes 6 % less, a forward pass of 8,192 tokens a third (docs/results.md). What lies between blocks is
    kept, too, and grows with batches of unlike shapes: `give_back_freed_memory`.
    """
    _set_allocator(mmap_threshold=32 << 20, trim_threshold=1 << 30)  # the most that it takes


def give_back_freed_memory() -> None:
    """Have the C library give the kernel what is free, and from now on each block of a megabyte as soon as it is."""
    _set_allocator(mmap_threshold=1 << 20, trim_threshold=1 << 20)


def _set_allocator(mmap_threshold: int, trim_threshold: int) -> None:
    """glibc's mallopt, in bytes, and a trim; nothing where there is another C library."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, mmap_threshold)
        libc.mallopt(M_TRIM_THRESHOLD, trim_threshold)
        libc.malloc_trim(0)


def load_base(source: ModelSource, *, training: bool = False) -> PreTrainedModel:
    """A causal language model with the recipe's precision; `source.model_dir` is the model itself, no adapter.

    4-bit is NF4 with double quantisation and bfloat16 compute (Dettmers et al. 2023, QLoRA). Without it, a model is
    loaded in what is fastest for it (`fastest_dtype`); what is trained of it is kept in float32 by those who train.
    `OFFLOAD_FOLDER` in the environment turns CPU offload on for inference. FSDP cuts and sends weights of one dtype, so
    for training under it the 4-bit numbers lie in bfloat16 ones.

    Raises:
        UserError: no model under this name or path, one whose weights are not all there or of other sizes than its
            config says, or the 4-bit library is missing.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    from common.models.heads import multiply_once

    quiet_libraries()
    four_bit = use_4bit(source.load_in_4bit)
    if not torch.cuda.is_available():
        keep_freed_memory()
    offload = None if training else os.environ.get("OFFLOAD_FOLDER")
    settings: dict = {"trust_remote_code": source.trust_remote_code, "use_safetensors": True}
    if four_bit:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.bfloat16 if training and launch.fsdp() else torch.uint8,
            llm_int8_enable_fp32_cpu_offload=bool(offload),
        )
    if offload:
        Path(offload).mkdir(parents=True, exist_ok=True)
        settings |= {"device_map": "auto", "offload_folder": offload}
    elif torch.cuda.is_available():
        settings["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
    elif four_bit:
        settings["device_map"] = {"": "cpu"}
    try:
        config = AutoConfig.from_pretrained(source.model_dir, trust_remote_code=source.trust_remote_code)
        check_causal(source.model_dir, config)
        chosen = torch.bfloat16 if four_bit and source.dtype == "auto" else fastest_dtype(source, config)
        model, found = AutoModelForCausalLM.from_pretrained(
            source.model_dir,
            config=without_stray_pad(config),
            dtype=chosen,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **settings,
        )
    except ImportError as error:
        if not four_bit:  # it is stored in a way of its own: GPTQ, AWQ
            raise UserError(f"cannot load {source.model_dir} ({reason(error)}); give its 16-bit original") from error
        raise UserError(f"4-bit loading needs bitsandbytes ({error}); pip install -r requirements.txt") from error
    except torch.OutOfMemoryError:  # a RuntimeError, and no fault of the model's
        raise
    except (*unreadable(), RuntimeError, SafetensorError) as error:
        raise UserError(
            f"cannot load {source.model_dir} ({reason(error)}); give a model folder or a Hub id, "
            "or build the offline base with: python tiny_student.py"
        ) from error
    _check_weights(source.model_dir, model, found)
    if getattr(model, "is_loaded_in_4bit", False):  # as asked, or as it is stored
        _keep_weights_unpacked(model)
    multiply_once(model)
    return model


def _check_weights(name: str, model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """Raises UserError unless a model has all its weights from its files: transformers makes up what they lack.

    Args:
        found: what `from_pretrained` tells with `output_loading_info`.
    """
    if others := sorted(found["mismatched_keys"]):
        key, stored, wanted = others[0]
        raise UserError(
            f"the weights of {name} do not fit its config.json: {key} is {list(stored)}, not {list(wanted)}; "
            "give the model that the two belong to"
        )
    if missing := found["missing_keys"]:
        raise UserError(
            f"{name} lacks {len(missing)} of the weights that its config.json asks for, such as {min(missing)}; "
            "give the whole model, of an architecture for causal language modelling"
        )
    if left := found["unexpected_keys"]:
        log(f"{name} has {len(left)} weights that {type(model).__name__} has no place for, such as {min(left)}")


def _keep_weights_unpacked(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking weights for AVX512-BF16 at the first eval-mode forward.

    The repacking is for good: training after it fails or is silently wrong, and saving writes garbage (0.50).
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def align_model(model: PreTrainedModel | GgufModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Agree on what is input and what ends an answer: the model stops at the tokenizer's EOS and where it did before.

    Both of the model's configs get EOS, first, then every other stop token that the model's files name. A tokenizer
    with tokens that the embedding has no row for is fitted to it (`tokenizers.fit_to_embedding`).

    Raises:
        UserError: the tokenizer is not the model's.
    """
    from common.models.gguf_model import GgufModel
    from common.models.tokenizers import fit_to_embedding, token_ids

    packed = isinstance(model, GgufModel)
    fit_to_embedding(tokenizer, model.vocabulary if packed else model.get_input_embeddings().weight.shape[0])
    config, generation_config = model.config.get_text_config(), model.generation_config
    derived = generation_config is None or generation_config._from_model_config
    declared = [] if derived else token_ids(generation_config.eos_token_id)
    # A config class may have a number of its own where the files have none, so that of a config has to be a token that
    # was added to the vocabulary, as those that end something are.
    added = tokenizer.added_tokens_decoder
    declared += [token for token in token_ids(getattr(config, "eos_token_id", None)) if token in added]
    declared = [token for token in declared if 0 <= token < config.vocab_size]
    ends = list(dict.fromkeys([tokenizer.eos_token_id, *declared]))
    for settings in (model.config, generation_config):
        if settings is not None:
            settings.pad_token_id = tokenizer.pad_token_id
            settings.eos_token_id = ends if len(ends) > 1 else ends[0]


def base_source(source: ModelSource) -> ModelSource:
    """Of an adapter its base, loaded in the same way; a plain model is its own."""
    if not adapters.is_adapter(source.model_dir):
        return source
    return replace(source, model_dir=source.base or adapters.base_of(source.model_dir), base=None)


def load_for_inference(source: ModelSource) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Model (adapter on its base, or a plain model) in eval mode and its aligned tokenizer.

    Raises:
        UserError: see `load_base` and `adapters.load_adapter`.
    """
    from common.models import unproven
    from common.models.tokenizers import load_tokenizer

    model_dir = source.model_dir
    check_model_dir(model_dir, source.base)
    unproven.warn_of(model_dir)
    own = base_source(source)
    folder = adapters.tokenizer_folder(model_dir, own.model_dir)
    tokenizer = load_tokenizer(folder, trust_remote_code=source.trust_remote_code)
    model = load_base(own)
    align_model(model, tokenizer)
    if adapters.is_adapter(model_dir):
        model = adapters.load_adapter(model, model_dir)
    return model.eval(), tokenizer


def load_gguf(source: ModelSource, most_tokens: int) -> tuple[GgufModel, PreTrainedTokenizerBase]:
    """The GGUF that a model folder stands for (`gguf_import.packed_folder`) in llama.cpp, and its aligned tokenizer.

    Args:
        most_tokens: of a row that is ranked, at most; and at most the model's context.

    Raises:
        UserError: llama.cpp is not installed or cannot read the file; the file has gone.
    """
    from transformers import GenerationConfig

    from common.models import unproven
    from common.models.batching import context_of
    from common.models.gguf_model import GgufModel
    from common.models.tokenizers import load_tokenizer

    unproven.warn_of(source.model_dir)
    file = gguf_import.file_there(source.model_dir)
    folder = gguf_import.config_folder(source.model_dir)
    config, generation_config = load_config(folder), GenerationConfig.from_pretrained(folder)
    context, tokenizer = min(context_of(config), most_tokens), load_tokenizer(folder)
    model = GgufModel(file, context, config=config, generation_config=generation_config)
    align_model(model, tokenizer)
    return model, tokenizer


def quiet_libraries() -> None:
    """No weight-loading bars, and no notices on what this toolkit has already decided; errors still show."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").addFilter(_no_table_of_weights)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)


def _no_table_of_weights(record: logging.LogRecord) -> bool:
    """Not that of weights without a place, or places without weights: `_check_weights` says it in a sentence."""
    return "LOAD REPORT" not in record.getMessage()


def describe_device() -> str:
    """The device in words, for run.json."""
    import platform

    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores ({platform.machine()})"


def warn_if_offload_is_for_inference() -> None:
    """Say that OFFLOAD_FOLDER does nothing in training."""
    if os.environ.get("OFFLOAD_FOLDER"):
        log("OFFLOAD_FOLDER is for inference, evaluation and serving; training keeps the model on its device")
