"""Runs of distill_train.py: resumed, judged, all weights; the kinds of rows that it reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.distillation import distill, flags, loss_column
from support.inputs import CORPUS, PROMPTS, write_rows
from support.models import distance, run_json

import sft_train
from common.cli import UserError
from common.models import adapters, chats
from common.models import loading as models
from common.models.source import ModelSource
from common.training import batches, losses

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("lora", ["--lora_r=4", "--lora_r=0"])
def test_resumed_equals_unbroken(lora, base, teacher, uneven, tmp_path):
    """With a projection between widths, which is trained too."""
    more = ("--teacher", teacher, "--data", uneven, "--hidden_mse", 1, "--forward_kl", 1, "--save_steps", 3, lora)
    unbroken, resumed = distill(base, tmp_path / "unbroken", *more), tmp_path / "resumed"
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copytree(unbroken / "checkpoints" / "checkpoint-3", resumed / "checkpoints" / "checkpoint-3")
    distill(base, resumed, *more, "--resume")
    name = "model.safetensors" if lora == "--lora_r=0" else "adapter_model.safetensors"
    a, b = (load_file(run / name) for run in (unbroken, resumed))
    assert a.keys() == b.keys()
    assert not any("extra" in key for key in a)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert loss_column(resumed)[-3:] == loss_column(unbroken)[-3:]


def test_full_fine_tuning_trains_every_weight(base, uneven, tmp_path):
    sft_train.main(["--data", uneven, *flags(base, tmp_path / "run", "--lora_r", 0)])
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (base, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert not adapters.is_adapter(tmp_path / "run")
    models.load_for_inference(ModelSource(str(tmp_path / "run")))
    for more, words in ((["--load_in_4bit", "on"], "--load_in_4bit"), (["--init_adapter", "x"], "--init_adapter")):
        with pytest.raises(UserError, match=f"neither in 4 bits nor from an adapter; leave {words} out"):
            sft_train.main(["--data", uneven, *flags(base, tmp_path / "other", "--lora_r", 0, *more)])


def test_the_best_epoch_is_kept(base, uneven, tmp_path):
    """Judged by rows that say the opposite of what is trained: every epoch makes it worse, so the first is the best."""
    other = write_rows(tmp_path / "other.jsonl", [{"input": p, "output": "Bad"} for p in PROMPTS[:8]])
    data = write_rows(tmp_path / "rows.jsonl", [{"input": p, "output": "Good"} for p in PROMPTS[:8]])
    argv = flags(
        base, tmp_path / "run", "--max_steps", -1, "--epochs", 6, "--eval_data", other, "--learning_rate", 0.05
    )
    sft_train.main(["--data", data, *argv])
    held_out = loss_column(tmp_path / "run", "eval_loss")
    best = run_json(tmp_path / "run")["best"]
    assert best["eval_loss"] == min(held_out) < held_out[-1]
    assert best["step"] == 2 * (held_out.index(min(held_out)) + 1)
    model, tokenizer = models.load_for_inference(ModelSource(str(tmp_path / "run"), dtype="float32"))
    rows = [chats.encode(tokenizer, p, "Bad") for p in PROMPTS[:8]]
    loss = [losses.completion_loss(model, batches.collate(rows[i : i + 4], 0))[0].item() for i in (0, 4)]
    assert sum(loss) / 2 == pytest.approx(best["eval_loss"], abs=1e-3)
    assert not (tmp_path / "run" / "best.json").exists()


def test_progress_is_told_as_it_goes(base, teacher, uneven, tmp_path):
    run = distill(base, tmp_path / "run", "--teacher", teacher, "--data", uneven)
    lines = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert {line["max_steps"] for line in lines} == {6}
    assert [line["forward_kl"] for line in lines[1:]] == loss_column(run, "forward_kl")
    assert "loss" not in lines[0]


def test_without_a_teacher_it_is_plain_training(base, uneven, tmp_path):
    run = distill(base, tmp_path / "run", "--ce", 1, "--data", uneven)
    sft_train.main(["--data", uneven, *flags(base, tmp_path / "sft")])
    assert distance(run, tmp_path / "sft") == 0


def test_text_and_squad_and_teacher_text_are_read(base, teacher, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(CORPUS[:3]))
    run = distill(base, tmp_path / "text", "--teacher", teacher, "--data", text, "--max_len", 32, "--eval_data", text,
                  "--max_steps", 2)  # fmt: skip
    assert run_json(run)["data"]["rows"] == 1
    assert loss_column(run, "eval_loss")
    answers = [{"text": "lamps", "answer_start": 11}]
    questions = [{"id": str(i), "question": f"What does Acme make, {i}?", "answers": answers} for i in range(4)]
    paragraph = {"context": "Acme makes lamps.", "qas": questions}
    articles = [{"title": f"article {i}", "paragraphs": [paragraph]} for i in range(12)]
    (tmp_path / "squad.json").write_text(json.dumps({"version": "1.1", "data": articles}))
    distill(base, tmp_path / "squad", "--teacher", teacher, "--data", tmp_path / "squad.json", "--max_steps", 1)
    rows = write_rows(tmp_path / "kd.jsonl", [{"input": p, "teacher_output": "Good", "text": "?"} for p in PROMPTS[:4]])
    run = distill(base, tmp_path / "kd", "--teacher", teacher, "--data", rows, "--max_steps", 1)
    assert run_json(run)["settings"]["forward_kl"] == 0.5  # what counted, also by default
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [{"text": line} for line in CORPUS[:4]])
    distill(base, tmp_path / "dataset_run", "--teacher", teacher, "--dataset", folder, "--max_steps", 1)
    with pytest.raises(UserError, match=r"has the columns text; name that of the text by --text_column"):
        distill(base, tmp_path / "other", "--teacher", teacher, "--dataset", folder, "--text_column", "body")
