"""Answers end at every stop token of the model, and are what stands behind its thinking."""

from __future__ import annotations

import functools

import pytest
from support.chat_templates import FAMILIES, tokenizer_of
from support.logits import Only
from support.models import build_base

from common.cli import UserError
from common.generation import generate as generation
from common.generation.decoding import Decoding
from common.generation.result import AnswerStream, final_answer
from common.models import loading as models
from common.models import tokenizers
from common.models.source import ModelSource


@pytest.fixture(scope="module")
def model(tiny_base):
    return models.load_base(ModelSource(tiny_base, dtype="float32")).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    return [tokenizers.encode_prompt(tokenizer, "Age: 31")]


def says(monkeypatch, model, ids):
    """Makes the model write `ids`, whatever it is asked."""
    forward, script = model.forward, iter(ids)

    @functools.wraps(forward)
    def scripted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[:, -1, next(script)] = 1e4
        return output

    monkeypatch.setattr(model, "forward", scripted)


def test_answers_end_at_every_stop_token(model, tokenizer, prompts, monkeypatch):
    """The end of the turn, and what else the model's generation config names."""
    word, turn, other = tokenizer.convert_tokens_to_ids(["Good", "<|im_end|>", "<|im_start|>"])
    for end, declared in ((turn, [other, turn]), (other, [other, turn]), (other, turn)):
        monkeypatch.setattr(model.generation_config, "eos_token_id", declared)
        ((answer,),) = generation.generate(
            model,
            tokenizer,
            prompts[:1],
            Decoding(5),
            steering=lambda number, end=end: Only([word, end, word]),
        )
        stops = end == turn or isinstance(declared, list)
        assert (len(answer.tokens), answer.finished) == ((1, True) if stops else (5, False))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Good", "Good"),
        ("<think>\nBad? No.\n</think>\n\nGood", "Good"),
        ("Bad? No.</think>Good", "Good"),
        ("a</think>b</think>\n\n  c\n", "c\n"),
        ("<think>Bad", ""),
        ("\n<think>one</think><think>Bad", ""),
        ("Good <think>", "Good <think>"),
        ("</think>", ""),
        ("<Thinking>\nBad</Thinking>\nGood", "Good"),
        ("tag = '</think>'\nx = 1", "tag = '</think>'\nx = 1"),
        (" x", " x"),
        ("", ""),
    ],
)
def test_an_answer_is_what_stands_behind_the_thinking(text, answer):
    assert final_answer(text) == answer


def test_thinking_is_no_part_of_the_answer(model, tokenizer, prompts, monkeypatch):
    """Neither of its text, nor of what `stop` looks at; a text under a grammar is all answer."""
    ids = tokenizer.encode("Bad</think>Good", add_special_tokens=False)
    says(monkeypatch, model, [*ids, tokenizer.eos_token_id])
    seen: list[str] = []

    def stop(number: int, text: str) -> bool:
        seen.append(text)
        return text == "Go"

    ((answer,),) = generation.generate(model, tokenizer, prompts[:1], Decoding(20), stop=stop)
    assert (answer.text, answer.tokens, answer.finished) == ("Good", ids, True)
    assert "" in seen and "Good" in seen and "</think>" not in "".join(seen[-3:])
    monkeypatch.undo()
    ((answer,),) = generation.generate(
        model,
        tokenizer,
        prompts[:1],
        Decoding(20),
        steering=lambda number: Only([*ids, tokenizer.eos_token_id]),
    )
    assert answer.text == "Bad</think>Good"


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A tiny model whose template opens `<think>` in the prompt, and its tokenizer."""
    tokenizer = tokenizers.align(tokenizer_of(FAMILIES["qwq"]))
    folder = build_base(tmp_path_factory.mktemp("thinker"), tokenizer)
    return models.load_base(ModelSource(folder, dtype="float32")).eval(), tokenizer


@pytest.mark.parametrize(("thought", "budget"), [("\nBad? No.\n</think>", 40), ("Bad? No. Or so, or so", 18)])
def test_a_model_thinks_before_a_text_that_a_grammar_holds(thought, budget, thinker, monkeypatch):
    """Freely, to the end of its thinking or of the budget; the answer then follows a `</think>`, and is all text."""
    model, tokenizer = thinker
    good = tokenizer.encode("Good", add_special_tokens=False)
    prompt = tokenizers.encode_prompt(tokenizer, "Age: 31", thinking=True)
    asked = []
    end = [tokenizer.eos_token_id]
    thoughts = tokenizer.encode(thought, add_special_tokens=False)
    closing = len(tokenizer.encode("\n</think>\n\n", add_special_tokens=False))
    says(monkeypatch, model, [*thoughts[: budget - closing], *good, *end])
    forward = model.forward

    @functools.wraps(forward)
    def watched(input_ids, **kwargs):
        if input_ids.shape[1] > 1:  # a prompt
            asked.append(tokenizer.decode(input_ids[0]))
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    ((answer,),) = generation.generate(
        model,
        tokenizer,
        [prompt],
        Decoding(budget, thinking=True, prompt_lookup_num_tokens=0),
        steering=lambda number: Only([*good, *end]),
    )
    assert (answer.text, answer.tokens, answer.finished) == ("Good", good, True)
    assert len(asked) == 2 and asked[1].startswith(asked[0])
    added = asked[1].removeprefix(asked[0])
    assert added.endswith("\n</think>\n\n") and added.count("</think>") == 1 and "Bad? No." in added


def test_no_thinking_before_a_grammar_where_the_template_knows_none(model, tokenizer, prompts):
    with pytest.raises(UserError, match="knows no thinking"):
        generation.generate(model, tokenizer, prompts, Decoding(4, thinking=True), steering=lambda number: None)


def test_thinking_that_the_prompt_has_opened_is_no_answer_when_the_budget_ends_it(thinker, monkeypatch):
    model, tokenizer = thinker
    prompt = tokenizers.encode_prompt(tokenizer, "Age: 31", thinking=True)
    says(monkeypatch, model, tokenizer.encode("x = 1 it may be", add_special_tokens=False))
    ((answer,),) = generation.generate(model, tokenizer, [prompt], Decoding(6, thinking=True))
    assert (answer.text, answer.finished, len(answer.tokens)) == ("", False, 6)


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["Go", "od", " day"], ["Go", "od", " day"]),
        (["<th", "ink>Bad", "\n</th", "ink>", "\n\nGo", "od"], ["", "", "", "", "Go", "od"]),
        (["<t", "d>"], ["", "<td>"]),
        (["\n", "<", "b"], ["", "", "\n<b"]),
        (["", "<"], ["", "<"]),
    ],
)
def test_an_answer_is_streamed_from_behind_the_thinking(pieces, shown):
    stream = AnswerStream()
    assert [stream.feed(piece, end=piece == pieces[-1]) for piece in pieces] == shown
