"""Constrained decoding: a model of random weights can only write documents of the schema, and ends them in time."""

from __future__ import annotations

import json

import pytest
import torch
from support.inputs import CORPUS, SHARED

from common.cli import UserError
from common.generation import json_schema
from common.generation.decoding import Decoding
from common.generation.generate import generate
from common.generation.json_closing import Scanner, find_closing
from common.generation.json_grammar import Bounds, JsonGrammar, JsonRow, hints_of
from common.models import tokenizers

CASES = SHARED / "data" / "jsonschema" / "cases.jsonl"
INVOICE = {
    "type": "object",
    "properties": {
        "number": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,}$"},
        "date": {"type": "string", "format": "date"},
        "vendor": {"type": "string", "minLength": 3},
        "lines": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {"text": {"type": "string"}, "amount": {"type": "number", "exclusiveMinimum": 0}},
                "required": ["text", "amount"],
                "additionalProperties": False,
            },
        },
        "paid": {"type": ["boolean", "null"]},
        "currency": {"enum": ["USD", "€"]},
    },
    "required": ["number", "date", "vendor", "lines", "currency"],
    "additionalProperties": False,
}
SCHEMAS = {
    "invoice": INVOICE,
    "tree": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#"}}},
        "required": ["name", "children"],
        "additionalProperties": False,
    },
    "choice": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": "a"}, "n": {"type": "integer", "multipleOf": 7, "minimum": 10}},
                "required": ["kind", "n"],
            },
            {"type": "array", "items": {"type": "string", "format": "email"}, "minItems": 2},
        ]
    },
    "anything": {},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
}


@pytest.fixture(scope="module")
def model(tiny_base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_base).eval()


def grammar_of(schema, tokenizer, model, spaced: bool = False, **bounds: int) -> JsonGrammar:
    found = json_schema.preflight(schema, best_effort=True)
    return JsonGrammar(found.grammar_schema, tokenizer, model.config.vocab_size, Bounds(**bounds), spaced)


def sample(model, tokenizer, grammar: JsonGrammar, budget: int, prompts: int = 2, samples: int = 2, **kwargs):
    """Answers of unlike prompts and lengths, from the sharpest temperature at which all sorts of tokens come up."""
    encoded = [tokenizers.encode_prompt(tokenizer, CORPUS[i][: 20 + 9 * i]) for i in range(prompts)]
    decoding = Decoding(budget, temperature=1.0, num_samples=samples, seed=budget)
    answers = generate(model, tokenizer, encoded, decoding, steering=grammar.rows(budget), **kwargs)
    return [answer for row in answers for answer in row]


def test_the_vocabulary_is_padded_wider_than_the_tokenizer(tokenizer, model):
    assert model.config.vocab_size > len(tokenizer)  # or nothing below would show that this is handled


@pytest.mark.processes
@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_document_is_valid_and_ends_in_time(tokenizer, model, name, spaced):
    schema = SCHEMAS[name]
    grammar = grammar_of(schema, tokenizer, model, spaced)
    texts = set()
    for spare in (0, 1, 20):
        for answer in sample(model, tokenizer, grammar, grammar.shortest + spare):
            found = json_schema.parse(answer.text, schema)
            assert found.error is None, answer.text
            assert answer.finished
            texts.add(answer.text)
    assert len(texts) > 3


def test_json_is_spaced_as_it_is_asked_for(tokenizer, model):
    for spaced in (False, True):
        grammar = grammar_of(INVOICE, tokenizer, model, spaced)
        for answer in sample(model, tokenizer, grammar, grammar.shortest + 8):
            value = json.loads(answer.text)
            assert (
                json.dumps(value, separators=(", ", ": ") if spaced else (",", ":"), ensure_ascii=False) == answer.text
            )


def test_each_prompt_can_have_a_grammar_of_its_own(tokenizer, model):
    grammars = [grammar_of({"enum": [text]}, tokenizer, model) for text in ("one", "two", "three")]
    encoded = [tokenizers.encode_prompt(tokenizer, text) for text in ("a", "b" * 90, "c")]
    for max_batch_tokens in (1, 8192):
        answers = generate(
            model,
            tokenizer,
            encoded,
            Decoding(20),
            steering=lambda number: JsonRow(grammars[number], 20),
            max_batch_tokens=max_batch_tokens,
        )
        assert [answer.text for (answer,) in answers] == ['"one"', '"two"', '"three"']


