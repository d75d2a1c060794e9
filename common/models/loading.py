"""Loading: a base in 4 or 16/32 bits, an adapter on its base, a fresh LoRA; CPU offload; the base's fingerprint."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common import distributed as launch
from common.cli import UserError, log
from common.models.source import ModelSource

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # never the pickled adapter_model.bin
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
BF16_FROM_PARAMETERS = 50_000_000  # below this a CPU's bfloat16 kernels cost more in overhead than they save

# It offers CPU kernels from the Hub at import, whoever imports it first.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def is_adapter(folder: str | Path) -> bool:
    """Whether `folder` holds a PEFT adapter."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def looks_local(name: str) -> bool:
    """Whether a model name is meant as a folder here, not as a Hub id (`owner/name` or `name`)."""
    return Path(name).exists() or name.startswith(("/", ".", "~", "runs/", "models/")) or name.count("/") > 1


def base_of(folder: str | Path) -> str:
    """The base model that the adapter in `folder` was trained on.

    Raises:
        UserError: the base is a local folder that is no longer there, or the adapter's config is broken.
    """
    try:
        base = json.loads((Path(folder) / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{folder}/{ADAPTER_CONFIG} is broken ({error}); train the adapter again") from error
    if looks_local(base) and not Path(base).is_dir():
        raise UserError(f"the adapter {folder} needs its base {base}, which is not there; put it back or pass --base")
    return base


def check_model_dir(model_dir: str, base: str | None = None) -> None:
    """Fail early, before torch is imported, on a folder that holds no model or an adapter without its base."""
    if is_adapter(model_dir):
        if base is None:
            base_of(model_dir)
    elif Path(model_dir).is_dir() and not (Path(model_dir) / "config.json").is_file():
        raise UserError(f"{model_dir} holds neither {ADAPTER_CONFIG} nor config.json; give a run folder or a model")
    elif looks_local(model_dir) and not Path(model_dir).is_dir():
        raise UserError(f"{model_dir} does not exist; train it first or check the path")


def load_config(model_dir: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A language model's shape, of an adapter that of its base; nothing else is loaded.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoConfig

    name = base_of(model_dir) if is_adapter(model_dir) else model_dir
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code).get_text_config()
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name} has no readable config.json ({reason}); give a model folder or a Hub id") from error


def use_4bit(load_in_4bit: str) -> bool:
    """`--load_in_4bit auto|on|off`: auto is on where there is a CUDA device."""
    import torch

    return load_in_4bit == "on" or (load_in_4bit == "auto" and torch.cuda.is_available())


def inference_dtype(source: ModelSource) -> torch.dtype:
    """What a plain model is loaded in for inference: as asked, else the fastest that the device has for its size."""
    import torch

    if source.dtype != "auto":
        return getattr(torch, source.dtype)
    if torch.cuda.is_available():
        return torch.bfloat16
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.model_dir, trust_remote_code=source.trust_remote_code)
    size = 12 * getattr(config, "num_hidden_layers", 1) * getattr(config, "hidden_size", 1) ** 2
    return torch.bfloat16 if size >= BF16_FROM_PARAMETERS else torch.float32


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library keep what torch frees on a CPU, for its next tensor.

    It gives large blocks back to the kernel, which hands out zeroed pages again one fault at a time: without that a
    training step takes 6 % less, a forward pass of 8,192 tokens a third (docs/results.md). The peak stays the peak.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL("libc.so.6")
        for option, size in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 1 << 30)):  # the most it takes; bytes
            libc.mallopt(option, size)


def load_base(source: ModelSource, *, training: bool = False) -> PreTrainedModel:
    """A causal language model with the recipe's precision; `source.model_dir` is the model itself, no adapter.

    4-bit is NF4 with double quantisation and bfloat16 compute (Dettmers et al. 2023, QLoRA). Without it, training
    uses bfloat16 on CUDA and float32 on CPU (autocast measured slower there), inference the fastest that the CPU has.
    `OFFLOAD_FOLDER` in the environment turns CPU offload on for inference. FSDP cuts and sends weights of one dtype, so
    for training under it the 4-bit numbers lie in bfloat16 ones.

    Raises:
        UserError: no model under this name or path, or the 4-bit library is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quiet_libraries()
    four_bit = use_4bit(source.load_in_4bit)
    if training or four_bit:
        chosen = torch.bfloat16 if torch.cuda.is_available() or four_bit else torch.float32
        chosen = chosen if source.dtype == "auto" else getattr(torch, source.dtype)
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
        if not training and not four_bit:
            chosen = inference_dtype(source)
        model = AutoModelForCausalLM.from_pretrained(source.model_dir, dtype=chosen, **settings)
    except ImportError as error:
        raise UserError(f"4-bit loading needs bitsandbytes ({error}); pip install -r requirements.txt") from error
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"cannot load {source.model_dir} ({reason}); give a model folder or a Hub id, "
            "or build the offline base with: python tiny_student.py"
        ) from error
    if four_bit:
        _keep_weights_unpacked(model)
    return model


def _keep_weights_unpacked(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking weights for AVX512-BF16 at the first eval-mode forward.

    The repacking is for good: training after it fails or is silently wrong, and saving writes garbage (0.50).
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def align_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell model and generation config the tokenizer's PAD and EOS, so that a trained model stops."""
    for config in (model.config, model.generation_config):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id
            config.eos_token_id = tokenizer.eos_token_id


