"""The figures of a fine-tuned run on its validation file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from common.cli import UserError
from common.jobs import validation
from common.models import tokenizers
from common.models.loading import load_for_inference
from common.models.source import ModelSource

SETTINGS = {"load_in_4bit": "off", "max_len": 128}


def direct(model, tokenizer, prompt: str, answer: str) -> tuple[float, int, int]:
    """(negative log-likelihood, tokens, likeliest ones) of one answer, a token after the other."""
    import torch

    prompt_ids = tokenizers.encode_prompt(tokenizer, prompt)
    nll, right = 0.0, 0
    answer_ids = tokenizers.encode_completion(tokenizer, answer)
    for number, token in enumerate(answer_ids):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt_ids + answer_ids[:number]])).logits[0, -1].float()
        nll -= float(logits.log_softmax(0)[token])
        right += int(logits.argmax()) == token
    return nll, len(answer_ids), right


def test_the_figures_are_those_of_each_answer_by_itself(tiny_base):
    rows = [{"input": f"Age: {20 + n}", "output": ("Good", "Bad")[n % 2]} for n in range(6)]
    figures = validation.judge(tiny_base, SETTINGS, "val.jsonl", rows)
    model, tokenizer = load_for_inference(ModelSource(tiny_base, load_in_4bit="off"))
    nll, tokens, right = np.array([direct(model, tokenizer, row["input"], row["output"]) for row in rows]).T
    assert figures["loss"]["value"] == pytest.approx(nll.sum() / tokens.sum(), abs=1e-3)
    assert figures["token_accuracy"]["value"] == pytest.approx(right.sum() / tokens.sum(), abs=1e-6)
    assert figures["accuracy"]["value"] == pytest.approx((right == tokens).mean())
    assert (figures["n"], figures["left_out"], figures["tokens"]) == (6, 0, tokens.sum())
    assert figures["labels"] == ["Bad", "Good"]


def test_of_preferences_how_often_the_preferred_answer_is_the_likelier(tiny_base):
    rows = [{"prompt": "Age: 20", "chosen": "Good", "rejected": "Bad"}]
    rows.append({"prompt": "Age: 20", "chosen": "Bad", "rejected": "Good"})
    figures = validation.judge(tiny_base, SETTINGS, "val.jsonl", rows)
    assert figures["preference_accuracy"]["value"] == 0.5  # one of the two, whatever the model
    assert "accuracy" not in figures


def test_of_preferences_what_was_gained_on_the_reference_counts_apart():
    chosen, rejected = np.array([[5.0, 2, 2], [1.0, 2, 2]]), np.array([[4.0, 2, 2], [2.0, 2, 2]])
    before = [np.array([[9.0, 2, 0], [1.0, 2, 0]]), np.array([[5.0, 2, 0], [2.0, 2, 0]])]
    figures = validation.figures_of([chosen, rejected], None, before)
    assert figures["preference_accuracy"]["value"] == 0.5  # the second row's, without the reference
    assert figures["reward_accuracy"]["value"] == 0.5  # the first row's, which gained 4 against 1
    assert "reward_accuracy" not in validation.figures_of([chosen, rejected], None)


def test_few_answers_are_labels_and_many_are_not():
    sums = [np.array([[1.0, 2, 2], [3.0, 2, 1], [0.0, 2, 2], [1.0, 2, 2]])]
    assert validation.figures_of(sums, ["a", "b", "a", "b"])["accuracy"]["value"] == 0.75
    assert "accuracy" not in validation.figures_of(sums, ["a", "b", "c", "d"])
    figures = validation.figures_of(sums, ["a", "b", "a", "b"])
    assert (figures["loss"]["value"], figures["token_accuracy"]["value"]) == (0.625, 0.875)


def test_rows_that_are_too_long_are_counted_and_shared_ones_too(tiny_base, tmp_path, capsys):
    run = tmp_path / "artifacts"
    run.mkdir()
    for file in Path(tiny_base).iterdir():
        (run / file.name).symlink_to(file)
    (run / "run.json").write_text(json.dumps({"method": "sft", "settings": SETTINGS | {"max_len": 40}, "best": None}))
    rows = [{"input": "a", "output": "b"}, {"input": "c", "output": "word " * 100}]
    for name, kept in (("train", rows[:1]), ("val", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    argv = ["--run", str(run), "--data", str(tmp_path / "val.jsonl"), "--train_data", str(tmp_path / "train.jsonl")]
    validation.main(argv)
    figures = json.loads(capsys.readouterr().out)
    assert (figures["n"], figures["left_out"], figures["shared"]) == (1, 1, {"rows": 1, "of": 2})
    assert json.loads((run / "validation.json").read_text()) == figures
    for name in ("train", "val"):
        (tmp_path / f"{name}.jsonl").write_text('{"input": "only"}\n' + (tmp_path / f"{name}.jsonl").read_text())
    with pytest.raises(UserError, match="line 1"):
        validation.main(argv)
    settings = SETTINGS | {"max_len": 40, "skip_bad_rows": True}
    (run / "run.json").write_text(json.dumps({"method": "sft", "settings": settings, "best": None}))
    validation.main(argv)  # without the rows that the training went without
    assert {**json.loads((run / "validation.json").read_text()), "data_sha256": figures["data_sha256"]} == figures
    with pytest.raises(UserError, match=r"has no run\.json"):
        validation.main([f"--run={tmp_path}", *argv[2:]])