def test_a_budget_below_the_shortest_document_is_an_error_with_the_text(tokenizer, model):
    grammar = grammar_of(INVOICE, tokenizer, model)
    for answer in sample(model, tokenizer, grammar, grammar.shortest - 2, samples=1):
        found = json_schema.parse(answer.text, INVOICE)
        assert found.value is None
        assert "breaks off before its end; raise --max_new_tokens" in found.error
        assert found.text == answer.text
        assert answer.text.startswith('{"number":"')
        assert not answer.finished
        assert answer.cut


def test_answers_do_not_depend_on_the_batch(tokenizer, model):
    grammar = grammar_of(SCHEMAS["map"], tokenizer, model)
    together = sample(model, tokenizer, grammar, 60)
    alone = sample(model, tokenizer, grammar, 60, max_batch_tokens=1)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert len({len(answer.tokens) for answer in together}) > 1  # some ended while others went on


@pytest.mark.parametrize(
    ("schema", "loved", "text"),
    [
        ({"type": "string"}, "a", '"aaaaa"'),
        ({"type": "string", "minLength": 3, "maxLength": 7}, "a", '"aaaaaaa"'),  # the schema's limit is larger
        ({"type": "integer"}, "1", "1111"),
        ({"type": "array", "items": {"type": "integer"}}, ",1", "[1,1,1,0]"),
        ({"type": "array", "items": {"type": "integer"}, "maxItems": 5}, ",1", "[1,1,1,1,1111]"),
        (
            {"type": "object", "additionalProperties": {"const": 1}},
            '",',
            '{"":1,",":1,",,":1," ":1}',
        ),  # no name twice
        ({}, "e9", "9e0"),  # a large exponent would leave the finite numbers
    ],
)
def test_what_runs_on_is_closed(tokenizer, model, schema, loved, text):
    """A model that always writes the characters it loves, the first of them most, comes to an end all the same."""
    grammar = grammar_of(schema, tokenizer, model, string=5, items=3, number=4)
    row, ids = JsonRow(grammar, 200), []
    scores = torch.zeros(model.config.vocab_size)
    for rank, character in enumerate(reversed(loved), start=1):
        scores[tokenizer.convert_tokens_to_ids(character)] = rank
    while len(ids) < 50 and tokenizer.eos_token_id not in ids:
        ids.append(int(row.change(scores.clone()).argmax()))
        row.consume(ids[-1])
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert row.closed == ("maxLength" not in schema)  # there the schema itself ends it


def test_the_mask_is_the_grammar(tokenizer, model):
    """Exactly the tokens that go on to a prefix of a document keep their scores."""
    schema = {"enum": ["Good", "Go", "Bad"]}
    grammar = grammar_of(schema, tokenizer, model)
    row, text = JsonRow(grammar, 50), ""
    documents = ['"Good"', '"Go"', '"Bad"']
    for token in tokenizer.encode('"Good"', add_special_tokens=False):
        scores = torch.randn(model.config.vocab_size)
        masked = row.change(scores.clone())
        kept = {place for place, score in enumerate(masked.tolist()) if score > float("-inf")}
        words = {place: tokenizer.decode([place]) for place in range(len(tokenizer))}
        fits = {place for place, word in words.items() if any(d.startswith(text + word) for d in documents)}
        assert kept == fits - set(tokenizer.all_special_ids)
        assert all(masked[place] == scores[place] for place in kept)
        text += words[token]
        row.consume(token)
    masked = row.change(torch.zeros(model.config.vocab_size))
    assert (masked > float("-inf")).nonzero().flatten().tolist() == [tokenizer.eos_token_id]


def test_the_masks_of_several_rows_are_those_of_each(tokenizer, model):
    """Under unlike grammars, at unlike places, one of them at its end."""
    columns = model.config.vocab_size
    schemas = [INVOICE, {"enum": ["Good", "Go"]}, {"const": "x"}, {"type": "integer"}]
    begun = ['{"number":"', '"Go', '"x"', "1"]
    rows = []
    for schema, text in zip(schemas, begun, strict=True):
        rows.append(JsonRow(grammar_of(schema, tokenizer, model), 60))
        for token in tokenizer.encode(text, add_special_tokens=False):
            rows[-1].change(torch.zeros(columns))
            rows[-1].consume(token)
    rows[2].change(torch.zeros(columns))
    rows[2].consume(tokenizer.eos_token_id)
    scores = torch.randn(len(rows), columns)
    alone = [row.change(own.clone()) for row, own in zip(rows, scores, strict=True)]
    assert torch.equal(JsonRow.change_all(rows, scores.clone()), torch.stack(alone))
    assert len({tuple((masked > float("-inf")).tolist()) for masked in alone}) == len(rows)


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_left_of_an_end_is_the_end_from_there(tokenizer, model, name):
    """Outside of what is begun, so that a long end need not be searched for again behind each token that may come."""
    grammar = grammar_of(SCHEMAS[name], tokenizer, model)
    matcher, scanner, known = grammar.byte_matcher.deep_copy(), Scanner(), grammar.shortest_closing.text
    for index, byte in enumerate(known):
        if not scanner.length:
            assert find_closing(matcher, scanner, grammar.hints) == known[index:]
        matcher.consume_tokens([byte])
        scanner.feed(bytes([byte]))
    assert grammar.closing_of(known) == grammar.shortest_closing