def add_lora(model: PreTrainedModel, *, r: int, alpha: int, dropout: float, seed: int) -> PeftModel:
    """A fresh LoRA adapter (Hu et al. 2021) on the projections of attention and MLP, base frozen."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in LORA_TARGETS if name in names] or "all-linear"
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, bias="none", task_type="CAUSAL_LM", target_modules=targets
    )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def load_adapter(
    model: PreTrainedModel | PeftModel, folder: str, *, trainable: bool = False, name: str = "default"
) -> PeftModel:
    """The adapter in `folder` on its base `model`; where adapters are on it already, `name` is added to them.

    One that is only used takes the base's precision: beside a bfloat16 base (under 4 bits, too) float32 would take
    twice the memory and cast each of its inputs, for digits that the base rounds away.

    Raises:
        UserError: no weights, or of another base, in shape or (by the run's fingerprint) in weights.
    """
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError

    if not (Path(folder) / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"the adapter {folder} has no {ADAPTER_WEIGHTS}; copy it again, or train it again")
    expected = None
    record = Path(folder) / "run.json"
    if record.is_file():
        expected = json.loads(record.read_text()).get("base_fingerprint")
    if expected and expected != fingerprint(model):
        raise UserError(
            f"the adapter {folder} was trained on other base weights than {model.name_or_path}; "
            "give its own base with --base, or train it again on this one"
        )
    shared = isinstance(model, PeftModel)
    try:
        if shared:
            model.load_adapter(folder, adapter_name=name, is_trainable=trainable)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name, is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        if shared and name in model.peft_config:
            model.delete_adapter(name)
        if isinstance(error, torch.OutOfMemoryError):  # which is a RuntimeError, and no fault of the adapter's
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line.strip() for line in lines if "mismatch" in line), lines[0])
        raise UserError(
            f"the adapter {folder} does not fit the base {model.name_or_path} ({reason}); give its own base with --base"
        ) from error
    if not trainable:
        make_inference_adapters(model)
    return model


def make_inference_adapters(model: PeftModel) -> None:
    """Make all adapters on a base cheap to use, in place: its data type, and `lean_lora`. They train no more."""
    from common.models import lora_inference as lean_lora

    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            parameter.data = parameter.data.to(model.dtype)
    lean_lora.install(model)


def tokenizer_folder(model_dir: str, base: str | None = None) -> str:
    """Where a model's tokenizer is: beside an adapter, else beside its base."""
    if is_adapter(model_dir) and not (Path(model_dir) / "tokenizer_config.json").is_file():
        return base or base_of(model_dir)
    return model_dir


def base_source(source: ModelSource) -> ModelSource:
    """Of an adapter its base, loaded in the same way; a plain model is its own."""
    if not is_adapter(source.model_dir):
        return source
    return replace(source, model_dir=source.base or base_of(source.model_dir), base=None)


def load_for_inference(source: ModelSource) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Model (adapter on its base, or a plain model) in eval mode and its aligned tokenizer.

    Raises:
        UserError: see `load_base` and `load_adapter`.
    """
    from common.models.tokenizers import load_tokenizer

    model_dir = source.model_dir
    check_model_dir(model_dir, source.base)
    own = base_source(source)
    folder = tokenizer_folder(model_dir, own.model_dir)
    tokenizer = load_tokenizer(folder, trust_remote_code=source.trust_remote_code)
    model = load_base(own)
    align_model(model, tokenizer)
    if is_adapter(model_dir):
        model = load_adapter(model, model_dir)
    return model.eval(), tokenizer


def fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits that tell one base from another: its shape, some embedding rows and its norms, as bfloat16.

    Those weights stay unquantised in a 4-bit model and bfloat16 in all, so every way of loading a base agrees.
    """
    import torch
    from accelerate.utils import align_module_device

    config = model.config
    shape = [config.model_type, config.vocab_size, getattr(config, "hidden_size", 0)]
    digest = hashlib.sha256(json.dumps(shape).encode())
    names = [name for name, _ in model.named_parameters() if "norm" in name or "ln_" in name]
    owners = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    for module, name in [(model.get_input_embeddings(), "weight"), *owners]:
        with align_module_device(module):  # fetches a weight that is offloaded
            weight = getattr(module, name).detach()
            sample = (weight if weight.ndim == 1 else weight[:256]).to("cpu", torch.bfloat16)
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def adapter_hash(folder: str | Path) -> str:
    """SHA-256 of the adapter's weights; of `config.json` for a plain model folder; of the name for a Hub id."""
    from common.data.rows import sha256_file

    for name in ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json", "config.json"):
        if (Path(folder) / name).is_file():
            if name.endswith("index.json"):  # which names the shards and knows nothing of what is in them
                shards = sorted(Path(folder).glob("model-*.safetensors"))
                return hashlib.sha256("".join(map(sha256_file, shards)).encode()).hexdigest()
            return sha256_file(Path(folder) / name)
    return hashlib.sha256(str(folder).encode()).hexdigest()


def quiet_libraries() -> None:
    """No weight-loading bars, and no notices on what this toolkit has already decided; errors still show."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)


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
