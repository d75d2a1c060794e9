"""Answers that come and go in one batch are those that each would be alone; they leave as they end."""

from __future__ import annotations

import functools
import json
from functools import partial

import pytest
import torch
from support.answers import run
from support.families import ARCHITECTURES, build_architecture
from support.inputs import CORPUS
from support.logits import Only
from transformers.generation.streamers import BaseStreamer

from common.generation import continuous_batch, json_schema, row_cache
from common.generation.continuous_batch import ContinuousBatch, Drawn, Wanted
from common.generation.decoding import Decoding
from common.generation.generate import generate, generate_each
from common.generation.json_grammar import JsonGrammar, JsonRow
from common.generation.steering import Steering
from common.models import loading as models
from common.models import tokenizers
from common.models.source import ModelSource

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "ids": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name", "ids"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tiny_base):
    return models.load_base(ModelSource(tiny_base, dtype="float32")).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    """Of unlike lengths, each more than once as long as another."""
    texts = [CORPUS[number % len(CORPUS)][: 10 + 17 * (number % 5)] + str(number) for number in range(11)]
    return [tokenizers.encode_prompt(tokenizer, text) for text in texts]


def alone(model, tokenizer, wanted: list[Wanted]) -> dict:
    """Each in a batch of its own."""
    return {each.key: run(model, tokenizer, [each])[1][each.key] for each in wanted}


def same(together: dict, apart: dict, near: float = 1e-5) -> None:
    assert together.keys() == apart.keys()
    for key, answer in together.items():
        assert (answer.tokens, answer.text, answer.finished, answer.cut) == (
            apart[key].tokens,
            apart[key].text,
            apart[key].finished,
            apart[key].cut,
        )
        assert answer.logprobs == pytest.approx(apart[key].logprobs, abs=near)


def test_rows_that_enter_midway_are_written_as_alone(model, tokenizer, prompts):
    """Budgets of all lengths, so that rows leave at each step, and few at a time."""
    wanted = [Wanted(n, prompt, 3 + 5 * n % 17, logprobs=True) for n, prompt in enumerate(prompts)]
    longest = max(map(len, prompts))
    batch, together = run(model, tokenizer, wanted, max_batch_tokens=4 * (longest + 20))
    same(together, alone(model, tokenizer, wanted))
    assert batch.steps < sum(len(answer.tokens) for answer in together.values()) / 2
    assert batch.prompts_read == len(prompts)


def test_samples_are_drawn_as_alone(model, tokenizer, prompts):
    wanted = [
        Wanted((n, sample), prompt, 4 + 7 * n % 13, drawn=Drawn(1.0, 0.9, 3, sample))
        for n, prompt in enumerate(prompts[:5])
        for sample in range(3)
    ]
    batch, together = run(model, tokenizer, wanted, max_batch_tokens=700)
    same(together, alone(model, tokenizer, wanted))
    assert len({tuple(answer.tokens) for answer in together.values()}) > 10
    assert batch.prompts_read < len(wanted)  # samples that enter together share their prompt


def test_json_is_held_to_its_schema_as_alone(model, tokenizer, prompts):
    grammar = JsonGrammar(json_schema.preflight(SCHEMA).grammar_schema, tokenizer, model.config.vocab_size)
    wanted = [
        Wanted(n, prompt, budget, drawn=Drawn(1.0, 1.0, n), steering=partial(JsonRow, grammar, budget))
        for n, prompt in enumerate(prompts[:6])
        for budget in [24 + 6 * n]
    ] + [Wanted("free", prompts[0], 9)]  # one that is not drawn, and that no grammar holds, among them
    _, together = run(model, tokenizer, wanted, max_batch_tokens=500)
    same(together, alone(model, tokenizer, wanted))
    assert all(json_schema.errors(json.loads(together[n].text), SCHEMA) == [] for n in range(6))


def test_a_row_that_outgrows_the_budget_goes_on_later(model, tokenizer, prompts, monkeypatch):
    """Rows that are written on and on, in a batch that was filled for short ones."""
    monkeypatch.setattr(continuous_batch, "EXPECTED_TOKENS", 20)
    wanted = [Wanted(n, prompt[:20], 50, logprobs=True, steering=lambda: NeverEnds(tokenizer)) for n, prompt in
              enumerate(prompts[:6])]  # fmt: skip
    batch, together = run(model, tokenizer, wanted, max_batch_tokens=200)
    assert batch.prompts_read > len(wanted)  # some were read again
    assert all(len(answer.tokens) == 50 for answer in together.values())
    same(together, alone(model, tokenizer, wanted))


class NeverEnds(Steering):
    def __init__(self, tokenizer) -> None:
        self.ends = tokenizers.stop_ids(tokenizer)

    def change(self, scores):
        scores[self.ends] = float("-inf")
        return scores


def test_the_batch_stays_within_its_budget(model, tokenizer, prompts, monkeypatch):
    sizes, forward = [], model.forward

    @functools.wraps(forward)
    def watched(input_ids, attention_mask, **kwargs):
        sizes.append((len(attention_mask), attention_mask.shape[-1]))
        return forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    budget = 600
    generate(model, tokenizer, prompts, Decoding(90), max_batch_tokens=budget)
    assert max(rows for rows, _ in sizes) > 2
    assert all(rows * columns <= budget for rows, columns in sizes if rows > 1)


def test_answers_leave_as_they_end(model, tokenizer):
    a, end = tokenizer.encode("a", add_special_tokens=False)[0], tokenizer.eos_token_id
    scripts = [[a] * 9 + [end], [a, end], [a] * 30, [end]]
    passes = []

    class Watched(Only):
        def change(self, scores):
            passes.append(self.step)
            return super().change(scores)

    left = [
        (number, len(answer.tokens), max(passes))
        for number, _, answer in generate_each(
            model,
            tokenizer,
            [[a, a]] * 4,
            Decoding(12, prompt_lookup_num_tokens=0),
            steering=lambda number: Watched(scripts[number]),
        )
    ]
    assert left == [(3, 0, 0), (1, 1, 1), (0, 9, 9), (2, 12, 11)]