def test_scores_of_another_width_are_refused(tokenizer, model):
    row = JsonRow(grammar_of(INVOICE, tokenizer, model), 50)
    with pytest.raises(ValueError, match=r"scores have 7 columns, the grammar was made for"):
        row.change(torch.zeros(7))


def test_a_slow_tokenizer_is_refused(tokenizer, model):
    class Slow:
        is_fast, eos_token_id = False, 0

    with pytest.raises(UserError, match=r"tokenizer\.json"):
        JsonGrammar({}, Slow(), 100)


@pytest.mark.parametrize(
    ("schema", "begun", "closing"),
    [
        ({}, "", "0"),
        ({}, '{"a":[1,{"b', '":0}]}'),
        ({"type": "string", "minLength": 3}, '"a\\', '" "'),
        (INVOICE, '{"number":"AB', None),
        (
            {"properties": {"a": {"type": "object", "required": ["x" * 50]}, "b": {"const": 1}}, "required": ["b"]},
            '{"',
            'b":1}',
        ),
        ({"type": "integer", "minimum": 10**6, "multipleOf": 1000}, "", None),
        ({"type": "string", "pattern": "^(ab)+c$"}, '"', None),
        ({"type": "string", "pattern": "^(ab)+c$"}, '"a', None),
        ({"type": "string", "pattern": "LEFT|MIDDLE"}, '"MI', 'LEFT"'),
        ({"type": "string", "pattern": r"[A-F]{2}\d{2,}(x|[^x]y)z?"}, '"', 'AA00x"'),
        (
            {
                "type": "object",
                "patternProperties": {"^[a-c]\\.b$": {"type": "null"}},
                "additionalProperties": False,
                "minProperties": 1,
            },
            '{"',
            'a.b":null}',
        ),
        ({"type": "array", "items": {"type": "null"}, "minItems": 3}, "[null", ",null,null]"),
    ],
)
def test_closing(schema, begun, closing):
    grammar_schema = json_schema.preflight(schema).grammar_schema
    matcher = json_schema.compile_grammar(grammar_schema, json_schema.byte_tokenizer())
    assert matcher.consume_tokens(list(begun.encode()))
    scanner = Scanner()
    scanner.feed(begun.encode())
    found = find_closing(matcher, scanner, hints_of(grammar_schema)).decode()
    assert closing is None or found == closing
    assert json_schema.parse(begun + found, schema).error is None
    assert len(found) < 100


def test_scanner():
    scanner = Scanner()
    scanner.feed('{"né":["a\\"b", -1.5e'.encode())
    assert (scanner.in_string, scanner.commas, scanner.length, scanner.exponent) == (False, [0, 1], 5, True)
    scanner.feed(b'3],"k')
    assert (scanner.in_string, scanner.commas, scanner.length, scanner.key) == (True, [1], 1, b"k")
    scanner.feed('éy":true'.encode())
    assert (scanner.in_string, scanner.commas, scanner.length, scanner.exponent) == (False, [1], 0, False)


@pytest.mark.processes
@pytest.mark.skipif(not CASES.exists(), reason="needs the schemas from the wild")
def test_schemas_from_the_wild(tokenizer, model):
    for line in CASES.read_text(encoding="utf-8").splitlines()[::25]:
        case = json.loads(line)
        try:
            found = json_schema.preflight(case["schema"])
        except UserError:
            continue
        grammar = JsonGrammar(found.grammar_schema, tokenizer, model.config.vocab_size)
        for answer in sample(model, tokenizer, grammar, grammar.shortest + 30, prompts=1):
            parsed = json_schema.parse(answer.text, case["schema"])
            assert parsed.error is None or (not found.enforced and "satisfy" in parsed.error), case["name"]
            assert answer.finished
