"""Steps of several tokens, forced or looked up, write what steps of one token do, and there are fewer of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from support.answers import run
from support.families import build_architecture
from support.inputs import CORPUS
from support.logits import Only
from transformers import AutoModelForCausalLM, FalconConfig

from common.generation import continuous_batch, json_schema, steering
from common.generation.aligned_cache import revisable
from common.generation.continuous_batch import Drawn, Wanted
from common.generation.decoding import Decoding
from common.generation.generate import generate
from common.generation.json_grammar import JsonGrammar, JsonRow
from common.generation.prompt_lookup import PromptLookup, Record
from common.generation.steering import draw
from common.models import loading as models
from common.models import tokenizers
from common.models.source import ModelSource

SCHEMA = {
    "type": "object",
    "properties": {
        "company": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["receipt", "return"]},
        "lines": {"type": "array", "items": {"type": "object", "properties": {"quantity": {"type": "integer"}},
                                             "required": ["quantity"], "additionalProperties": False}},
        "total": {"type": ["number", "null"]},
    },
    "required": ["company", "kind", "lines", "total"],
    "additionalProperties": False,
}  # fmt: skip


class TokenByToken(JsonRow):
    """Lets the model choose each token, those too of which there is one."""

    def forced(self):
        return None


@pytest.fixture(scope="module")
def model(tiny_base):
    return models.load_base(ModelSource(tiny_base, dtype="float32")).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    texts = [CORPUS[number % len(CORPUS)][: 12 + 19 * (number % 4)] + str(number) for number in range(8)]
    return [tokenizers.encode_prompt(tokenizer, text) for text in texts]


@pytest.fixture(scope="module")
def grammar(model, tokenizer) -> JsonGrammar:
    return JsonGrammar(json_schema.preflight(SCHEMA).grammar_schema, tokenizer, model.config.vocab_size)


def same(found: dict, expected: dict, near: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for key, answer in found.items():
        other = expected[key]
        assert replace(answer, logprobs=[]) == replace(other, logprobs=[])
        assert answer.logprobs == pytest.approx(other.logprobs, abs=near)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "smollm3", "gpt2", "phi"])
def test_what_is_looked_up_stays_only_where_it_is_right(name, tokenizer, prompts, tmp_path):
    """Models of random weights soon repeat themselves, so that drafts are right now and again, and wrong."""
    model = models.load_base(ModelSource(build_architecture(name, tmp_path, tokenizer), dtype="float32")).eval()
    assert revisable(model)
    wanted = [Wanted(n, prompt, 9 + 13 * n % 40, logprobs=n % 2 == 0) for n, prompt in enumerate(prompts)]
    wanted += [Wanted(("drawn", n), prompts[n], 20, Drawn(0.3, 0.9, n), logprobs=True) for n in range(3)]
    budget = 5 * (max(map(len, prompts)) + 40)
    plain, expected = run(model, tokenizer, wanted, budget)
    batch, found = run(model, tokenizer, [replace(one, lookup=10) for one in wanted], budget)
    same(found, expected)
    assert 0 < batch.right < batch.drafted and plain.drafted == 0


@pytest.mark.parametrize("name", ["mistral", "lfm2"])
def test_windows_and_states_go_on_token_by_token(name, tokenizer, prompts, tmp_path):
    model = models.load_base(ModelSource(build_architecture(name, tmp_path, tokenizer), dtype="float32")).eval()
    batch, _ = run(model, tokenizer, [Wanted(0, prompts[0], 30, lookup=10)])
    assert not revisable(model) and batch.drafted == 0


def test_attention_that_is_a_model_s_own_is_left_to_it():
    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    assert not revisable(AutoModelForCausalLM.from_config(config))


def test_a_pass_that_is_made_on_the_way_is_its_own(model, tokenizer, prompts):
    """As of the rows that a server answers between two tokens of a text: in a hook, before the step's own pass."""
    ids, mask = torch.tensor([prompts[0][:9], prompts[1][:9]]), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).logits
    wanted = [Wanted(n, prompt, 12, logprobs=True, lookup=10) for n, prompt in enumerate(prompts[:3])]
    alone, nested, forward = run(model, tokenizer, wanted)[1], [], model.forward

    def between(module, args) -> None:
        nested.append(forward(input_ids=ids, attention_mask=mask).logits)

    handle = model.register_forward_pre_hook(between)
    try:
        same(run(model, tokenizer, wanted)[1], alone)
    finally:
        handle.remove()
    assert len(nested) > 5 and all(torch.allclose(logits, expected, atol=1e-5) for logits in nested)


