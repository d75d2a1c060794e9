"""DPO: reference log-probabilities, what moves and what stays, pairs."""

from __future__ import annotations

import math

import pytest
import torch
from support.inputs import write_rows
from support.models import distance, weights
from support.training import SCRIPTS, flags, loss_curve, train

import dpo_train
from common import cli
from common.cli import UserError
from common.data import shapes, training_files
from common.models import adapters, tokenizers
from common.models import loading as models
from common.models.source import ModelSource
from common.training import dpo
from common.training.flags import dpo_settings
from common.training.trainer import prepare_student

pytestmark = pytest.mark.processes


def log_prob(model, prompt: list[int], answer: list[int]) -> float:
    """The sum of an answer's token log-probabilities, by one plain forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1)[range(len(answer)), answer].sum().item()


@pytest.fixture
def untrained(base, rows, tmp_path):
    """`untrained(*flags)`: a DPOTrainer that has not trained yet, and the rows it works on."""

    def build(*more: object):
        argv = flags(base, rows["dpo"], tmp_path / "run", "--per_device_train_batch_size", 3, *more)
        settings = dpo_settings(cli.parse_args(dpo_train.build_parser(), argv))
        tokenizer = tokenizers.load_tokenizer(base)
        student = prepare_student(settings, tokenizer)
        pairs = training_files.read(rows["dpo"], shapes.DPO)
        encoded = dpo.encode_pairs(tokenizer, rows["dpo"], pairs, settings.max_len, whole=False)
        return dpo.build_trainer(settings, student, tokenizer, encoded), encoded

    return build


@pytest.mark.parametrize("start", ["base", "sft"])
def test_reference_log_probs(start, untrained, base, unbroken):
    reference = models.load_base(ModelSource(base, dtype="float32")).eval()
    more = ["--lora_dropout", 0.5]
    if start == "sft":
        more = ["--lora_dropout", 0.2, "--init_adapter", unbroken("sft")]  # as that was trained with
        reference = models.load_for_inference(ModelSource(str(unbroken("sft")), dtype="float32"))[0]
    trainer, encoded = untrained(*more)
    assert ("ref" in trainer.model.peft_config) == (start == "sft")
    for side in ("chosen", "rejected"):
        expected = [log_prob(reference, row.prompt_ids, getattr(row, f"{side}_ids")) for row in encoded]
        assert list(trainer.train_dataset[f"ref_{side}_logps"]) == pytest.approx(expected, abs=1e-4)


def test_dpo_of_all_weights(base, rows, tmp_path):
    """The reference log-probabilities come from the student as it was, before the first step."""
    run = train(dpo_train.main, base, rows["dpo"], tmp_path / "run", "--lora_r", 0, "--max_steps", 12,
                "--learning_rate", 0.001)  # fmt: skip
    assert loss_curve(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert loss_curve(run)[-1] < 0.6
    assert not adapters.is_adapter(run)
    model, _ = models.load_for_inference(ModelSource(str(run)))
    assert model.config.use_cache


def test_the_reference_stays_and_the_policy_moves(untrained, unbroken):
    trainer, encoded = untrained("--init_adapter", unbroken("sft"), "--max_steps", 10, "--learning_rate", 0.003)
    model = trainer.model

    def copy(part: str) -> dict:
        return {n: p.detach().clone() for n, p in model.named_parameters() if part in n}

    before = {part: copy(part) for part in ("base_layer", "embed", ".ref.", ".default.")}
    expected = weights(unbroken("sft"))
    for name, tensor in before[".ref."].items():
        assert torch.equal(tensor, expected[name.replace(".ref.", ".")])
    gaps = [gap(model, row) for row in encoded]
    trainer.train()
    after = {part: copy(part) for part in before}
    same = {part: all(torch.equal(after[part][n], p) for n, p in before[part].items()) for part in before}
    assert same == {part: part != ".default." for part in before}
    model.eval()
    moved = [gap(model, row) - old for row, old in zip(encoded, gaps, strict=True)]
    assert sum(moved) / len(moved) > 0.5


def gap(model, row: dpo.EncodedPair) -> float:
    chosen, rejected = (log_prob(model, row.prompt_ids, getattr(row, f"{side}_ids")) for side in ("chosen", "rejected"))
    return chosen - rejected


@pytest.mark.parametrize("kind", ["dpo", "dpo from sft"])
def test_dpo_starts_at_ln_2(kind, unbroken, base, rows, tmp_path):
    one = train(*unbroken.task(kind), tmp_path / "run", *unbroken.settings(kind), "--max_steps", 1,
                "--lora_dropout", 0)  # fmt: skip
    assert loss_curve(one)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_dpo_learns_and_keeps_no_reference_folder(unbroken):
    for kind in ("dpo", "dpo from sft"):
        folder = unbroken(kind)
        assert loss_curve(folder)[-1] < 0.6
        assert {path.name for path in folder.rglob("*") if path.is_dir()} >= {"checkpoints", "checkpoint-36"}
        assert not [path for path in folder.rglob("ref*")]


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_init_adapter_is_where_training_starts(script, unbroken, base, rows, tmp_path):
    start = unbroken("sft")
    run = train(SCRIPTS[script], base, rows[script], tmp_path / "run", "--init_adapter", start,
                "--max_steps", 1, "--learning_rate", 1e-12)  # fmt: skip
    assert distance(run, start) < 1e-9


def test_equal_answers_are_refused(base, tmp_path, capsys):
    good = {"prompt": "a", "chosen": "Good", "rejected": "Bad"}
    data = write_rows(tmp_path / "rows.jsonl", [good, good | {"prompt": ""}, good, good | {"rejected": "Good"}, good])
    with pytest.raises(UserError, match=r"rows.jsonl, line 2: 'prompt' must be a non-empty string"):
        training_files.read(data, shapes.DPO)
    assert len(training_files.read(data, shapes.DPO, skip_bad_rows=True)) == 3
    assert "rows.jsonl, line 4: the chosen and the rejected answer are the same; skipped" in capsys.readouterr().err
    same = write_rows(tmp_path / "same.jsonl", [good, good | {"rejected": "Good"}])
    with pytest.raises(UserError, match=r"same.jsonl, line 2: the chosen and the rejected answer are the same"):
        train(dpo_train.main, base, same, tmp_path / "run")


def test_both_answers_of_a_cut_row_follow_the_same_prompt(tokenizer):
    long = {"prompt": "1 " * 60, "chosen": "Good", "rejected": "9" * 20}
    rows = [long, {"prompt": "5", "chosen": "a", "rejected": "b"}]
    cut, whole = dpo.encode_pairs(tokenizer, "x", rows, max_len=80, whole=False)
    assert len(cut.prompt_ids) + len(cut.rejected_ids) <= 80
    assert tokenizer.decode(cut.chosen_ids) == "Good<|im_end|>"
    assert tokenizer.decode(cut.rejected_ids) == "9" * 20 + "<|im_end|>"
    assert tokenizer.decode(cut.prompt_ids).endswith("<|im_start|>assistant\n")
    assert whole.prompt_ids == tokenizers.encode_prompt(tokenizer, "5")
    with pytest.raises(UserError, match="no row fits --max_len 10"):
        dpo.encode_pairs(tokenizer, "x", rows, max_len=10, whole=False)
