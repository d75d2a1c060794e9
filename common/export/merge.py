"""A plain transformers folder from an adapter and its base, tensor by tensor, so that memory holds one shard at a time.

An adapter that was trained on a base in 4 bits has seen that base's rounding errors and made up for them. So there are
two bases that it can be merged into: the original 16-bit weights, or what the 4-bit weights stand for (NF4 quantised
and de-quantised), on which the result stays closest to what was trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import UserError, reason
from common.files import grant, read_json, write_json
from common.models import adapters
from common.models import loading as models
from common.models.source import unreadable
from common.models.tokenizers import load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NF4_BLOCK = 64  # weights that share a scale, as bitsandbytes has it in a model
# what an image is made ready by
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt")


def check_architecture(folder: str | Path, form: str, known: Collection[str], *, text: bool = False) -> str:
    """The model type of a folder, which must be one of those that a format is `known` to be for.

    Args:
        text: of its language model, whatever it has beside that.

    Raises:
        UserError: it is another; the sentence names `form` and those.
    """
    config = read_json(Path(folder) / "config.json")
    kind = (text and config.get("text_config", {}).get("model_type")) or config.get("model_type")
    if kind not in known:
        raise UserError(
            f"{form} is for the architectures {', '.join(known)}, and {folder} is {kind}; use --format merged"
        )
    return kind


class Checkpoint:
    """The tensors of a safetensors folder, by name, read one at a time.

    Attributes:
        folder: where they are.
        shapes: of each tensor, in the order of the files.

    Raises:
        UserError: no safetensors there, or a damaged file.
    """

    def __init__(self, folder: str | Path) -> None:
        from safetensors import SafetensorError

        self.folder = Path(folder)
        if (self.folder / INDEX).is_file():
            files = sorted(set(json.loads((self.folder / INDEX).read_text())["weight_map"].values()))
        elif (self.folder / SINGLE).is_file():
            files = [SINGLE]
        else:
            raise UserError(f"{folder} has no {SINGLE}; give a model whose weights are stored as safetensors")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, str] = {}
        try:
            for file in files:
                with self._open(file) as handle:
                    for name in handle.keys():  # noqa: SIM118 (not a dict)
                        self.shapes[name] = tuple(handle.get_slice(name).get_shape())
                        self._files[name] = file
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.folder / file} is damaged or missing ({error}); copy or download it again"
            ) from error

    def _open(self, file: str, framework: str = "numpy"):
        from safetensors import safe_open

        return safe_open(self.folder / file, framework=framework)

    @property
    def numbers(self) -> int:
        """How many numbers all tensors have together."""
        return sum(_numbers(shape) for shape in self.shapes.values())

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        with self._open(self._files[name], "pt") as handle:
            return handle.get_tensor(name)


def _numbers(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def local_base(name: str) -> Path:
    """The folder of a base model, which is fetched from the Hub where the name is an id.

    Raises:
        UserError: it cannot be had.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(DOWNLOADED)))
    except Exception as error:  # of the network, the Hub or the cache
        raise UserError(f"the base {name} cannot be fetched ({reason(error)}); give its folder with --base") from error


class Deltas:
    """What a LoRA adapter adds to its base's weights: `alpha / r` x B A for each of its layers (Hu et al. 2021).

    Raises:
        UserError: an adapter of another kind, or damaged weights.
    """

    def __init__(self, folder: str | Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config = adapters.check_mergeable(folder)
        self.scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
        self.transposed = bool(config.get("fan_in_fan_out"))  # GPT-2 stores its weights as [in, out]
        file = Path(folder) / adapters.ADAPTER_WEIGHTS
        try:
            weights = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} is damaged or missing ({error}); copy it again, or train the adapter again"
            ) from error
        self._factors = {}
        for name in [name for name in weights if name.endswith(".lora_A.weight")]:
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            self._factors[f"{layer}.weight"] = weights.pop(name), weights.pop(name.replace("lora_A", "lora_B"))
        if weights:
            raise UserError(f"the adapter {folder} holds {next(iter(weights))}; only LoRA's own weights can be merged")
        self.names = set(self._factors)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, in] and B [out, rank] of a weight."""
        return self._factors[name]

    def add_to(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The merged weight [out, in], in float32, or [in, out] where the model stores it so."""
        a, b = self._factors[name]
        if self.transposed:
            return weight.float().addmm_(a.float().t(), b.float().t(), alpha=self.scale)
        return weight.float().addmm_(b.float(), a.float(), alpha=self.scale)


