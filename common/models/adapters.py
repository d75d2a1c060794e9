"""Adapters: a folder that holds one, a fresh LoRA, one on its base; and what tells one base or adapter from another."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import UserError, reason
from common.models import gguf_import
from common.models.source import TORCH, ModelSource, looks_local

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # never the pickled adapter_model.bin
# What tells a model from others, the first that a folder has: of what runs there, first. Shards have many names
# (model-00001-of-00002, model.safetensors-00001-of-00002), and an index knows nothing of what is in them.
HASHED = ("model.onnx*", ADAPTER_WEIGHTS, "model.safetensors", "model*.safetensors", "*.safetensors", "config.json")

# Kinds (PEFT's `peft_type`) that change what a base's layers compute and nothing else. Those that put virtual tokens
# before the input, or need to be told more at each step, would be read wrongly by label ranking and its prefix cache.
KINDS = frozenset(
    {"LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "HRA", "FOURIERFT", "LN_TUNING",
     "TRAINABLE_TOKENS"}
)  # fmt: skip
# Settings of a LoRA that need to be told more at each step, or rebuild the base.
UNUSABLE = ("alora_invocation_tokens", "arrow_config", "layer_replication", "megatron_config", "use_bdlora")
# Settings of a LoRA that leave its base and its neighbours alone, whatever their value; others have to be unset.
NEIGHBOURLY = frozenset(
    {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
     "runtime_config", "r", "lora_alpha", "lora_dropout", "lora_bias", "target_modules", "exclude_modules",
     "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_rslora",
     "use_dora", "init_lora_weights", "loftq_config", "eva_config", "ensure_weight_tying", "megatron_core",
     "qalora_group_size"}
)  # fmt: skip
# Of those, what changes the sum alpha / r x B A that merging adds.
_MORE_THAN_A_SUM = frozenset({"use_dora", "lora_bias", "rank_pattern", "alpha_pattern"})
# Ways to begin a LoRA that do not subtract the beginning from the base.
BASE_KEEPING_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


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


def check_kind(folder: str | Path) -> None:
    """Refuse an adapter that cannot be used as one, before anything is loaded.

    Raises:
        UserError: it is of such a kind, or its config is broken.
    """
    settings = read_config(folder)
    kind = settings.get("peft_type")
    if kind not in KINDS:
        raise UserError(
            f"the adapter {folder} is of the kind {str(kind)[:40]}, which cannot be used here; train a LoRA adapter"
        )
    unusable = [name for name in UNUSABLE if settings.get(name)] if kind == "LORA" else []
    if unusable:
        raise UserError(
            f"the adapter {folder} has {unusable[0]}, which cannot be used here; train a plain LoRA adapter"
        )


def check_mergeable(folder: str | Path) -> dict[str, Any]:
    """The settings of an adapter that adds alpha / r x B A to its base's weights and does nothing else, with rslora
    alpha over r's root.

    Raises:
        UserError: it does more, or something that is not known here; or its config is broken.
    """
    settings = read_config(folder)
    other = _settings_beyond(settings, NEIGHBOURLY - _MORE_THAN_A_SUM)
    if settings.get("init_lora_weights", True) not in BASE_KEEPING_STARTS:  # it rebuilds the base
        other.append("init_lora_weights")
    if (kind := settings.get("peft_type")) != "LORA":
        fault = f"is of the kind {str(kind)[:40]}"
    elif other:
        fault = f"has {other[0][:60]}={str(settings[other[0]])[:60]}"
    else:
        return settings
    raise UserError(f"the adapter {folder} {fault}, which cannot be exported; train a plain LoRA adapter")


def _settings_beyond(settings: dict[str, Any], known: frozenset[str]) -> list[str]:
    """The settings of a LoRA that are set and are not among `known`."""
    return [name for name, value in settings.items() if name not in known and value and value != "none"]


def check_sharing(folder: str | Path) -> None:
    """Refuse an adapter that would change the answers of others on the same base: only a LoRA leaves it alone, and
    only where none of its settings says otherwise; one that is not known here does.

    Raises:
        UserError: it is of such a kind, or its config is broken.
    """
    settings = read_config(folder)
    kind = settings.get("peft_type")
    reason = None
    if kind != "LORA":
        reason = f"it is of the kind {str(kind)[:40]}, not LORA"
    elif settings.get("init_lora_weights") not in BASE_KEEPING_STARTS:
        reason = f"it has init_lora_weights={str(settings['init_lora_weights'])[:60]}"
    else:
        if changing := _settings_beyond(settings, NEIGHBOURLY):
            reason = f"it has {changing[0][:60]}={str(settings[changing[0]])[:60]}"
    if reason:
        raise UserError(
            f"the adapter {folder} cannot share a base with others: {reason}; use it with the scripts, "
            "which load it alone, or train a plain LoRA adapter"
        )


def tokenizer_folder(model_dir: str, base: str | None = None) -> str:
    """Where a model's tokenizer is: beside an adapter, else beside its base."""
    if is_adapter(model_dir) and not (Path(model_dir) / "tokenizer_config.json").is_file():
        return base or base_of(model_dir)
    return model_dir


