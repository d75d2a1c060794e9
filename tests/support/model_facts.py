"""The tables of docs/models.md that are read off the families of the tests.

PYTHONPATH=.:tests python -m support.model_facts        # prints them, to be put into the page
"""

from __future__ import annotations

import torch
import transformers

from common.export import gguf_writer
from common.models import gguf_file, tokenizers
from common.vram import model_shape
from docs import models
from support.chat_templates import FAMILIES, tokenizer_of
from support.families import ARCHITECTURES, config_of


def templates() -> str:
    """A line for each chat template."""
    lines = []
    for name, family in FAMILIES.items():
        tokenizer = tokenizer_of(family)
        declared = tokenizer.convert_tokens_to_ids(list(family.declared))
        facts = models.facts_of_template(tokenizers.align(tokenizer, declared=declared))
        lines.append((name, *facts.values()))
    return _table(("template", *facts), lines)


def architectures() -> str:
    """A line for each architecture: the layers that an adapter is put on, and what is known of it beside."""
    lines = []
    for name in ARCHITECTURES:
        config = config_of(name, vocab_size=64, pad_token_id=0, eos_token_id=1)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        read = {"mistral", *(each.model_type for each in gguf_file.ARCHITECTURES.values())}  # as llama's
        text = config.get_text_config().model_type  # a GGUF is of the language model
        known = ((text, read), (text, gguf_writer.ARCHITECTURES), (config.model_type, model_shape.DENSE))
        cells = ("yes" if kind in names else "no" for kind, names in known)
        lines.append((name, f"`{config.model_type}`", *cells, models.lora(model)))
    return _table(("architecture", "`model_type`", "GGUF in", "GGUF out", "memory predicted", "LoRA is put on"), lines)


def _table(titles, lines) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *lines))


if __name__ == "__main__":
    print(templates(), architectures(), sep="\n\n")
