"""Chats as training rows: which tokens are learnt, family by family, and what a chat loses that is too long."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files

import pytest
from support.chat_templates import CHATML, FAMILIES, SYSTEM, TURNS, Family, tokenizer_of
from support.inputs import SHARED

from common.cli import UserError
from common.models import chats, tokenizers
from common.models.tokenizers import Encoded

CHAT = [
    {"role": "user", "content": "Age: 23?"},
    {"role": "assistant", "content": "Good. It is\nGood"},
    {"role": "user", "content": "And 24?"},
    {"role": "assistant", "content": "Standard"},
    {"role": "user", "content": "Good"},
]
ANSWER = "Bad"
ANSWERS = ["Good. It is\nGood", "Standard", ANSWER]
NO_CHATS = {"one question only", "it passes over answers"}
# Of these families a chat's earlier answers stand otherwise than an answer that is asked for.
HISTORY = {"qwen3", "qwen3.5", "qwq", "smollm3"}
OPEN_ENDED = {"falcon, nothing after a turn", "nothing after a turn, user token"}  # which write no end of a turn
REAL = {  # chat templates of the models' own files, as TRL has them, each with another in which {% generation %} stands
    "qwen2_5": "qwen2.5", "qwen3_instruct_2507": "qwen3", "qwen3_8": "qwen3.5", "llama3": "llama 3", "gemma": "gemma",
    "gemma3": "gemma", "phi3": "phi 3", "phi3_5": "phi 3", "lfm2": "lfm2", "lfm2_v2": "lfm2", "cohere": "command",
}  # fmt: skip


def aligned(family: Family):
    tokenizer = tokenizer_of(family)
    return tokenizers.align(tokenizer, declared=tokenizer.convert_tokens_to_ids(list(family.declared)))


def learnt(tokenizer, row: Encoded) -> list[str]:
    """The texts that are learnt, each a run of tokens."""
    runs: list[list[int]] = []
    for before, position in zip([-1, *row.learnt], row.learnt, strict=False):
        runs = [*runs, []] if position != before + 1 or not runs else runs
        runs[-1].append(row.input_ids[position])
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NO_CHATS])
def test_every_answer_is_learnt_with_its_end(name):
    family, tokenizer = FAMILIES[name], aligned(FAMILIES[name])
    row = chats.encode(tokenizer, CHAT, ANSWER)
    assert row.input_ids[: -len(tokenizers.encode_completion(tokenizer, ANSWER))] == chats.encode_prompt(
        tokenizer, CHAT
    )
    ends = ["" if name in OPEN_ENDED else family.end] * 2 + [family.end]
    texts = [text.removeprefix(" ") for text in learnt(tokenizer, row)]  # which a first word may hold
    assert "".join(texts) == "".join(map(str.__add__, ANSWERS, ends))
    if name in HISTORY | OPEN_ENDED or name == "llama 2":  # whose answers end after a space
        return
    for number, answer in ((1, ANSWERS[0]), (3, ANSWERS[1])):  # as where that answer is asked for
        asked = chats.encode(tokenizer, CHAT[:number], answer)
        length = len(asked.input_ids)
        assert row.input_ids[:length] == asked.input_ids
        assert [position for position in row.learnt if position < length] == asked.learnt


@pytest.mark.parametrize("template", ["chatml", "llama 3"])
def test_the_mask_is_that_of_a_template_that_says_so(template):
    family = Family(SYSTEM + CHATML, TURNS, TURNS[2], TURNS[2]) if template == "chatml" else FAMILIES[template]
    end = "'<|im_end|>'" if template == "chatml" else "'<|eot_id|>'"
    header = (
        "'<|im_start|>assistant\n'" if template == "chatml" else "'<|start_header_id|>assistant<|end_header_id|>\n\n'"
    )
    says_so = (
        "{% if m.role == 'assistant' %}{{ " + header + " }}{% generation %}{{ m.content + " + end + " }}"
        "{% endgeneration %}" + ("{{ '\n' }}" if template == "chatml" else "") + "{% else %}"
    )
    loop = "{% for m in messages %}"
    written = family.template.replace(loop, loop + says_so, 1).replace("{% endfor %}", "{% endif %}{% endfor %}", 1)
    tokenizer = aligned(family)
    row = chats.encode(tokenizer, CHAT, ANSWER)
    ids, mask = said(tokenizer, written)
    assert row.input_ids == ids[: len(row.input_ids)]
    assert row.learnt == mask


@pytest.mark.parametrize("name", REAL)
def test_real_templates_are_masked_as_their_own_marks_say(name):
    """But for white space: TRL's marks take in the line end after a turn's end, and some the one before its content."""
    templates = files("trl") / "chat_templates"
    family = replace(FAMILIES[REAL[name]], template=(templates / f"{name}.jinja").read_text())
    tokenizer = aligned(family)
    row = chats.encode(tokenizer, CHAT, ANSWER)
    ids, mask = said(tokenizer, (templates / f"{name}_training.jinja").read_text())
    length = len(row.input_ids)
    assert row.input_ids == ids[:length]
    own = set(row.learnt)
    assert own <= set(mask)
    beyond = [tokenizer.decode([ids[position]]) for position in mask if position < length and position not in own]
    assert not "".join(beyond).replace("<think>", "").replace("</think>", "").strip()


def said(tokenizer, template: str) -> tuple[list[int], list[int]]:
    """Token ids of the whole chat, and the positions that transformers reads off a template with its marks."""
    chat = [*CHAT, {"role": "assistant", "content": ANSWER}]
    encoding = tokenizer.apply_chat_template(
        chat, chat_template=template, return_dict=True, return_assistant_tokens_mask=True, enable_thinking=False
    )
    return encoding["input_ids"], [place for place, inside in enumerate(encoding["assistant_masks"]) if inside]


def test_the_real_qwen_tokenizer():
    folder = SHARED / "models" / "qwen2.5-tokenizer"
    if not folder.is_dir():
        pytest.skip("needs the Qwen2.5 tokenizer")
    tokenizer = tokenizers.load_tokenizer(str(folder))
    row = chats.encode(tokenizer, CHAT, ANSWER)
    whole = tokenizer.apply_chat_template([*CHAT, {"role": "assistant", "content": ANSWER}], tokenize=False)
    assert tokenizer.decode(row.input_ids) + "\n" == whole
    assert learnt(tokenizer, row) == [answer + "<|im_end|>" for answer in ANSWERS]


@pytest.mark.parametrize("template", [None, FAMILIES["llama 2"].template])
def test_a_word_holds_the_space_before_it(template):
    """SentencePiece's tokens: what an answer begins with stands across the space that a template writes before it."""
    folder = SHARED / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("needs the stories tokenizer")
    tokenizer = tokenizers.load_tokenizer(str(folder))
    tokenizer.chat_template = template
    row = chats.encode(tokenizer, CHAT, ANSWER)
    texts = [text.strip() for text in learnt(tokenizer, row)]
    end = tokenizer.eos_token
    ends = ["", "", end] if template is None else [end] * 3
    assert "".join(texts).replace(" ", "") == "".join(map(str.__add__, ANSWERS, ends)).replace(" ", "")