def test_more_can_be_asked_for_meanwhile(model, tokenizer, prompts):
    batch = ContinuousBatch(model, tokenizer)
    for number in range(3):
        batch.add(Wanted(number, prompts[number], 2))
    found = {}
    for wanted, answer in batch.run():
        found[wanted.key] = answer
        if wanted.key in range(3):
            batch.add(Wanted(f"again {wanted.key}", wanted.prompt, 6), first=wanted.key == 1)
    for number in range(3):
        again = found[f"again {number}"]
        assert again.tokens[:2] == found[number].tokens
        same({0: again}, {0: generate(model, tokenizer, [prompts[number]], Decoding(6))[0][0]})


class Broken(JsonRow):
    """One that raises at the fourth call of a method; what is called in a batch of others, in whatever company."""

    def __init__(self, grammar: JsonGrammar, budget: int, method: str) -> None:
        super().__init__(grammar, budget)
        self.calls = 0
        setattr(self, method, partial(self.failing, getattr(self, method)))

    def failing(self, method, *given):
        self.calls += 1
        if self.calls > 3:
            raise RuntimeError("a bug")
        return method(*given)


class BrokenStreamer(BaseStreamer):
    def __init__(self, method: str) -> None:
        setattr(self, method, self.fail)

    def put(self, value) -> None:
        pass

    def end(self) -> None:
        pass

    def fail(self, *value) -> None:
        if not value or value[0].dim() == 1:  # not the prompt
            raise RuntimeError("a bug")


def fail(*text):
    raise RuntimeError("a bug")


@pytest.mark.parametrize(
    "how",
    [
        *({"steering": method} for method in ("narrow", "consume", "forced", "fitting")),
        {"steering": fail},
        {"stop": fail},
        {"text_of": fail},
        {"streamer": BrokenStreamer("put")},
        {"streamer": BrokenStreamer("end")},
    ],
    ids=lambda how: "_".join(how) + f" {how.get('steering')}" * isinstance(how.get("steering"), str),
)
def test_what_is_raised_within_one_leaves_the_others_as_they_are(model, tokenizer, prompts, how):
    grammar = JsonGrammar(json_schema.preflight(SCHEMA).grammar_schema, tokenizer, model.config.vocab_size)
    wanted = [
        Wanted(n, prompt, 40, drawn=Drawn(1.0, 1.0, n), steering=partial(JsonRow, grammar, 40), lookup=8)
        for n, prompt in enumerate(prompts[:4])
    ] + [Wanted("free", prompts[0], 9, logprobs=True)]
    if isinstance(how.get("steering"), str):
        how = {"steering": partial(Broken, grammar, 40, how["steering"])}
    bad = Wanted("bad", prompts[1], 40, **{"logprobs": True, "lookup": 8} | how)
    batch, together = run(model, tokenizer, [*wanted[:2], bad, *wanted[2:]])
    assert str(together.pop("bad")) == "a bug"
    same(together, run(model, tokenizer, wanted)[1])
    assert batch.prompts_read <= 1 + len(wanted)  # none of them was begun again


def test_a_lack_of_memory_is_no_fault_of_one_of_them(model, tokenizer, prompts):
    class Large(Steering):
        def change(self, scores):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run(model, tokenizer, [Wanted(0, prompts[0], 4), Wanted(1, prompts[1], 4, steering=Large)])


def test_log_probabilities_are_for_those_who_ask(model, tokenizer, prompts):
    ((asked,),) = generate(model, tokenizer, prompts[:1], Decoding(4), logprobs=True)
    ((bare,),) = generate(model, tokenizer, prompts[:1], Decoding(4))
    assert len(asked.logprobs) == len(asked.tokens) and bare.logprobs == [] and bare.tokens == asked.tokens


@pytest.mark.processes
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_writes_in_company_as_alone(name, tokenizer, prompts, tmp_path):
    """Beyond the window of those that slide one; with states that are carried on."""
    model = models.load_base(ModelSource(build_architecture(name, tmp_path, tokenizer), dtype="float32")).eval()
    assert row_cache.joinable(model.config)
    wanted = [Wanted(n, prompt, 4 + 9 * n % 23, logprobs=True) for n, prompt in enumerate(prompts[:8])]
    batch, together = run(model, tokenizer, wanted, max_batch_tokens=5 * (max(map(len, prompts)) + 20))
    assert batch.steps < sum(len(answer.tokens) for answer in together.values()) / 2
    same(together, alone(model, tokenizer, wanted), near=1e-4)
    for number in (0, 4, 7):  # and as without any cache
        ids = list(prompts[number])
        for token, logprob in zip(together[number].tokens, together[number].logprobs, strict=True):
            with torch.inference_mode():
                scores = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(0)
            assert float(scores[token]) == pytest.approx(logprob, abs=1e-3)
            ids.append(token)


def test_rows_that_cannot_be_joined_are_written_one_after_another(model, tokenizer, prompts, monkeypatch):
    monkeypatch.setattr(row_cache, "JOINABLE", set())
    wanted = [Wanted(n, prompt, 5) for n, prompt in enumerate(prompts[:3])]
    batch, found = run(model, tokenizer, wanted)
    monkeypatch.undo()
    same(found, run(model, tokenizer, wanted)[1])
    assert batch.steps == sum(len(answer.tokens) - 1 + answer.finished for answer in found.values())
