"""Adapters: a folder that holds one, a fresh LoRA, one on its base; and what tells one base or adapter from another."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import UserError
from common.models.source import looks_local

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # never the pickled adapter_model.bin


def is_adapter(folder: str | Path) -> bool:
    """Whether `folder` holds a PEFT adapter."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def base_of(folder: str | Path) -> str:
    """The base model that the adapter in `folder` was trained on.

    Raises:
        UserError: the base is a local folder that is no longer there, or the adapter's config is broken.
    """
    base = read_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or "\0" in base:
        raise UserError(f"{folder}/{ADAPTER_CONFIG} is broken: it names no base; train the adapter again")
    if looks_local(base) and not os.path.isdir(base):
        raise UserError(f"the adapter {folder} needs its base {base}, which is not there; put it back or pass --base")
    return base


def read_config(folder: str | Path) -> dict[str, Any]:
    """The settings of the adapter in `folder`. Raises UserError where they cannot be read."""
    return _read_object(Path(folder) / ADAPTER_CONFIG, "train the adapter again")


def _read_object(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object in a file. Raises UserError for anything else."""
    try:
        value = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is broken ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is broken (no JSON object); {remedy}")
    return value


def tokenizer_folder(model_dir: str, base: str | None = None) -> str:
    """Where a model's tokenizer is: beside an adapter, else beside its base."""
    if is_adapter(model_dir) and not (Path(model_dir) / "tokenizer_config.json").is_file():
        return base or base_of(model_dir)
    return model_dir


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
        expected = _read_object(record, "restore it, or train the adapter again").get("base_fingerprint")
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
    from common.files import sha256_file

    for name in ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json", "config.json"):
        if (Path(folder) / name).is_file():
            if name.endswith("index.json"):  # which names the shards and knows nothing of what is in them
                shards = sorted(Path(folder).glob("model-*.safetensors"))
                return hashlib.sha256("".join(map(sha256_file, shards)).encode()).hexdigest()
            return sha256_file(Path(folder) / name)
    return hashlib.sha256(str(folder).encode()).hexdigest()