def test_a_question_is_what_it_always_was():
    for family in FAMILIES.values():
        tokenizer = aligned(family)
        prompt = tokenizers.encode_prompt(tokenizer, "Age: 23?")
        whole = prompt + tokenizers.encode_completion(tokenizer, "Good")
        assert chats.encode(tokenizer, "Age: 23?", "Good") == Encoded(whole, len(prompt))


def test_weights_say_what_is_learnt():
    tokenizer = aligned(FAMILIES["qwen2.5"])
    chat = [turn | {"weight": 0} if turn["content"] == "Standard" else turn for turn in CHAT]
    row = chats.encode(tokenizer, chat, ANSWER)
    assert learnt(tokenizer, row) == [ANSWERS[0] + "<|im_end|>", ANSWER + "<|im_end|>"]
    nothing = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in CHAT]
    assert learnt(tokenizer, chats.encode(tokenizer, nothing, ANSWER)) == [ANSWER + "<|im_end|>"]
    assert chats.encode(tokenizer, nothing, ANSWER).read_only == ()


@pytest.mark.parametrize("name", ["qwen3", "qwen3.5", "smollm3"])
def test_answers_that_are_compared_follow_one_prompt(name):
    tokenizer = aligned(FAMILIES[name])
    thoughtful, plain = "<think>\nWell.\n</think>\n\nGood", "Bad"
    alike = chats.thinking_alike(tokenizer, plain, thoughtful)
    assert alike[1] == thoughtful and alike[0].endswith("Bad") and "<think>\n\n</think>" in alike[0]
    rows = [chats.encode(tokenizer, "Hi", answer) for answer in alike]
    starts = [tokenizer.decode(row.input_ids[: row.prompt_length]) for row in rows]
    assert starts[0] == starts[1]
    assert chats.thinking_alike(tokenizer, plain, "Good") == [plain, "Good"]
    assert chats.thinking_alike(tokenizer, thoughtful, thoughtful) == [thoughtful] * 2
    assert chats.thinking_alike(aligned(FAMILIES["qwen2.5"]), plain, thoughtful) == [plain, thoughtful]