def lora_targets(model: PreTrainedModel) -> list[str]:
    """The last names of a model's linear layers that read text, but its head: LORA_TARGETS of a Llama or Qwen, in that
    order.

    A hybrid mixes its tokens in layers with other names, and some models have one matrix for q, k and v.
    """
    head = model.get_output_embeddings()
    names = {name.rpartition(".")[2] for name in _linear_layers(model.get_decoder())}
    names -= {name.rpartition(".")[2] for name, module in model.named_modules() if module is head}
    return [name for name in LORA_TARGETS if name in names] + sorted(names.difference(LORA_TARGETS))


def _linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, Conv1D)  # bitsandbytes' layers are Linear, too
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _of_images(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """The layers with these last names that a text never goes through: those of a vision tower."""
    read = set(_linear_layers(model.get_decoder()).values())
    layers = _linear_layers(model).items()
    return [name for name, module in layers if name.rpartition(".")[2] in targets and module not in read]


def adapted_layers(model: PeftModel) -> dict[str, int]:
    """{last name of a linear layer: how many of that name have a LoRA}, for run.json."""
    from peft.tuners.lora import LoraLayer

    return dict(Counter(name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, LoraLayer)))


def add_lora(model: PreTrainedModel, *, r: int, alpha: int, dropout: float, seed: int) -> PeftModel:
    """A fresh LoRA adapter (Hu et al. 2021) on all linear layers that read text but the head, base frozen."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = lora_targets(model)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=targets,
        exclude_modules=_of_images(model, targets) or None,
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
        UserError: no weights, or of another base, in the names of its layers, in shape or (by the run's fingerprint) in
            weights; a kind that cannot be used, or not beside others (`check_kind`, `check_sharing`).
    """
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError, safe_open

    shared = isinstance(model, PeftModel)
    check_kind(folder)
    if shared:
        check_sharing(folder)
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
    try:
        with safe_open(Path(folder) / ADAPTER_WEIGHTS, "pt") as file:
            stored = set(file.keys())
        if shared and (foreign := [key for key in stored if ".lora_" not in key]):  # would be read into the base
            raise ValueError(f"it holds {min(foreign)}, which is no weight of a LoRA")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # which is an error here
            if shared:
                model.load_adapter(folder, adapter_name=name, is_trainable=trainable)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name, is_trainable=trainable)
        _check_keys(model, name, stored)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        if shared and name in model.peft_config:
            model.delete_adapter(name)
        if isinstance(error, torch.OutOfMemoryError):  # which is a RuntimeError, and no fault of the adapter's
            raise
        mismatch = next((line.strip() for line in str(error).splitlines() if "mismatch" in line), None)
        raise UserError(
            f"the adapter {folder} does not fit the base {model.name_or_path} ({mismatch or reason(error)}); "
            "give its own base with --base"
        ) from error
    if not trainable:
        make_inference_adapters(model)
    return model


def _check_keys(model: PeftModel, name: str, stored: set[str]) -> None:
    """Raises ValueError unless the file's weights (`stored`, by name) are those that the adapter on `model` has.

    PEFT passes over names that it does not know and leaves weights that are missing as they began, without effect.
    """
    from peft import get_peft_model_state_dict

    expected = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    if unknown := stored - expected:
        raise ValueError(f"{len(unknown)} of its {len(stored)} weights have no place there, such as {min(unknown)}")
    if missing := expected - stored:
        raise ValueError(f"it lacks {len(missing)} of {len(expected)} weights, such as {min(missing)}")


def make_inference_adapters(model: PeftModel) -> None:
    """Make all adapters on a base cheap to use, in place: its data type, and `lora_inference`. They train no more."""
    from common.models import lora_inference

    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            parameter.data = parameter.data.to(model.dtype)
    lora_inference.install(model)


def fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits that tell one base from another: its shape, some embedding rows and its norms, as bfloat16.

    Those weights stay unquantised in a 4-bit model and bfloat16 in all, so every way of loading a base agrees.
    """
    import torch
    from accelerate.utils import align_module_device

    config = model.config.get_text_config()
    shape = [model.config.model_type, config.vocab_size, getattr(config, "hidden_size", 0)]
    digest = hashlib.sha256(json.dumps(shape).encode())
    names = [name for name, _ in model.named_parameters() if "norm" in name or "ln_" in name]
    owners = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    for module, name in [(model.get_input_embeddings(), "weight"), *owners]:
        with align_module_device(module):  # fetches a weight that is offloaded
            weight = getattr(module, name).detach()
            sample = (weight if weight.ndim == 1 else weight[:256]).to("cpu", torch.bfloat16)
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def identity(source: ModelSource) -> list[Any]:
    """What tells the answers of a model from those of another one, as JSON."""
    engine = [source.engine] if source.engine != TORCH else []
    return [adapter_hash(source.model_dir), source.base, source.load_in_4bit, source.dtype, *engine]


def adapter_hash(folder: str | Path) -> str:
    """SHA-256 of the weights that a folder is run with: an adapter's, a plain model's, an ONNX export's or a GGUF's; of
    several files that of their hashes, of a Hub id the name's."""
    if gguf := gguf_import.file_of(folder):
        return gguf_import.sha256_of(gguf)
    for pattern in HASHED:
        if files := sorted(Path(folder).glob(pattern)):
            hashes = [gguf_import.sha256_of(file) for file in files]
            return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return hashlib.sha256(str(folder).encode()).hexdigest()
