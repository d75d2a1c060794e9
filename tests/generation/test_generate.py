"""Answers do not depend on their batch, log-probabilities are the model's own, and answers end where they should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.logits import Only

from common.cli import UserError
from common.generation import generate as generation
from common.generation.decoding import Decoding
from common.generation.steering import Steering
from common.models import loading as models
from common.models import tokenizers
from common.models.source import ModelSource


@pytest.fixture(scope="module")
def model(tiny_base):
    return models.load_base(ModelSource(tiny_base, dtype="float32")).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    return [tokenizers.encode_prompt(tokenizer, text) for text in ("Age: 31", "Occupation: Lawyer, Age: 2", "?")]


def greedy_by_hand(model, prompt: list[int], steps: int, ends: set[int]) -> tuple[list[int], list[float]]:
    ids, logprobs = list(prompt), []
    with torch.inference_mode():
        for _ in range(steps):
            scores = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(0)
            token = int(scores.argmax())
            if token in ends:
                break
            ids.append(token)
            logprobs.append(float(scores[token]))
    return ids[len(prompt) :], logprobs


def test_greedy_equals_one_forward_pass_per_token(model, tokenizer, prompts):
    answers = generation.generate(model, tokenizer, prompts, Decoding(6), logprobs=True)
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        tokens, logprobs = greedy_by_hand(model, prompt, 6, tokenizers.stop_ids(tokenizer))
        assert answer.tokens == tokens
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_samples_do_not_depend_on_the_batch(model, tokenizer, prompts):
    decoding = Decoding(8, temperature=1.0, top_p=0.9, num_samples=3, seed=5)
    together = generation.generate(model, tokenizer, prompts, decoding)
    apart = [generation.generate(model, tokenizer, [p], decoding, max_batch_tokens=1)[0] for p in prompts]
    assert [[a.tokens for a in row] for row in together] == [[a.tokens for a in row] for row in apart]
    assert len({tuple(answer.tokens) for answer in together[0]}) == 3
    other = generation.generate(model, tokenizer, prompts, replace(decoding, seed=6))
    assert [a.tokens for a in other[0]] != [a.tokens for a in together[0]]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_lower_the_temperature_the_nearer_to_greedy(model, tokenizer, prompts, top_p):
    """Also where dividing by it leaves float32's range."""
    greedy = generation.generate(model, tokenizer, prompts[:2], Decoding(6))
    for temperature in (2e-5, 1e-9, 1e-40):
        decoding = Decoding(6, temperature=temperature, top_p=top_p)
        assert generation.generate(model, tokenizer, prompts[:2], decoding) == greedy


def test_sampling_follows_the_distribution(model, tokenizer, prompts):
    prompt = prompts[0]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    two = logits.topk(2).indices.tolist()

    class Two(Steering):
        def change(self, scores):
            masked = torch.full_like(scores, float("-inf"))
            masked[two] = scores.new_tensor([0.0, 1.0])
            return masked

    (answers,) = generation.generate(
        model, tokenizer, [prompt], Decoding(1, temperature=0.5, num_samples=600), steering=lambda number: Two()
    )
    first = [(answer.tokens or [None])[0] for answer in answers]
    expected = torch.tensor([0.0, 2.0]).softmax(0)[1].item()
    assert first.count(two[1]) / 600 == pytest.approx(expected, abs=0.05)
    (nucleus,) = generation.generate(
        model, tokenizer, [prompt], Decoding(1, temperature=0.5, top_p=0.5, num_samples=50),
        steering=lambda number: Two(),
    )  # fmt: skip
    assert {(answer.tokens or [None])[0] for answer in nucleus} == {two[1]}


def test_ends_at_eos_or_at_the_budget(model, tokenizer, prompts):
    word = tokenizer.encode("Good", add_special_tokens=False)
    for end in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        wanted = [[*word, end], word * 9, word * 9]

        def steering(number, wanted=wanted):
            return Only(wanted[number])

        answers = generation.generate(model, tokenizer, prompts, Decoding(5), steering=steering, logprobs=True)
        assert answers[0][0].tokens == word and answers[0][0].finished
        assert answers[0][0].text == "Good"
        assert [len(answer.tokens) for (answer,) in answers[1:]] == [5, 5]
        assert not answers[1][0].finished
        assert len(answers[1][0].logprobs) == 5 and max(answers[1][0].logprobs) < 0  # the model's, not the mask's


def test_stop_ends_one_row_alone(model, tokenizer, prompts):
    a, b = tokenizer.encode("Ab", add_special_tokens=False)[:2]
    wanted = [[a, b, a, a, a, a], [a] * 6, [a] * 6]
    answers = generation.generate(
        model, tokenizer, prompts, Decoding(6), stop=lambda number, text: number == 0 and text.endswith("b"),
        steering=lambda number: Only(wanted[number]),
    )  # fmt: skip
    assert answers[0][0].tokens[:2] == [a, b] and len(answers[0][0].tokens) == 2 and answers[0][0].finished
    assert len(answers[1][0].tokens) == 6 and not answers[1][0].finished


def test_too_long_for_the_context(model, tokenizer, prompts):
    with pytest.raises(UserError, match=r"does not fit the model's context of 2048; shorten it, or lower"):
        generation.generate(model, tokenizer, prompts, Decoding(2040))