def test_thinking_is_learnt_of_the_last_answer_alone():
    thought = "<think>\nHm.\n</think>\n\n"
    chat = [turn | {"content": thought + turn["content"]} if turn["role"] == "assistant" else turn for turn in CHAT]
    for name in ("qwen3", "qwen3.5"):
        tokenizer = aligned(FAMILIES[name])
        row = chats.encode(tokenizer, chat, thought + ANSWER)
        text = tokenizer.decode(row.input_ids)
        assert text.count("Hm.") == 1 and text.endswith("<|im_start|>assistant\n" + thought + ANSWER + "<|im_end|>")
        opened = thought if name == "qwen3" else thought.removeprefix("<think>\n")  # the prompt has opened it
        assert "".join(learnt(tokenizer, row)) == "".join(
            text + "<|im_end|>" for text in (*ANSWERS[:2], opened + ANSWER)
        )
        assert row.input_ids[: row.learnt[-1] + 1] == row.input_ids


@pytest.mark.parametrize("name", ["qwen2.5", "llama 3", "gemma", "zephyr"])
def test_no_text_ends_a_turn(name):
    family = FAMILIES[name]
    tokenizer = aligned(family)
    evil = f"a{family.end}b"
    chat = [turn | {"content": evil + turn["content"]} for turn in CHAT]
    row = chats.encode(tokenizer, chat, evil + ANSWER)
    assert row.input_ids.count(tokenizer.eos_token_id) == chats.encode(tokenizer, CHAT, ANSWER).input_ids.count(
        tokenizer.eos_token_id
    )
    assert "".join(learnt(tokenizer, row)) == "".join(evil + answer + family.end for answer in ANSWERS)


def test_a_template_that_hides_answers_is_refused():
    with pytest.raises(UserError, match="does not tell where the answers of a chat stand; give one answer a row"):
        chats.encode(aligned(FAMILIES["it passes over answers"]), CHAT, ANSWER)
    with pytest.raises(UserError, match="Roles must alternate"):
        chats.encode(aligned(FAMILIES["gemma"]), [CHAT[0], CHAT[0]], ANSWER)


def test_a_chat_that_is_too_long_loses_its_oldest_questions():
    tokenizer = aligned(FAMILIES["qwen2.5"])
    brief = {"role": "system", "content": "Be brief."}
    chat = [brief, *CHAT]

    def size(turns) -> int:
        return len(chats.encode_prompt(tokenizer, turns))

    def cut_to(room: int):
        return chats.shortened(chat, lambda turns: len(chats.encode_prompt(tokenizer, turns)) <= room)

    assert cut_to(size([brief, *CHAT[2:]])) == [brief, *CHAT[2:]]
    assert cut_to(size([brief, *CHAT[2:]]) - 1) == [brief, CHAT[4]]
    cut = cut_to(size([brief, CHAT[4]]) - 1)
    assert cut[0] == brief and CHAT[4]["content"].startswith(cut[1]["content"]) and 0 < len(cut[1]["content"]) < 4
    assert cut_to(size([brief])) is None


def test_a_text_that_is_too_long_keeps_as_much_as_fits(tokenizer):
    text = "Which? " + "日本 語é 12.5, word " * 30
    whole = tokenizers.encode_prompt(tokenizer, text)
    for room in range(30, len(whole), 37):
        ids = chats.shortened_ids(tokenizer, text, room)
        assert room - 6 < len(ids) <= room  # a character has up to four tokens
    assert chats.shortened_ids(tokenizer, text, 5) is None
