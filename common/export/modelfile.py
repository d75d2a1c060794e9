"""An Ollama Modelfile: what makes Ollama answer with a GGUF as this toolkit does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELFILE = "Modelfile"
LONGEST_CONTEXT = 8192  # Ollama takes the memory of all of it at once


def modelfile(
    tokenizer: PreTrainedTokenizerBase, gguf_file: str, stop: Sequence[str], context: int, adapter: str | None = None
) -> str:
    """The chat template in Ollama's form, its default system text, the stop tokens, and greedy decoding.

    Args:
        gguf_file: the model's, beside the Modelfile.
        stop: the text of every token that ends an answer.
        context: tokens that the model can read; Ollama's own default is shorter.
        adapter: the file of an adapter that is put on the model.
    """
    lines = [f"FROM ./{gguf_file}"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")
    if tokenizer.chat_template:
        template, system = _ollama_template(tokenizer)
        lines.append(f'TEMPLATE """{template}"""')
        if system:
            lines.append(f'SYSTEM """{system}"""')
    else:
        lines.append('TEMPLATE """{{ .Prompt }}\n{{ .Response }}"""')  # as `tokenizers.encode_prompt` has it
    lines += [f"PARAMETER stop {json.dumps(token)}" for token in stop]
    lines += [
        f"PARAMETER num_ctx {min(context, LONGEST_CONTEXT)}",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
    ]
    return "\n".join(lines) + "\n"


def _ollama_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(template, default system text): the frames of the turns are found by rendering turns whose texts are known."""
    marks = {"system": "\u2402s", "user": "\u2402u", "assistant": "\u2402a"}

    def render(*roles: str, answering: bool = False) -> str:
        turns = [{"role": role, "content": marks[role]} for role in roles]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answering)

    def between(text: str, first: str, last: str) -> str:
        return text.partition(marks[first])[2].partition(marks[last])[0]

    after_answer = render("user", "assistant").partition(marks["assistant"])[2]
    before_user = between(render("user", "assistant", "user"), "assistant", "user").removeprefix(after_answer)
    after_user = render("user", answering=True).partition(marks["user"])[2]
    before_system = render("system", "user").partition(marks["system"])[0]
    after_system = between(render("system", "user"), "system", "user").removesuffix(before_user)
    start = render("user").partition(marks["user"])[0].removesuffix(before_user)
    system = start.removeprefix(before_system).removesuffix(after_system) if start else ""
    return (
        f"{{{{ if .System }}}}{before_system}{{{{ .System }}}}{after_system}{{{{ end }}}}"
        f"{before_user}{{{{ .Prompt }}}}{after_user}{{{{ .Response }}}}{after_answer}"
    ), system
