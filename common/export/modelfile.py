"""An Ollama Modelfile: what makes Ollama answer with a GGUF as this toolkit does."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.cli import UserError
from common.export.gguf_vocabulary import adds_bos
from common.models import chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELFILE = "Modelfile"
LONGEST_CONTEXT = 8192  # Ollama and onnxruntime-genai take the memory of all of it at once


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
    """(template, default system text): the frames of the turns are found by rendering turns whose texts are known.

    BOS is left out where llama.cpp puts it first itself.
    """
    marks = {"system": "\u2402s", "user": "\u2402u", "assistant": "\u2402a"}
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""

    def render(*roles: str, answering: bool = False) -> str:
        turns = [{"role": role, "content": marks[role]} for role in roles]
        return chat_template.render(tokenizer, turns, answer_next=answering)

    def between(text: str, first: str, last: str) -> str:
        return text.partition(marks[first])[2].partition(marks[last])[0]

    after_user = render("user", answering=True).partition(marks["user"])[2]
    after_answer = render("user", "assistant").partition(marks["assistant"])[2]
    start = render("user").partition(marks["user"])[0]
    before_user = start.removeprefix(bos)
    with contextlib.suppress(UserError):  # it takes one question
        later = between(render("user", "assistant", "user"), "assistant", "user").removeprefix(after_answer)
        before_user = later if later and start.endswith(later) else before_user
    start = start.removesuffix(before_user).removeprefix(bos)
    opening, system = start + before_user, ""
    with contextlib.suppress(UserError):  # it takes no system
        text = render("system", "user")
        before, after = text.partition(marks["system"])[0].removeprefix(bos), between(text, "system", "user")
        if marks["system"] in text:
            opening, system = _with_system(start, before_user, before, after)
    return f"{opening}{{{{ .Prompt }}}}{after_user}{{{{ .Response }}}}{after_answer}", system


def _with_system(start: str, before_user: str, before: str, after: str) -> tuple[str, str]:
    """(what stands before a prompt, the default system text).

    Args:
        start: of a chat without a system text.
        before_user: its first turn's beginning.
        before, after: the system text, up to the prompt.
    """
    plain = start + before_user
    if before == plain:  # it stands in the user's turn, as Gemma has it
        return f"{before}{{{{ if .System }}}}{{{{ .System }}}}{after}{{{{ end }}}}", ""
    if not after.endswith(before_user):
        return f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{plain}{{{{ end }}}}", ""
    after = after.removesuffix(before_user)
    fits = start.startswith(before) and start.endswith(after) and len(start) >= len(before) + len(after)
    system = start[len(before) : len(start) - len(after)] if start and fits else ""
    otherwise = f"{{{{ else }}}}{start}" if start and not fits else ""
    return f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{otherwise}{{{{ end }}}}{before_user}", system