def test_a_copy_takes_few_steps(model, tokenizer, prompts):
    """Also of a row beside one that copies nothing, and an answer ends within a draft where it has to."""
    text, end = tokenizer.encode(" ".join(CORPUS[3:7]), add_special_tokens=False)[:30], tokenizer.eos_token_id
    copied = [*text[5:25], end]
    other = [tokenizer.encode(str(digit), add_special_tokens=False)[0] for digit in (7, 3, 8, 1, 9, 2)]

    def wanted(lookup: int) -> list[Wanted]:
        return [
            Wanted("copy", text, 40, steering=lambda: Only(copied), lookup=lookup, logprobs=True),
            Wanted("cut", text, 9, steering=lambda: Only(copied), lookup=lookup),
            Wanted("stop", text, 40, steering=lambda: Only(copied), stop=lambda text: len(text) > 20, lookup=lookup),
            Wanted("other", text, 6, steering=lambda: Only(other), lookup=lookup),
        ]

    plain, expected = run(model, tokenizer, wanted(0))
    batch, found = run(model, tokenizer, wanted(10))
    same(found, expected)
    assert found["copy"].tokens == copied[:-1] and found["cut"].tokens == copied[:9] and found["stop"].finished
    assert plain.steps == len(copied) - 1 and batch.steps < 10


