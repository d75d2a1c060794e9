"""Compact chat templates with the structure of those of today's model families, and a tokenizer for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from support.inputs import CORPUS

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user') }}{% endif %}{% endfor %}"
)
# Thinks unless it is told not to; an answer of the past has no thinking, the last one an empty one.
SWITCH = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
# The same, but thinking is open where the answer begins.
OPEN_SWITCH = SWITCH.replace("</think>\n\n' }}{% endif %}{% endif %}", "</think>\n\n' }}{% else %}{{ '<think>\n' }}{% endif %}{% endif %}")  # fmt: skip  # noqa: E501
# Always thinks.
ALWAYS = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
SMOLLM3 = (
    "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{{ '<|im_start|>system\nReasoning Mode: ' + ('/think' if enable_thinking else '/no_think') + '<|im_end|>\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if not enable_thinking %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """How the models of a family are asked, and what their files declare.

    Attributes:
        special, plain: added tokens; the first special one is BOS.
        eos: that the tokenizer declares.
        declared: stop tokens of the generation config.
        end: what really ends an answer.
    """

    template: str
    special: tuple[str, ...]
    eos: str
    end: str
    declared: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()


TURNS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FAMILIES = {
    "qwen2.5": Family(SYSTEM + CHATML, TURNS, "<|im_end|>", "<|im_end|>", ("<|im_end|>", "<|endoftext|>")),
    "qwen2.5 base": Family(SYSTEM + CHATML, TURNS, "<|endoftext|>", "<|im_end|>", ("<|endoftext|>",)),
    "qwen3": Family(SWITCH, TURNS, "<|im_end|>", "<|im_end|>", plain=("<think>", "</think>")),
    "qwen3.5": Family(OPEN_SWITCH, TURNS, "<|im_end|>", "<|im_end|>", plain=("<think>", "</think>")),
    "qwq": Family(ALWAYS, TURNS, "<|im_end|>", "<|im_end|>", plain=("<think>", "</think>")),
    "smollm2 with another eos": Family(
        SYSTEM + CHATML, TURNS, "<|endoftext|>", "<|im_end|>", ("<|endoftext|>", "<|im_end|>")
    ),
    "smollm3": Family(SMOLLM3, TURNS, "<|im_end|>", "<|im_end|>", plain=("<think>", "</think>")),
    "llama 3": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|eom_id|>",
            "<|eot_id|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
        ),
        "<|end_of_text|>",
        "<|eot_id|>",
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "llama 2": Family(
        ALTERNATE
        + "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        "</s>",
        "</s>",
    ),
    "mistral": Family(
        ALTERNATE + "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "</s>",
        "</s>",
    ),
    "gemma": Family(
        "{{ bos_token }}" + ALTERNATE + "{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "<end_of_turn>",
        ("<eos>", "<end_of_turn>"),
        plain=("\n", "\n\n"),
    ),
    "phi 3": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<s>", "<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
        "<|endoftext|>",
        "<|end|>",
        ("<|endoftext|>", "<|assistant|>", "<|end|>"),
    ),
    "zephyr": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        "</s>",
        "</s>",
    ),
    "granite": Family(
        "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content }}"
        "{{ '<|end_of_text|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
        "<|end_of_text|>",
        "<|end_of_text|>",
    ),
    "lfm2": Family(
        "{{ bos_token }}" + CHATML,
        ("<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        "<|im_end|>",
    ),
    "deepseek": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}"
        "{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
    "command": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
        "{{ '<|USER_TOKEN|>' if m.role == 'user' else '<|CHATBOT_TOKEN|>' }}"
        "{{ m.content | trim + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        (
            "<BOS_TOKEN>",
            "<EOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
        ),
        "<EOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "falcon 3": Family(
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content + '\n' }}{% else %}"
        "{{ '<|assistant|>\n' + m.content + eos_token + ('' if loop.last else '\n') }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        ("<|endoftext|>", "<|user|>", "<|assistant|>"),
        "<|endoftext|>",
        "<|endoftext|>",
    ),
    "falcon, nothing after a turn": Family(
        "{% for m in messages %}{{ ('' if loop.first else '\n') + m.role | capitalize + ': ' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nAssistant:' }}{% endif %}",
        ("<|endoftext|>",),
        "<|endoftext|>",
        "<|endoftext|>",
    ),
    "glm 4, ended by the next user": Family(
        "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        ("[gMASK]", "<sop>", "<|endoftext|>", "<|user|>", "<|assistant|>"),
        "<|endoftext|>",
        "<|user|>",
        ("<|endoftext|>", "<|user|>"),
    ),
    "nothing after a turn, user token": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>"),
        "<|endoftext|>",
        "<|endoftext|>",
    ),
    "closed only before another turn": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[U]' + m.content + '[A]' }}{% else %}"
        "{{ m.content + ('' if loop.last else '<sep>') }}{% endif %}{% endfor %}",
        ("<s>", "</s>", "[U]", "[A]", "<sep>"),
        "</s>",
        "<sep>",
    ),
    "an end that is not special": Family(
        CHATML.replace("<|im_end|>", "<end>"), TURNS, "<|endoftext|>", "<end>", plain=("<end>", "<tool>")
    ),
    "one question only": Family(
        "{% if messages | length > 2 %}{{ raise_exception('one question, one answer') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        ("</s>",),
        "</s>",
        "</s>",
    ),
    "it passes over answers": Family(
        "{% for m in messages if m.role == 'user' %}{{ '<|im_start|>' + m.content }}{% endfor %}",
        TURNS,
        "<|endoftext|>",
        "<|endoftext|>",
    ),
}


def tokenizer_of(family: Family, corpus: Sequence[str] = CORPUS):
    """A byte-level tokenizer with the family's added tokens and template, as its files declare them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(family.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=family.special[0], eos_token=family.eos)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in family.plain])
    tokenizer.chat_template = family.template
    return tokenizer
