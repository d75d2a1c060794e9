"""Answers that the budget has cut, or in which a value ran on: marked, and tried again."""

from __future__ import annotations

import json

import pytest
import torch
from support.inputs import read_rows, write_rows

import infer_idp
from common import cli
from common.generation import generate as generation
from common.generation import json_schema
from common.generation.steering import Steering
from common.models import loading
from common.models.source import LoadedModel, ModelSource
from common.tasks.idp.answer_form import AnswerForm
from common.tasks.idp.extractor import ExtractionSettings, Extractor
from common.tasks.idp.wholeness import ran_on

LINES = {
    "type": "object",
    "properties": {
        "number": {"type": "string"},
        "lines": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"item": {"type": "string"}, "qty": {"type": "integer"}},
                "required": ["item", "qty"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["number", "lines"],
    "additionalProperties": False,
}
HELD = AnswerForm("held", spaced=False)
DOCUMENT = "Invoice 77\n3 Cable\n1 Lamp\n2 Table"
WHOLE = {
    "number": "77",
    "lines": [{"item": "Cable", "qty": 3}, {"item": "Lamp", "qty": 1}, {"item": "Table", "qty": 2}],
}


@pytest.mark.parametrize(
    ("value", "document", "names"),
    [
        ({"no": "1.1.1.1"}, "Receipt 1.1", ["no"]),
        ({"no": "1.1.1.1"}, "Server 1.1.1.1 was sold", []),  # it stands there
        ({"no": "A 1.1.1.1.1."}, "Receipt 1.1", ["no"]),
        ({"no": "1.1.1.1 of May"}, "Receipt 1.1", []),  # the model came out of it
        ({"name": "the the the the"}, "the shop", ["name"]),
        ({"name": "Hoooooole"}, "Hole", []),
        ({"total": 1000}, "RM 1 000", []),
        ({"total": 1111111111}, "RM 11", ["total"]),
        ({"name": "TTT Shop"}, "another", []),
        ({"paid": True, "note": None, "tags": []}, "x", []),
        ({"lines": [{"item": "Tea", "price": 2}] * 3}, "Tea 2", ["lines"]),
        ({"lines": [{"item": "Tea", "price": 2}] * 3}, "Tea 2\nTea 2\nTea 2", []),
        ({"lines": [{"item": "Tea", "price": 2}] * 2}, "Tea 2", []),
        ({"a": {"tags": ["x", "y", "z", "z", "z"]}}, "x y z", ["a.tags"]),
        (["1.1.1.1"], "", ["[0]"]),
        ("ab" * 300, "", ["$"]),
        (None, "", []),
    ],
)
def test_what_ran_on(value, document, names):
    assert ran_on(value, document) == names


class Prefers(Steering):
    """Makes the tokens of one text, step by step, the likeliest, and then the end, before `held` has its say."""

    def __init__(self, tokens: list[int], held: Steering | None) -> None:
        self.tokens, self.step, self.held = tokens, 0, held

    @property
    def closed(self) -> bool:
        return self.held is not None and self.held.closed

    def change(self, scores):
        liked = torch.zeros_like(scores)
        liked[self.tokens[min(self.step, len(self.tokens) - 1)]] = 9
        self.step += 1
        return self.held.change(liked) if self.held else liked

    def consume(self, token):
        if self.held:
            self.held.consume(token)


@pytest.fixture
def write(monkeypatch, tokenizer):
    """Makes any model write a text, as far as the grammar and the budget let it."""
    original, budgets = generation.TextBatch.ask, []

    def dictate(text: str) -> list[int]:
        tokens = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]

        def ask(batch, key, prompt, decoding, *, steering=None, **how):
            budgets.append(decoding.max_new_tokens)

            def preferring() -> Prefers:
                return Prefers(tokens, steering() if steering else None)

            original(batch, key, prompt, decoding, steering=preferring, **how)

        monkeypatch.setattr(generation.TextBatch, "ask", ask)
        return tokens

    dictate.budgets = budgets
    return dictate


@pytest.fixture(scope="module")
def loaded(tiny_base):
    return LoadedModel(*loading.load_for_inference(ModelSource(tiny_base)), 8192)


def compact(value) -> str:
    return json.dumps(value, separators=(",", ":"))


def read(loaded, schema=LINES, document=DOCUMENT, free=False, **settings):
    preflight = None if free else json_schema.preflight(schema)
    return Extractor(loaded, schema, preflight, ExtractionSettings(**settings), HELD).extract([document])[0]