def empty_model(base: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder without its weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        with init_empty_weights():
            return AutoModelForCausalLM.from_config(
                models.without_stray_pad(config), trust_remote_code=trust_remote_code
            )
    except (*unreadable(), KeyError) as error:
        raise UserError(
            f"{base} is of no known architecture ({reason(error)}); give a causal language model"
        ) from error


def texts_of(
    model_dir: str, base: Path, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What of a model is no weight: itself without any, its configs aligned, and its tokenizer."""
    from transformers import GenerationConfig

    empty = empty_model(base, trust_remote_code)
    tokenizer = load_tokenizer(adapters.tokenizer_folder(model_dir, str(base)), trust_remote_code=trust_remote_code)
    if (base / "generation_config.json").is_file():
        empty.generation_config = GenerationConfig.from_pretrained(base)
    models.align_model(empty, tokenizer)
    return empty, tokenizer


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """What a weight stands for in a 4-bit base: NF4 with double quantisation (Dettmers et al. 2023), as bfloat16."""
    import torch
    from bitsandbytes import functional

    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantised, state = functional.quantize_4bit(
        weight.to(device, torch.bfloat16), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return functional.dequantize_4bit(quantised, state).cpu()


def merge(
    model_dir: str,
    base: Path,
    target: Path,
    *,
    dtype: str,
    from_nf4: bool,
    max_shard_bytes: int,
    trust_remote_code: bool = False,
) -> None:
    """Write `model_dir` on its base as a plain model: weights in shards, config, generation config and tokenizer.

    Args:
        model_dir: an adapter, or a whole model, which is only written anew.
        base: the folder of its base, `model_dir` itself for a whole model.
        target: an existing folder.
        dtype: of the weights; the sums are made in float32.
        from_nf4: merge into the de-quantised NF4 base.
        max_shard_bytes: of one file, and so about half of the memory needed; a tensor is never cut.

    Raises:
        UserError: the adapter or its base cannot be merged.
    """
    import torch

    empty, tokenizer = texts_of(model_dir, base, trust_remote_code)
    quantised = _quantised_in_4bit(empty) if from_nf4 else set()
    checkpoint = Checkpoint(base)
    places = places_in(empty, checkpoint.shapes)
    deltas = deltas_on(model_dir, places.values())

    def merged(name: str) -> torch.Tensor:
        weight, place = checkpoint.read(name), places[name]
        if place in quantised:
            weight = through_nf4(weight)
        return deltas.add_to(place, weight) if deltas and place in deltas.names else weight

    number_type = getattr(torch, dtype)
    _write_weights(checkpoint, merged, target, number_type, max_shard_bytes)
    config = _with_the_rest(empty.config, base, trust_remote_code)
    config.dtype = number_type
    config.save_pretrained(target)
    for name in PROCESSORS:
        if (base / name).is_file():
            shutil.copy(base / name, target / name)
    empty.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _with_the_rest(config: PreTrainedConfig, base: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """A language model's config within its base's, where that has more: a vision tower, whose weights stay, too.

    Some such families are loaded as their language model alone (Qwen3.5), others whole (Gemma 3).
    """
    whole = models.whole_config(str(base), trust_remote_code)
    if config is not config.get_text_config() or whole is whole.get_text_config():
        return config
    part = next(name for name in whole.sub_configs if getattr(whole, name) is whole.get_text_config())
    setattr(whole, part, config)
    return whole


def deltas_on(model_dir: str, weights: Iterable[str]) -> Deltas | None:
    """What an adapter adds to its base's weights, which are given by name; None for a whole model.

    Raises:
        UserError: an adapter of another kind, or of another base.
    """
    deltas = Deltas(model_dir) if adapters.is_adapter(model_dir) else None
    if deltas and (missing := deltas.names.difference(weights)):
        raise UserError(
            f"the adapter {model_dir} has {min(missing)}, which its base has not; give its base with --base"
        )
    return deltas


def places_in(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Where in a model the tensors of a file go: {their name there: the parameter's name}.

    Models with a vision tower are stored under other names than they have in memory. A tensor that is only a part of a
    parameter keeps its own.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    changes = get_model_conversion_mapping(model)
    parts = [change for change in changes if isinstance(change, WeightConverter)]
    renamed = [change for change in changes if not isinstance(change, WeightConverter)]
    parameters = model.state_dict()

    def place(name: str) -> str:
        found, part = rename_source_key(name, renamed, parts, model.base_model_prefix, parameters)
        return name if part else found

    return {name: place(name) for name in names}


def _quantised_in_4bit(model: PreTrainedModel) -> set[str]:
    """Names of the weights that a 4-bit base holds in NF4: those of all linear layers but the head."""
    import torch

    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def _write_weights(
    checkpoint: Checkpoint,
    merged: Callable[[str], torch.Tensor],
    target: Path,
    number_type: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Write `merged` of every tensor in shards, one after the other, and their index."""
    from safetensors.torch import save_file

    shards = list(_shards(checkpoint, max_shard_bytes // number_type.itemsize))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard = {name: merged(name).to(number_type).contiguous() for name in names}
        weight_map |= dict.fromkeys(names, file)
        save_file(shard, target / file, metadata={"format": "pt"})
        grant(target / file)
        shard.clear()
    if len(shards) > 1:
        total = checkpoint.numbers * number_type.itemsize
        write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(checkpoint: Checkpoint, most: int) -> Iterator[list[str]]:
    """Names of tensors that go into one file of at most that many numbers."""
    names: list[str] = []
    room = most
    for name, shape in checkpoint.shapes.items():
        if names and _numbers(shape) > room:
            yield names
            names, room = [], most
        names.append(name)
        room -= _numbers(shape)
    yield names
