"""A decoder's sizes, from its config alone: no weights, no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import UserError, reason
from common.models import gguf_import, loading
from common.models.batching import UNLIMITED

QWEN_3B = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "model_type": "qwen2",
}
QWEN_7B = QWEN_3B | {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
KNOWN = {  # so that these need neither weights nor network
    "Qwen/Qwen2.5-3B-Instruct": QWEN_3B,
    "Qwen/Qwen2.5-Coder-3B": QWEN_3B,
    "Qwen/Qwen2.5-7B-Instruct": QWEN_7B,
}

# Kinds whose parameters are counted rightly below (a test counts them on models); others are counted when asked for.
DENSE = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma3_text", "smollm3"})
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
TOLERANCE = 0.02  # of the parameters, in norms and biases that are not counted


class UnknownShape(UserError):
    """No config, or one of another architecture than a dense decoder with gated MLPs (Llama, Mistral, Qwen, ...)."""


@dataclass(frozen=True)
class ModelShape:
    """Of a dense decoder with grouped-query attention and gated MLPs."""

    vocabulary: int  # rows of the embedding, padding included
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool  # the LM head is the embedding
    qkv_bias: bool
    context: int  # tokens
    reads_prefix_trees: bool  # as `common.models.loading.reads_prefix_trees`

    @property
    def query(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of the keys, or the values, of all their heads."""
        return self.kv_heads * self.head_dim

    @property
    def large(self) -> bool:
        """As `common.models.loading.is_large`."""
        return 12 * self.layers * self.hidden**2 >= loading.LARGE

    @property
    def projections(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's matrices: q, k, v, o, gate, up, down."""
        d, f = self.hidden, self.intermediate
        attention = [(d, self.query), (d, self.key), (d, self.key), (self.query, d)]
        return [*attention, (d, f), (d, f), (f, d)]

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters by part: "embeddings", "head" (0 where tied), "linear", "biases", "norms"."""
        return {
            "embeddings": self.vocabulary * self.hidden,
            "head": 0 if self.tied else self.vocabulary * self.hidden,
            "linear": self.layers * sum(inputs * outputs for inputs, outputs in self.projections),
            "biases": self.layers * (self.query + 2 * self.key) * self.qkv_bias,
            "norms": (2 * self.layers + 1) * self.hidden,
        }

    def lora_parameters(self, rank: int) -> int:
        """Of an adapter on all `projections`: A is [rank, inputs], B [outputs, rank]."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.projections)


def from_config(config: dict[str, Any]) -> ModelShape:
    """The shape that config.json's keys describe.

    Raises:
        UnknownShape: another architecture, or no config.
    """
    config = config.get("text_config", config) if isinstance(config, dict) else config
    if not isinstance(config, dict):
        raise UnknownShape("a model's config is a JSON object")
    kind = config.get("model_type", "a model without model_type")
    dense = not any("expert" in name and config[name] for name in config)
    dense = dense and set(config.get("layer_types") or ()) <= ATTENTION
    sizes = [config.get(name) for name in SIZES]
    sizes += [size for name in OPTIONAL_SIZES if (size := config.get(name))]
    if not dense or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise UnknownShape(f"the memory of {kind} cannot be predicted; only dense decoders with gated MLPs are known")
    heads = config["num_attention_heads"]
    return ModelShape(
        vocabulary=config["vocab_size"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        # what transformers takes for a key that is not there
        tied=config.get("tie_word_embeddings", kind.startswith("gemma")),
        qkv_bias=config.get("attention_bias", kind == "qwen2"),
        context=config.get("max_position_embeddings") or UNLIMITED,
        reads_prefix_trees=loading.reads_prefix_trees(config),
    )


def _check_by_counting(name: str, shape: ModelShape, trust_remote_code: bool) -> None:
    """Raises UnknownShape unless a model without weights (on the meta device) has about as many parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    expected = sum(shape.parameters().values())
    try:
        config = loading.without_stray_pad(loading.whole_config(name, trust_remote_code))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # of any model's code
        raise UnknownShape(f"the memory of {name} cannot be predicted ({reason(error)})") from error
    counted = sum(parameter.numel() for parameter in model.parameters())
    if abs(counted - expected) > TOLERANCE * counted:
        raise UnknownShape(
            f"the memory of {config.model_type} cannot be predicted: it has {counted:,} parameters, "
            f"where a dense decoder with gated MLPs has {expected:,}"
        )


def of(name_or_path: str, *, trust_remote_code: bool = False) -> ModelShape:
    """The shape of a model folder, a GGUF (here or on the Hub), one of the KNOWN, or a Hub id whose config can be had.

    Raises:
        UnknownShape: see there.
    """
    path = Path(name_or_path) / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            shape = from_config(config)
        except (ValueError, KeyError, TypeError) as error:
            raise UnknownShape(f"{path} is not a model's config ({error})") from error
    elif name_or_path in KNOWN:
        return from_config(KNOWN[name_or_path])
    elif gguf := gguf_import.named_gguf(name_or_path):
        config = gguf_import.config_of(gguf).to_dict()
        shape = from_config(config)
    else:
        try:
            config = loading.whole_config(name_or_path, trust_remote_code).to_dict()
        except UserError as error:
            raise UnknownShape(str(error)) from error
        shape = from_config(config)
    if config.get("model_type") not in DENSE:
        _check_by_counting(name_or_path, shape, trust_remote_code)
    return shape
