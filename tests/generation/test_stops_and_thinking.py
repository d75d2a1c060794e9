"""Answers end at every stop token of the model, and are what stands behind its thinking."""

from __future__ import annotations

import functools

import pytest
from support.logits import Only

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
            processors=lambda rows, end=end: [Only([[word, end, word]])],
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
    forward, script = model.forward, iter([*ids, tokenizer.eos_token_id])

    @functools.wraps(forward)
    def scripted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[:, -1, next(script)] = 1e4
        return output

    monkeypatch.setattr(model, "forward", scripted)
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
        processors=lambda rows: [Only([[*ids, tokenizer.eos_token_id]])],
    )
    assert answer.text == "Bad</think>Good"


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