@pytest.mark.processes
def test_an_answer_that_the_budget_cut_is_tried_again_with_twice_of_it(write, loaded):
    length = len(write(compact(WHOLE)))
    whole = read(loaded, max_new_tokens=length)
    assert (whole.value, whole.cut, write.budgets) == (WHOLE, None, [length])
    kept = read(loaded, max_new_tokens=length - 4, on_cut="flag")
    assert kept.error is None  # valid, and yet not all: that is what has to be said
    assert kept.value != WHOLE
    assert kept.cut == f"the answer is cut: it had not ended within {length - 4} tokens; raise --max_new_tokens"
    write.budgets.clear()
    again = read(loaded, max_new_tokens=length - 4)
    assert (again.value, again.cut) == (WHOLE, None)
    assert write.budgets == [length - 4, 2 * (length - 4)]
    assert again.tokens == kept.tokens + whole.tokens
    third = length // 3
    lost = read(loaded, max_new_tokens=third)  # not even then
    assert f"not ended within {2 * third} tokens" in lost.cut
    assert (lost.error is None) and lost.value["lines"] != WHOLE["lines"]


def test_the_second_try_takes_what_the_context_leaves(write, loaded):
    length = len(write(compact(WHOLE)))
    budget = length - 4
    document = DOCUMENT + "\nThank you for your visit."
    prompt = len(Extractor(loaded, LINES, None, ExtractionSettings(budget), HELD).encode(document))
    assert read(loaded, document=document, max_new_tokens=budget, max_len=prompt + length).cut is None
    assert write.budgets == [budget, length]
    assert read(loaded, document=document, max_new_tokens=budget, max_len=prompt + budget).cut


def test_free_answers_are_cut_too(write, loaded):
    length = len(write(compact(WHOLE)))
    assert read(loaded, free=True, max_new_tokens=length).cut is None
    assert read(loaded, free=True, max_new_tokens=length - 4, on_cut="flag").cut


def test_the_last_token_is_no_cut(write, loaded):
    """An answer that just fits is whole, whatever its budget, if the model would have ended there."""
    length = len(write('{"number":"1","lines":[]}'))
    for budget in range(length, length + 5):
        answer = read(loaded, max_new_tokens=budget, on_cut="flag")
        assert (answer.value, answer.cut) == ({"number": "1", "lines": []}, None)


@pytest.mark.processes
def test_exit_code_stderr_and_rows_say_so(write, capsys, tiny_base, tmp_path):
    length = len(write(json.dumps(WHOLE)))  # with spaces, as a model writes it that was not trained
    schema, out = tmp_path / "schema.json", tmp_path / "out.jsonl"
    schema.write_text(json.dumps(LINES))
    base = ["--model_dir", tiny_base, "--schema", str(schema), "--typed_fields", "held"]

    def infer(budget: int, *more: str) -> tuple[int | None, str, str]:
        code = infer_idp.main([*base, "--max_new_tokens", str(budget), *more])
        return code, *capsys.readouterr()

    assert infer(length, "--document", DOCUMENT)[0] is None
    code, _, err = infer(length // 3, "--document", DOCUMENT)
    assert code == cli.CUT
    assert f"the answer is cut: it had not ended within {2 * (length // 3)} tokens; raise --max_new_tokens" in err
    code, told, _ = infer(length - 4, "--on_cut", "flag", "--document", DOCUMENT, "--confidence")
    assert (code, json.loads(told)["cut"]) == (cli.CUT, True)
    rows = ["--input", write_rows(tmp_path / "in.jsonl", [{"document": DOCUMENT}] * 2), "--output", str(out)]
    code, _, err = infer(length - 4, "--on_cut", "flag", *rows)
    assert code == cli.CUT
    assert "2 of 2 answers are cut; raise --max_new_tokens" in err
    assert [row["cut"] for row in read_rows(out)] == [True, True]
    assert infer(length - 4, *rows)[0] is None
    assert ["cut" in row for row in read_rows(out)] == [False, False]


def test_what_ran_on_is_marked_though_the_model_ended_it(write, loaded):
    write('{"number":"1.1.1.1.1","lines":[]}')
    answer = read(loaded, max_new_tokens=60)
    assert answer.value["number"] == "1.1.1.1.1"
    assert answer.cut.startswith("the answer is cut: number ran on; ")
