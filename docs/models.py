"""Facts of bases, read off by the code that trains and asks them: python -m docs.models FOLDER ...

Prints a Markdown table with a column for each model folder, GGUF file or Hub id; weights are not read. `docs/models.md`
has it of the bases that were run here, and of the families of the tests.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from common import cli
from common.models import adapters, chat_template, loading, tokenizers
from common.tasks.ranking.creditmix import CREDITMIX

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUESTION = "\u2402"


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="python -m docs.models")
    parser.add_argument("models", nargs="+", metavar="FOLDER", help="a model folder, GGUF file or Hub id")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    print(table({name: facts_of(name) for name in args.models}))


def facts_of(name: str) -> dict[str, str]:
    """What is known of a base without its weights.

    Raises:
        UserError: it has no config or no tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = loading.whole_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tokenizer = tokenizers.load_tokenizer(name)
    return {
        "architecture": f"`{config.model_type}`",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:,.1f} million",
        "context": f"{config.get_text_config().max_position_embeddings:,} tokens",
        **facts_of_template(tokenizer),
        "tokens of CreditMix's labels": label_tokens(tokenizer),
        "LoRA is put on": lora(model),
    }


def facts_of_template(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """How a model with this aligned tokenizer is asked, and what ends its answer."""
    written = QUESTION + "\n"  # as `tokenizers.encode_prompt` has it of a base without a chat template
    if tokenizer.chat_template:
        written = chat_template.render(tokenizer, [{"role": "user", "content": QUESTION}])
    return {
        "before an answer": code(written.rpartition(QUESTION)[2]),
        "end of the turn": code(tokenizer.eos_token),
        "PAD": code(tokenizer.pad_token),
        "thinking": "off; `--thinking on`" if chat_template.thinks(tokenizer) else "none",
    }


def label_tokens(tokenizer: PreTrainedTokenizerBase) -> str:
    """How many tokens each label is, without and with a leading space."""
    counts = {
        label: [len(tokenizer.encode(form, add_special_tokens=False)) for form in (label, f" {label}")]
        for label in CREDITMIX.labels
    }
    return ", ".join(f"{label} {alone}/{spaced}" for label, (alone, spaced) in counts.items())


def lora(model: PreTrainedModel) -> str:
    """The names of the layers that an adapter is put on."""
    return ", ".join(f"`{target}`" for target in adapters.lora_targets(model))


def code(text: str) -> str:
    """A text inside Markdown's backticks, line ends as they are escaped."""
    shown = text.replace("\n", "\\n").replace("|", "\\|")
    return f"`{shown}`" if shown.strip() else "nothing"


def table(columns: Mapping[str, Mapping[str, str]]) -> str:
    """Facts by name, as a Markdown table with a line for each fact."""
    facts = list(dict.fromkeys(fact for column in columns.values() for fact in column))
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    lines += [f"| {fact} | {' | '.join(column[fact] for column in columns.values())} |" for fact in facts]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
