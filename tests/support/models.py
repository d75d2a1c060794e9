"""Tiny models of random weights, and what is asked of those that a test has trained."""

from __future__ import annotations

import json
from pathlib import Path


def build_base(folder: Path, tokenizer, embeddings: float = 0.02, **shape: int) -> str:
    from common.training import miniature

    model = miniature.build_model(tokenizer, **({"hidden": 32, "layers": 2, "heads": 4, "seed": 0} | shape))
    model.get_input_embeddings().weight.data *= embeddings / 0.02
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sentencepiece_tokenizer():
    """One of characters and bytes that decodes as Llama 2's and Mistral's: a text loses the space that it begins with.

    `<think>` and `</think>` are special tokens.
    """
    import string

    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.printable[:94]]
    backend = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(back)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    made.chat_template = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    return made


def weights(folder: str | Path) -> dict:
    """The adapter's tensors by name."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter_model.safetensors")


def distance(one: str | Path, other: str | Path) -> float:
    """The largest difference between two adapters' weights."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def run_json(folder: str | Path) -> dict:
    return json.loads((Path(folder) / "run.json").read_text())
