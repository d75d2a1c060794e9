"""What makes a miniature copy: its heads, its tokens and its exercises."""

from __future__ import annotations

import json

import pytest
import torch

import tiny_student
from common.cli import UserError
from common.models import tokenizers
from common.training import copying, miniature

FRAME = 'Extract.\n\nJSON Schema: {"total":{"type":"number"}}\n\nDocument:\n'
PROMPTS = [f"{FRAME}Shop {name}\nTotal: {number}.{number % 90 + 10} EUR" for number, name in
           enumerate(["Acme", "Bar", "Zoo", "Acme"] * 6, start=1000)]  # fmt: skip


@pytest.mark.parametrize(("hidden", "layers"), [(128, 3), (256, 2)])
def test_heads_copy_before_any_training(tokenizer, hidden, layers):
    """In a random sequence that comes twice, what followed a token is what follows it again."""
    model = miniature.build_model(tokenizer, hidden=hidden, layers=layers, heads=hidden // copying.HEAD_SIZE, seed=0)
    once = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:60]
    ids = torch.cat([once, once])[None]

    def right() -> float:
        with torch.no_grad():
            guesses = model(input_ids=ids).logits[0, 60:-1].argmax(dim=-1)
        return (guesses == once[1:]).float().mean().item()

    assert right() < 0.05
    copying.place_heads(model, seed=0)
    assert right() > 0.8


def test_the_frame_is_what_all_prompts_start_with():
    assert copying.frame_of(PROMPTS) == FRAME
    assert copying.frame_of(["same\ntext"] * 2) == "same\n"
    assert copying.frame_of(["a\n", "b\n"]) == ""


def test_digits_are_paired_and_the_frame_is_one_token():
    tokenizer = tokenizers.align(miniature.build_tokenizer(PROMPTS, 500, copying.tokens(PROMPTS)))
    assert tokenizer.encode(FRAME) == [tokenizer.convert_tokens_to_ids(FRAME)]
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode('{"total":1234.5}')]
    assert pieces == ["{", '"total":', "12", "34", ".", "5", "}"]
    for prompt in PROMPTS:
        assert tokenizer.decode(tokenizer.encode(prompt)) == prompt


def test_exercises_ask_for_spans_of_the_document():
    exercises = copying.CopyExercises(PROMPTS, seed=0)
    for chosen in PROMPTS:
        prompt, answer = exercises.example(chosen)
        document = prompt.removeprefix(FRAME)
        assert prompt.startswith(FRAME)
        assert document in chosen
        for key, value in json.loads(answer).items():
            assert key
            assert key in document
            assert value in document
        assert exercises.levels(chosen) == []


def test_a_base_for_copying(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input": prompt}) + "\n" for prompt in PROMPTS))
    argv = ["--prompts", str(rows), "--copying", "--steps", "2", "--rows_per_step", "4"]
    tiny_student.main([*argv, "--save_dir", str(tmp_path / "base")])
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert (config["num_attention_heads"], config["hidden_size"]) == (4, 128)
    assert json.loads((tmp_path / "base" / "base.json").read_text())["settings"]["copying"] is True
    with pytest.raises(UserError, match="--copying makes exercises of --prompts"):
        tiny_student.main(["--copying", "--save_dir", str(tmp_path / "other")])