@pytest.mark.processes
@pytest.mark.parametrize("spare", [0, 3, 60])
@pytest.mark.parametrize("lookup", [0, 10])
def test_forced_tokens_are_those_that_would_have_been_chosen(model, tokenizer, prompts, grammar, spare, lookup):
    """Budgets that end the document for the model among them; rows that are set aside with tokens not yet read."""
    budget = grammar.shortest + spare

    def wanted(kind: type[JsonRow], lookup: int) -> list[Wanted]:
        hold = partial(kind, grammar, budget)
        return [
            Wanted(n, prompt, budget, drawn, hold, logprobs=n != 2, lookup=lookup)
            for n, prompt in enumerate(prompts[:6])
            for drawn in [Drawn(1.0, 0.95, n) if n % 2 else None]
        ]

    room = 3 * (max(map(len, prompts)) + budget // 2)
    plain, expected = run(model, tokenizer, wanted(TokenByToken, 0), room)
    batch, found = run(model, tokenizer, wanted(JsonRow, lookup), room)
    same(found, expected)
    assert batch.steps < plain.steps
    for answer in found.values():
        assert answer.finished and json_schema.parse(answer.text, SCHEMA).error is None


def test_a_forced_token_is_the_one_that_the_mask_leaves(model, tokenizer, grammar):
    forced = 0
    for number in range(4):
        row, generator = JsonRow(grammar, grammar.shortest + 9 * number), torch.Generator().manual_seed(number)
        while not row.matcher.is_stopped():
            token = row.forced()
            masked = row.change(torch.randn(model.config.vocab_size, generator=generator))
            if token is not None:
                forced += 1
                assert (masked > float("-inf")).nonzero().flatten().tolist() == [token]
            row.consume(int(masked.argmax()))
        assert row.forced() == tokenizer.eos_token_id
    assert forced > 20


def test_a_text_without_a_choice_needs_no_model(model, tokenizer, prompts):
    grammar = JsonGrammar({"const": {"a": "word"}}, tokenizer, model.config.vocab_size)
    alone, found = run(model, tokenizer, [Wanted(0, prompts[0], 30, steering=lambda: JsonRow(grammar, 30))])
    assert found[0].text == '{"a":"word"}' and (alone.prompts_read, alone.steps) == (0, 0)
    wanted = [Wanted(0, prompts[0], 30, steering=lambda: JsonRow(grammar, 30), logprobs=True)]
    scored, with_logprobs = run(model, tokenizer, wanted)
    assert (scored.prompts_read, scored.steps) == (1, 0)
    with torch.inference_mode():
        ids = torch.tensor([[*prompts[0], *with_logprobs[0].tokens]])
        expected = model(input_ids=ids).logits[0].log_softmax(dim=1)[len(prompts[0]) - 1 : -1]
    expected = expected.gather(1, ids[0, len(prompts[0]) :, None])[:, 0].tolist()
    assert with_logprobs[0].logprobs == pytest.approx(expected, abs=1e-4)


def test_rows_that_owe_log_probabilities_can_be_set_aside(model, tokenizer, prompts, grammar, monkeypatch):
    monkeypatch.setattr(continuous_batch, "EXPECTED_TOKENS", 1)
    budget = grammar.shortest + 20
    wanted = [
        Wanted(n, prompt[:20], budget, steering=partial(JsonRow, grammar, budget), logprobs=True, lookup=6)
        for n, prompt in enumerate(prompts[:6])
    ]
    batch, found = run(model, tokenizer, wanted, 150)
    assert batch.prompts_read > len(wanted)  # some were read again
    same(found, {key: run(model, tokenizer, [wanted[key]])[1][key] for key in found})


def test_looking_up_is_no_part_of_what_decides_an_answer(model, tokenizer, prompts):
    assert Decoding().as_dict() == Decoding(prompt_lookup_num_tokens=0).as_dict()
    looked, plain = (
        generate(model, tokenizer, prompts, Decoding(30, prompt_lookup_num_tokens=count)) for count in (10, 0)
    )
    assert looked == plain


def test_drafts_are_as_long_as_they_pay():
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    lookup = PromptLookup([*ids, 0, 1, 2], 6, Record())
    assert lookup.draft([], 6, 0.001) == [3, 4, 5, 6, 7, 8]
    assert lookup.draft([], 3, 0.001) == [3, 4, 5]
    assert lookup.draft([], 6, 0.2) == [3, 4]  # a half of a half is more, an eighth is not
    assert lookup.draft([], 6, 0.6) == []
    assert lookup.draft([], 6, 0.2, 0.7) == [3, 4] and lookup.draft([], 6, 0.2, 0.8) == []
    lookup.learn(6, 6)
    assert lookup.draft([3], 6, 0.2) == [4, 5]  # of three tokens that are the same, nothing is known yet
    for _ in range(5):
        lookup.learn(6, 6)
    assert lookup.draft([3, 4], 6, 0.2) == [5, 6, 7, 8, 9, 0]
    for _ in range(40):
        lookup.learn(6, 0)
    assert lookup.draft([3, 4, 5], 6, 0.5) == []
    assert lookup.draft([3, 4, 5, 11], 6, 0.001) == []  # it stands nowhere else


def test_the_likeliest_tokens_are_enough_for_top_p(monkeypatch):
    """Where they have that much probability together; else all are put in order."""
    scores = torch.randn(8, 500, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)[:, None] / 2

    def drawn() -> list[list[int]]:
        return [
            draw(scores, [torch.Generator().manual_seed(9 * seed + row) for row in range(8)], 0.8, 0.9).tolist()
            for seed in range(20)
        ]

    every = drawn()
    monkeypatch.setattr(steering, "FEW", 500)
    assert drawn() == every
    monkeypatch.setattr(steering, "FEW", 3)
    assert drawn() == every
