"""An Ollama Modelfile: its template filled in is what the chat template writes."""

from __future__ import annotations

import re

import pytest
from support.chat_templates import FAMILIES, tokenizer_of
from tokenizers import processors

from common.cli import UserError
from common.export.modelfile import modelfile
from common.models import chat_template, tokenizers

IN_USERS_TURN = (  # as Gemma's own has it
    "{{ bos_token }}{% set begin = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ (begin if loop.first else '') + m.content + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def parts(tokenizer) -> tuple[str, str]:
    """The template and the default system text of a Modelfile."""
    text = modelfile(tokenizer, "model-F16.gguf", [tokenizer.eos_token], 2048)
    system = re.search(r'SYSTEM """(.*?)"""', text, re.DOTALL)
    return re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1], system[1] if system else ""


def filled(template: str, system: str, *turns: str) -> str:
    """What Ollama makes of questions and answers: the template for each pair, the system text in the first."""
    written = ""
    for number in range(0, len(turns), 2):
        question, answer = turns[number], turns[number + 1] if number + 1 < len(turns) else None
        given = system if number == 0 else ""
        piece = re.sub(
            r"{{ if .System }}(.*?)(?:{{ else }}(.*?))?{{ end }}",
            lambda found, given=given: (found[1] if given else found[2]) or "",
            template,
            flags=re.DOTALL,
        )
        piece = piece.replace("{{ .System }}", given).replace("{{ .Prompt }}", question)
        written += piece.partition("{{ .Response }}")[0] if answer is None else piece.replace("{{ .Response }}", answer)
    return written


def rendered(tokenizer, system: str, *turns: str) -> str:
    chat = [{"role": "system", "content": system}] * bool(system)
    chat += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return chat_template.render(tokenizer, chat)


def test_modelfile(tokenizer):
    text = modelfile(tokenizer, "model-F16.gguf", ["<|im_end|>", "<|endoftext|>"], 2048)
    assert text.startswith("FROM ./model-F16.gguf\nTEMPLATE")
    assert text.endswith(
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n'
        "PARAMETER num_ctx 2048\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1\n"
    )
    template, default = parts(tokenizer)
    assert filled(template, default, "Hi") == rendered(tokenizer, "", "Hi")
    assert filled(template, "Be brief.", "Hi", "Yes", "So?") == rendered(tokenizer, "Be brief.", "Hi", "Yes", "So?")
    assert template.endswith("{{ .Response }}<|im_end|>\n")


def test_a_modelfile_of_a_long_context_and_an_adapter(tokenizer):
    text = modelfile(tokenizer, "base.gguf", ["</s>"], 1 << 17, "adapter.gguf")
    assert text.startswith("FROM ./base.gguf\nADAPTER ./adapter.gguf\n") and "PARAMETER num_ctx 8192\n" in text


@pytest.mark.parametrize("bos", ["put first", "left to the template"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_question_as_the_chat_template_has_it(name, bos):
    """Without the BOS that llama.cpp puts first itself, and with a system text where the template takes one."""
    tokenizer = tokenizer_of(FAMILIES[name])
    if bos == "put first":
        ends = [(tokenizer.bos_token, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=ends
        )
    declared = tokenizer.convert_tokens_to_ids(list(FAMILIES[name].declared))
    tokenizer = tokenizers.align(tokenizer, declared=declared)
    template, default = parts(tokenizer)
    expected = rendered(tokenizer, "", "Hi")
    if bos == "put first" and not template.startswith(tokenizer.bos_token):
        expected = expected.removeprefix(tokenizer.bos_token)
    assert filled(template, default, "Hi") == expected
    try:
        expected = rendered(tokenizer, "Be brief.", "Hi")
    except UserError:
        assert "{{ .System }}" not in template and not default
        return
    if bos == "put first":
        expected = expected.removeprefix(tokenizer.bos_token)
    if "Be brief." in expected:
        assert filled(template, "Be brief.", "Hi") == expected


def test_a_system_text_in_the_users_turn():
    tokenizer = tokenizer_of(FAMILIES["gemma"])
    ends = [("<bos>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=ends)
    tokenizer.chat_template = IN_USERS_TURN
    tokenizer = tokenizers.align(tokenizer)
    template, default = parts(tokenizer)
    assert default == "" and template.startswith("<start_of_turn>user\n{{ if .System }}{{ .System }}\n\n{{ end }}")
    for system in ("", "Be brief."):
        for turns in (("Hi",), ("Hi", "Yes", "So?")):
            assert "<bos>" + filled(template, system, *turns) == rendered(tokenizer, system, *turns)
