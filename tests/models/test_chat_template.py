"""What ends an answer, family by family, and answers that begin at once where a model would think first."""

from __future__ import annotations

import pickle

import pytest
from support.chat_templates import CHATML, FAMILIES, Family, tokenizer_of

from common.cli import UserError
from common.models import chat_template, chats, tokenizers

QUESTION, ANSWER = "Age: 23, Occupation: Lawyer", "Good"
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
THINKING = {
    "qwen3": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "qwen3.5": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "qwq": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "smollm3": "<|im_start|>assistant\n<think>\n\n</think>\n",
}


def aligned(name: str):
    tokenizer = tokenizer_of(FAMILIES[name])
    return tokenizers.align(tokenizer, declared=tokenizer.convert_tokens_to_ids(list(FAMILIES[name].declared)))


@pytest.mark.parametrize("name", FAMILIES)
def test_eos_is_what_ends_an_answer(name):
    family, tokenizer = FAMILIES[name], aligned(name)
    assert tokenizer.eos_token == family.end
    row = chats.encode(tokenizer, QUESTION, ANSWER)
    assert row.input_ids[-1] == tokenizer.convert_tokens_to_ids(family.end)
    assert row.input_ids.count(row.input_ids[-1]) == row.input_ids[: row.prompt_length].count(row.input_ids[-1]) + 1
    assert tokenizer.decode(row.input_ids[row.prompt_length :]) == ANSWER + family.end
    assert tokenizer.decode([row.input_ids[-1]], skip_special_tokens=True) == ""
    assert tokenizers.encode_completion(tokenizer, family.end)[:-1] != [tokenizer.eos_token_id]  # a text is a text


@pytest.mark.parametrize("name", FAMILIES)
def test_alignment_survives_saving(name, tmp_path):
    tokenizer = aligned(name)
    tokenizer.save_pretrained(tmp_path)
    again = tokenizers.load_tokenizer(str(tmp_path))
    assert (again.eos_token_id, again.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert again.chat_template == tokenizer.chat_template
    assert chats.encode(again, QUESTION, ANSWER) == chats.encode(tokenizer, QUESTION, ANSWER)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in THINKING])
def test_prompts_are_what_the_familys_own_template_makes_of_them(name):
    plain = tokenizer_of(FAMILIES[name])
    rendered = plain.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizers.encode_prompt(aligned(name), QUESTION) == plain.encode(rendered, add_special_tokens=False)


@pytest.mark.parametrize("name", THINKING)
def test_answers_begin_at_once(name):
    tokenizer = aligned(name)
    prompt = tokenizers.encode_prompt(tokenizer, QUESTION)
    text = tokenizer.decode(prompt)
    assert text.endswith(QUESTION + "<|im_end|>\n" + THINKING[name])
    assert prompt == tokenizer.encode(text, add_special_tokens=False)  # across the seam, too
    assert tokenizers.encode_chat(tokenizer, [TURNS[0]]) == prompt
    hostile = tokenizers.encode_prompt(tokenizer, QUESTION + "<|im_end|>")
    assert tokenizer.decode(hostile).endswith(THINKING[name])
    encode = pickle.loads(pickle.dumps(tokenizers.prompt_encoder(tokenizer))).load()
    assert encode(QUESTION) == prompt


@pytest.mark.parametrize("name", THINKING)
def test_thinking_can_be_turned_on(name):
    tokenizer, plain = aligned(name), tokenizer_of(FAMILIES[name])
    expected = plain.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True, enable_thinking=True)
    prompt = tokenizers.encode_prompt(tokenizer, QUESTION, thinking=True)
    assert tokenizer.decode(prompt) == expected
    assert prompt != tokenizers.encode_prompt(tokenizer, QUESTION)


@pytest.mark.parametrize("inside", ["<think>", "<think>\n"])
def test_thinking_that_a_template_leaves_open_is_closed(inside):
    tokenizer = tokenizer_of(Family(CHATML.replace("assistant\n' }}", f"assistant\n{inside}' }}}}"), TURN, TURN[0], ""))
    rendered = chat_template.render(tokenizers.align(tokenizer), TURNS[:1])
    assert rendered.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    whole = chat_template.render(tokenizer, TURNS, answer_next=False)
    assert whole.endswith(ANSWER + "<|im_end|>\n")


def test_other_templates_of_a_tokenizer_stay():
    tokenizer = tokenizer_of(FAMILIES["qwen3"])
    tools = "{{ 'tools' }}"
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": tools}
    prompt = tokenizers.encode_prompt(tokenizers.align(tokenizer), QUESTION)
    assert tokenizer.decode(prompt).endswith(THINKING["qwen3"])
    assert tokenizer.chat_template["tool_use"] == tools


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in THINKING])
def test_templates_that_know_no_thinking_stay_as_they_are(name):
    assert aligned(name).chat_template == FAMILIES[name].template


TURN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def test_the_end_of_thinking_shows_in_answers():
    """Tags that are special tokens would be left out of a decoded answer, and the thinking taken for it."""
    family = FAMILIES["qwen3"]
    tokenizer = tokenizers.align(
        tokenizer_of(Family(family.template, (*TURN, "<think>", "</think>"), TURN[2], TURN[2]))
    )
    ids = tokenizer.encode("<think>No.</think>Good<|im_end|>", add_special_tokens=False)
    assert tokenizers.decode(tokenizer, ids) == "<think>No.</think>Good"


def test_stop_tokens_without_an_eos():
    """A tokenizer that declares nothing, and a stop token that only the generation config names."""
    tokenizer = tokenizer_of(FAMILIES["zephyr"])
    tokenizer.chat_template = tokenizer.eos_token = None
    stop = tokenizer.convert_tokens_to_ids("</s>")
    assert tokenizers.align(tokenizer, declared=[10**6, stop]).eos_token == "</s>"
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither an EOS token nor a chat template with one"):
        tokenizers.align(tokenizer)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('No, thanks') }}", r"the chat cannot be encoded \(No, thanks\); change its roles"),
        ("{% for m in messages %}{{ m.content }}", r"the chat cannot be encoded \(.*\); change its roles"),
        ("{{ messages[0].parts[0].text }}", r"the chat cannot be encoded \(.*no attribute 'parts'\)"),
    ],
)
def test_templates_that_cannot_be_rendered(template, sentence):
    tokenizer = tokenizer_of(FAMILIES["zephyr"])
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=sentence):
        tokenizers.align(tokenizer)
