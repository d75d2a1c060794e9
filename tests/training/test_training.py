"""The trainers: losses against their definitions, resumed runs against unbroken ones, what a run leaves behind."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from support.inputs import CORPUS, GROUPS, LABELS, PROMPTS, ROOT, write_rows
from support.models import build_base, distance, run_json, weights
from support.processes import join, wait_for

import dpo_train
import kd_train
import sft_train
from common import cli, run_record
from common.cli import UserError
from common.models import adapters, tokenizers
from common.models import loading as models
from common.models.source import ModelSource
from common.models.tokenizers import Encoded
from common.training import batches as completions
from common.training import trainer as training
from common.vram import preflight as vram

SCRIPTS = {"sft": sft_train.main, "kd": kd_train.main, "dpo": dpo_train.main}
QUICK = ("--learning_rate", "0.01", "--logging_steps", "1", "--gradient_accumulation_steps", "1")


def flags(base: str, data: str, save_dir: Path, *more: object) -> list[str]:
    return ["--student", base, "--data", data, "--save_dir", str(save_dir), *QUICK, *map(str, more)]


def train(main, base: str, data: str, save_dir: Path, *more: object) -> Path:
    main(flags(base, data, save_dir, *more))
    return save_dir


def losses(folder: Path) -> list[float]:
    with open(folder / "loss.csv", newline="") as handle:
        return [float(row["loss"]) for row in csv.DictReader(handle) if row["loss"]]


# The loss and the order of rows.


@pytest.fixture(scope="module")
def model(base):
    return models.load_base(ModelSource(base, dtype="float32"))


@pytest.fixture(scope="module")
def batch():
    draw = random.Random(0)
    rows = [Encoded([draw.randrange(400) for _ in range(n)], prompt) for n, prompt in ((9, 4), (14, 11), (6, 1))]
    return completions.collate(rows, pad_id=0)


def test_completion_loss_is_the_full_models(model, batch):
    loss, output = completions.completion_loss(model, batch)
    assert loss.item() == pytest.approx(model(**batch).loss.item(), abs=1e-6)
    columns = {t - 1 for row in batch["labels"].tolist() for t, label in enumerate(row) if label != completions.IGNORE}
    assert output.logits.shape == (3, len(columns), model.config.vocab_size)
    assert len(columns) < batch["labels"].shape[1] - 1


def test_completion_loss_of_parts_adds_up(model, batch):
    items = (batch["labels"] != completions.IGNORE).sum()
    parts = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    total = sum(completions.completion_loss(model, part, items)[0].item() for part in parts)
    assert total == pytest.approx(completions.completion_loss(model, batch)[0].item(), abs=1e-6)


def test_an_all_masked_batch_gives_zero(base, batch):
    model = models.load_base(ModelSource(base), training=True)
    masked = batch | {"labels": torch.full_like(batch["labels"], completions.IGNORE)}
    loss, _ = completions.completion_loss(model, masked)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_collate_pads_right_and_masks_prompts():
    batch = completions.collate([Encoded([5, 6, 7], 2), Encoded([8, 9], 1)], pad_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, 9, -100]]


@pytest.mark.parametrize("rows", [1, 15, 16, 100, 3000])
def test_every_row_once_an_epoch(rows):
    order = completions.LengthGroupedOrder([row % 7 for row in range(rows)], 16, seed=3)
    epochs = []
    for epoch in range(3):
        order.set_epoch(epoch)
        epochs.append(list(order))
        assert sorted(epochs[-1]) == list(range(rows))
        again = completions.LengthGroupedOrder(order.lengths, 16, seed=3, epoch=epoch)
        assert list(again) == epochs[-1]
    other_seed = list(completions.LengthGroupedOrder(order.lengths, 16, seed=4))
    if rows > 1:
        assert epochs[0] != epochs[1] != epochs[2]
        assert other_seed != epochs[0]


def test_neighbours_are_of_similar_length():
    draw = random.Random(0)
    lengths = [draw.randrange(1, 1000) for _ in range(2048)]
    order = list(completions.LengthGroupedOrder(lengths, 16, seed=0))

    def spread(rows):
        steps = [[lengths[row] for row in rows[i : i + 16]] for i in range(0, len(rows), 16)]
        return sum(max(step) - min(step) for step in steps) / len(steps)

    assert spread(order) < 0.1 * spread(range(2048))


def test_order_does_not_depend_on_how_a_step_is_cut(tokenizer, base, tmp_path):
    from transformers import TrainingArguments

    rows = [Encoded([1] * (5 + i % 11), 2) for i in range(40)]
    orders = []
    for size, accumulation in ((8, 1), (2, 4), (1, 8)):
        settings = TrainingArguments(
            output_dir=tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            use_cpu=True,
            report_to="none",
        )
        parts = training.completion_parts(rows, pad_id=0)
        trainer = training.loss_trainer(
            **parts, model=models.load_base(ModelSource(base), training=True), args=settings
        )
        orders.append(list(trainer._get_train_sampler()))
    assert orders[0] == orders[1] == orders[2]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> str:
    """Rows whose completions differ in length, so that a mean of means is not the mean."""
    rows = [{"input": PROMPTS[i], "output": CORPUS[i][: 3 + 5 * (i % 8)]} for i in range(16)]
    return write_rows(tmp_path_factory.mktemp("uneven") / "rows.jsonl", rows)


def test_accumulation_equals_a_real_batch(base, uneven, tmp_path):
    runs = [
        train(sft_train.main, base, uneven, tmp_path / f"{size}x{accumulation}", "--per_device_train_batch_size",
              size, "--gradient_accumulation_steps", accumulation, "--max_steps", 6, "--lora_dropout", 0)
        for size, accumulation in ((4, 1), (2, 2), (1, 4))
    ]  # fmt: skip
    assert max(t.abs().max() for name, t in weights(runs[0]).items() if "lora_B" in name) > 1e-3
    assert distance(runs[0], runs[1]) < 1e-5
    assert distance(runs[0], runs[2]) < 1e-5
    assert losses(runs[0]) == pytest.approx(losses(runs[2]), abs=1e-5)
    assert {run_json(run)["effective_batch"] for run in runs} == {4}


def test_gradient_checkpointing_changes_nothing(base, uneven, tmp_path):
    runs = [
        train(sft_train.main, base, uneven, tmp_path / f"gc_{switch}", "--gradient_checkpointing", switch,
              "--max_steps", 3, "--lora_dropout", 0)
        for switch in ("on", "off")
    ]  # fmt: skip
    assert distance(*runs) < 1e-6


def test_kd_on_the_same_texts_is_sft(base, rows, tmp_path):
    one = train(sft_train.main, base, rows["sft"], tmp_path / "sft", "--max_steps", 4)
    other = train(kd_train.main, base, rows["kd"], tmp_path / "kd", "--max_steps", 4)
    assert distance(one, other) == 0
    assert run_json(other)["method"] == "kd"


# Rows that are too long.


def test_the_prompt_is_cut_and_the_completion_is_not(tokenizer, capsys):
    pairs = [("Which? " + "word " * n, "Standard") for n in (1, 50, 500)] + [("Which? é日本" + "語" * 90, "Bad")]
    encoded = completions.encode_rows(tokenizer, "rows.jsonl", pairs, max_len=64, whole=False)
    frame = tokenizer.decode(tokenizers.encode_prompt(tokenizer, "\u2402"))
    before, after = frame.split("\u2402")
    for (prompt, completion), row in zip(pairs, encoded, strict=True):
        assert len(row.input_ids) <= 64
        assert tokenizer.decode(row.input_ids[row.prompt_length :]) == completion + "<|im_end|>"
        text = tokenizer.decode(row.input_ids[: row.prompt_length])
        assert text.startswith(before + "Which?")
        assert text.endswith(after)
        assert prompt.startswith(text.removeprefix(before).removesuffix(after))
    assert len(encoded[2].input_ids) > 60  # no more is cut than must be
    assert tokenizer.decode(encoded[0].input_ids).count("word") == 1
    assert "rows.jsonl: 3 of 4 prompts cut to fit --max_len 64" in capsys.readouterr().err


def test_a_row_without_room_for_its_completion_is_left_out(tokenizer, capsys):
    frame = len(tokenizers.encode_prompt(tokenizer, ""))
    answer = len(tokenizers.encode_completion(tokenizer, "9" * 40))
    pairs = [("7 7 7", "Bad"), ("7 7 7", "9" * 40), ("7 7 7 7", "9" * 80)]
    # exactly the frame and the completion: no prompt text would be left
    encoded = completions.encode_rows(tokenizer, "rows.jsonl", pairs, frame + answer, whole=False)
    assert [row is None for row in encoded] == [False, True, True]
    assert "2 of 3 rows left out, longer than --max_len" in capsys.readouterr().err
    encoded = completions.encode_rows(tokenizer, "rows.jsonl", pairs, frame + answer + 1, whole=False)
    assert [row is None for row in encoded] == [False, False, True]
    with pytest.raises(UserError, match="no row fits --max_len 8; raise it"):
        completions.encode_rows(tokenizer, "rows.jsonl", pairs, 8, whole=False)


def test_idp_mode_leaves_long_rows_out(base, tmp_path, capsys):
    long, short = (" ".join("1234567890" for _ in range(n)) for n in (12, 1))
    every = [{"input": long if i in (2, 6) else short + str(i), "teacher_output": LABELS[i % 3]} for i in range(8)]
    kept = [row for i, row in enumerate(every) if i not in (2, 6)]
    limit = ("--idp_mode", "--max_len", 80, "--max_steps", 3, "--per_device_train_batch_size", 2)
    one = train(kd_train.main, base, write_rows(tmp_path / "a.jsonl", every), tmp_path / "a", *limit)
    told = capsys.readouterr().err
    assert "2 of 8 rows left out, longer than --max_len 80: rows 3, 7" in told
    assert "cut to fit" not in told
    other = train(kd_train.main, base, write_rows(tmp_path / "b.jsonl", kept), tmp_path / "b", *limit)
    assert distance(one, other) == 0


# Interruptions.

RESUMABLE = ("--epochs", 3, "--per_device_train_batch_size", 2, "--save_steps", 5, "--lora_dropout", 0.2)
KINDS = ("sft", "dpo", "dpo from sft")


@pytest.fixture(scope="module")
def unbroken(base, rows, tmp_path_factory):
    """`unbroken(kind)`: a run that nobody disturbed; 12 steps an epoch."""
    folder = tmp_path_factory.mktemp("unbroken")
    done: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in done:
            done[kind] = train(*task(kind), folder / kind.replace(" ", "_"), *settings(kind))
        return done[kind]

    def task(kind: str):
        return SCRIPTS[kind[:3]], base, rows[kind[:3]]

    def settings(kind: str) -> list:
        return [*RESUMABLE, *(["--init_adapter", run("sft")] if kind == "dpo from sft" else [])]

    run.task, run.settings = task, settings
    return run


def checkpoint(save_dir: Path, step: int) -> bool:
    found = training.newest_checkpoint(str(save_dir))
    return found is not None and int(found.rpartition("-")[2]) >= step


def slowly(main, argv) -> int | None:
    """`main` with a pause in every step, so that it can be caught in the middle."""
    from transformers import Trainer

    step = Trainer.training_step

    def training_step(*args, **kwargs):
        time.sleep(0.03)
        return step(*args, **kwargs)

    Trainer.training_step = training_step
    return main(argv)


@pytest.fixture
def steps(unbroken, monkeypatch) -> list:
    """Grows by one with every batch that is trained on in this process, once the unbroken runs are done."""
    from transformers import Trainer

    for kind in KINDS:
        unbroken(kind)
    seen: list = []
    step = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda *args, **kwargs: seen.append(0) or step(*args, **kwargs))
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_equals_unbroken(kind, unbroken, spawn, steps, tmp_path):
    main, base, data = unbroken.task(kind)
    save_dir = tmp_path / "run"
    child = spawn(partial(slowly, main), flags(base, data, save_dir, *unbroken.settings(kind)), tmp_path / "log")
    wait_for(lambda: checkpoint(save_dir, 15) or not child.is_alive())
    child.kill()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
    assert run_json(save_dir)["state"] == "running"
    assert not adapters.is_adapter(save_dir)
    with pytest.raises(UserError, match="holds an unfinished run; pass --resume"):
        train(main, base, data, save_dir, *unbroken.settings(kind))
    before = int(training.newest_checkpoint(str(save_dir)).rpartition("-")[2])
    train(main, base, data, save_dir, *unbroken.settings(kind), "--resume")
    assert len(steps) == 36 - before
    whole = unbroken(kind)
    assert distance(save_dir, whole) <= (1e-6 if kind == "sft" else 1e-5)
    assert losses(save_dir) == pytest.approx(losses(whole), abs=1e-6)
    assert run_json(save_dir)["final_loss"] == pytest.approx(run_json(whole)["final_loss"], abs=1e-6)
    assert run_json(save_dir)["train_loss"] == pytest.approx(run_json(whole)["train_loss"], abs=1e-6)


def test_interrupted_and_resumed_equals_unbroken(unbroken, spawn, tmp_path):
    main, base, data = unbroken.task("sft")
    save_dir = tmp_path / "run"
    child = spawn(partial(slowly, main), flags(base, data, save_dir, *unbroken.settings("sft")), tmp_path / "log")
    wait_for(lambda: checkpoint(save_dir, 15) or not child.is_alive())
    os.kill(child.pid, signal.SIGINT)
    child.join(120)
    log = (tmp_path / "log").read_text()
    assert child.exitcode == cli.INTERRUPTED, log[-2000:]
    assert "a checkpoint will be saved" in log
    assert "Traceback" not in log
    record = run_json(save_dir)
    assert (record["state"], record["error"]) == ("failed", "interrupted")
    stopped = json.loads(Path(training.newest_checkpoint(str(save_dir)), "trainer_state.json").read_text())
    assert 15 <= stopped["global_step"] < 36
    train(main, base, data, save_dir, *unbroken.settings("sft"), "--resume")
    assert distance(save_dir, unbroken("sft")) <= 1e-6
    assert losses(save_dir) == pytest.approx(losses(unbroken("sft")), abs=1e-6)
    assert run_json(save_dir)["state"] == "done"


@pytest.mark.parametrize("damage", ["no trainer_state.json", "half a trainer_state.json", "no optimizer.pt"])
def test_a_checkpoint_cut_short_is_passed_over(damage, unbroken, tmp_path, capsys):
    main, base, data = unbroken.task("sft")
    save_dir = tmp_path / "run"
    shutil.copytree(unbroken("sft"), save_dir)
    older, newest = sorted((save_dir / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    file = newest / damage.rpartition(" ")[2]
    content = file.read_bytes()
    file.unlink()
    if damage.startswith("half"):
        file.write_bytes(content[: len(content) // 2])
    assert training.newest_checkpoint(str(save_dir)) == str(older)
    (save_dir / "run.json").write_text(json.dumps(run_json(save_dir) | {"state": "running"}))
    train(main, base, data, save_dir, *unbroken.settings("sft"), "--resume")
    assert f"going on from {older}" in capsys.readouterr().err
    assert distance(save_dir, unbroken("sft")) <= 1e-6


def test_resuming_without_a_checkpoint_starts_afresh(base, rows, tmp_path, capsys):
    train(sft_train.main, base, rows["sft"], tmp_path / "run", "--max_steps", 1, "--resume")
    assert "no complete checkpoint to go on from; starting afresh" in capsys.readouterr().err


def test_a_full_disk(base, rows, spawn, tmp_path):
    save_dir = tmp_path / "run"
    child = spawn(sft_train.main, flags(base, rows["sft"], save_dir, "--max_steps", 1), tmp_path / "log", 30_000)
    child.join(120)
    log = (tmp_path / "log").read_text()
    assert child.exitcode == cli.FAILED, log[-2000:]
    assert "error: cannot write" in log
    assert "Traceback" not in log
    assert run_json(save_dir)["state"] == "failed"
    assert not (save_dir / "adapter_model.safetensors").exists()
    assert not list(save_dir.glob(".*"))


def test_an_adapter_is_put_in_place_whole(base, rows, tmp_path, monkeypatch):
    """The disk fills up after the last checkpoint, with the adapter written and the rest of its files not."""
    save = training.save_student

    def fill_up(model, tokenizer, folder, state=None):
        save(model, tokenizer, folder, state)
        if "checkpoint-" not in str(folder):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "save_student", fill_up)
    with pytest.raises(OSError, match="No space left"):
        train(sft_train.main, base, rows["sft"], tmp_path / "run", "--max_steps", 1)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"checkpoints", "progress.jsonl", "run.json", "train_groups.txt"}
    assert run_json(tmp_path / "run")["state"] == "failed"


def test_a_loss_that_is_not_a_number_fails_the_run(base, rows, tmp_path):
    with pytest.raises(UserError, match=r"the loss became nan; lower --learning_rate"):
        train(sft_train.main, base, rows["sft"], tmp_path / "run", "--learning_rate", 1e30, "--epochs", 3)
    record = run_json(tmp_path / "run")
    assert record["state"] == "failed"
    assert "the loss became nan" in record["error"]
    assert not adapters.is_adapter(tmp_path / "run")


# What a run leaves behind.


def test_the_record_of_a_run(unbroken, rows, base):
    from common.data.rows import sha256_file

    folder = unbroken("sft")
    record = run_json(folder)
    assert record["state"] == "done"
    assert record["argv"][1:] == flags(base, rows["sft"], folder, *RESUMABLE)
    assert record["settings"]["lora_dropout"] == 0.2
    assert record["data"] == {"path": rows["sft"], "sha256": sha256_file(rows["sft"]), "rows": 24}
    assert (record["method"], record["base_model"], record["seed"]) == ("sft", base, 0)
    assert record["base_fingerprint"] == adapters.fingerprint(models.load_base(ModelSource(base)))
    assert record["versions"] == run_record.versions()
    assert record["versions"]["torch"] == torch.__version__
    assert record["effective_batch"] == 2
    assert record["steps"] == 36
    assert 0 < record["seconds"] < 600
    assert 50e6 < record["peak_memory_bytes"]["resident"] < 64e9
    assert record["trainable_parameters"] == sum(t.numel() for t in weights(folder).values())
    curve = losses(folder)
    assert len(curve) == 36
    assert record["final_loss"] == curve[-1]
    assert record["train_loss"] == pytest.approx(sum(curve) / 36, abs=1e-6)
    assert curve[-1] < 0.3 * curve[0]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "ref").exists()


def test_the_curve_reaches_the_last_step(base, rows, tmp_path):
    often, seldom = (
        train(sft_train.main, base, rows["sft"], tmp_path / str(n), "--max_steps", 5, "--logging_steps", n)
        for n in (1, 3)
    )
    every = losses(often)
    assert losses(seldom) == pytest.approx([sum(every[:3]) / 3, sum(every[3:]) / 2], abs=1e-6)
    assert run_json(seldom)["train_loss"] == pytest.approx(sum(every) / 5, abs=1e-6)


def test_trained_groups_and_those_of_the_starting_adapter(base, unbroken, tmp_path):
    assert run_record.read_groups(unbroken("sft")) == set(GROUPS)
    new = [{"prompt": "a", "chosen": "Good", "rejected": "Bad", "group": f"{i:016x}"} for i in (11, 500, 501)]
    data = write_rows(tmp_path / "dpo.jsonl", new)
    start = ("--init_adapter", unbroken("sft"), "--max_steps", 1)
    run = train(dpo_train.main, base, data, tmp_path / "run", *start)
    assert run_record.read_groups(run) == {*GROUPS, f"{500:016x}", f"{501:016x}"}


def test_unknown_training_rows_stay_unknown(base, unbroken, rows, tmp_path, capsys):
    """An adapter that does not say what it was trained on makes no clean record for what starts from it."""
    foreign = tmp_path / "foreign"
    shutil.copytree(unbroken("sft"), foreign)
    (foreign / run_record.GROUPS_FILE).unlink()
    run = train(sft_train.main, base, rows["sft"], tmp_path / "run", "--init_adapter", foreign, "--max_steps", 1)
    assert run_record.read_groups(run) is None
    assert "keeps no record" in capsys.readouterr().err


def test_a_finished_run_is_kept_unless_told_otherwise(base, rows, tmp_path):
    more = ("--max_steps", 1)
    run = train(sft_train.main, base, rows["sft"], tmp_path / "run", *more)
    stale = run / "calibration.json"
    stale.write_text("{}")
    with pytest.raises(UserError, match="holds a finished run; choose another --save_dir, or pass --overwrite"):
        train(sft_train.main, base, rows["sft"], run, *more)
    assert stale.exists()
    without_groups = write_rows(tmp_path / "rows.jsonl", [{"input": "a", "output": "Good"}])
    train(sft_train.main, base, without_groups, run, *more, "--overwrite")
    assert not stale.exists()
    assert run_record.read_groups(run) is None


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--epochs", "0"], "must be above 0"),
        (["--epochs", "nan"], "must be above 0"),
        (["--learning_rate", "-1"], "must be above 0"),
        (["--max_steps", "0"], "--max_steps above 0 or -1"),
        (["--max_steps", "-5"], "--max_steps above 0 or -1"),
        (["--lora_dropout", "1"], "is not in"),
        (["--lr_scheduler_type", "sine"], "invalid choice: 'sine'"),
        (["--report_to", "pigeon"], "--report_to pigeon: pigeon is not supported, only .*wandb"),
        (["--student", "runs/none"], "runs/none does not exist"),
        (["--init_adapter", "/none"], "--init_adapter /none holds no adapter; give a run folder"),
        (["--data", "/none.jsonl"], "/none.jsonl does not exist; check the path"),
        (["--eval_data", "/none.jsonl"], "/none.jsonl does not exist; check the path"),
    ],
)
def test_refused_before_training(more, sentence, base, rows, tmp_path):
    with pytest.raises(UserError, match=sentence):
        train(sft_train.main, base, rows["sft"], tmp_path / "run", *more)


def test_an_adapter_is_no_student(unbroken, rows, tmp_path):
    with pytest.raises(UserError, match="is an adapter; give its base, and this folder as --init_adapter"):
        train(sft_train.main, str(unbroken("sft")), rows["sft"], tmp_path / "run")


def test_eval_data_is_measured_and_changes_nothing(base, rows, uneven, tmp_path):
    # without dropout: a data loader draws from the generator that dropout draws from
    more = ("--max_steps", 6, "--per_device_train_batch_size", 8, "--lora_dropout", 0)
    plain = train(sft_train.main, base, rows["sft"], tmp_path / "plain", *more)
    judged = train(sft_train.main, base, rows["sft"], tmp_path / "judged", *more, "--eval_data", rows["sft"])
    assert distance(plain, judged) == 0
    model, tokenizer = models.load_for_inference(ModelSource(str(judged), dtype="float32"))
    pairs = [(p, LABELS[i % 3]) for i, p in enumerate(PROMPTS)]
    encoded = [tokenizers.encode_pair(tokenizer, *pair) for pair in pairs]
    with torch.no_grad():
        loss, _ = completions.completion_loss(model, completions.collate(encoded, tokenizer.pad_token_id))
    assert run_json(judged)["final_eval_loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_a_trained_model_stops(base, tmp_path):
    """Greedy decoding gives the answer and its end, as the first and last thing."""
    answer = "Good Bad Standard"
    data = write_rows(tmp_path / "rows.jsonl", [{"input": prompt, "output": answer} for prompt in PROMPTS[:8]])
    more = ("--max_steps", 40, "--per_device_train_batch_size", 8, "--lr_scheduler_type", "constant")
    run = train(sft_train.main, base, data, tmp_path / "run", *more)
    model, tokenizer = models.load_for_inference(ModelSource(str(run), dtype="float32"))
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    for prompt in PROMPTS[:3]:
        ids = torch.tensor([tokenizers.encode_prompt(tokenizer, prompt)])
        new = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(new) == answer + "<|im_end|>"


# DPO.


def log_prob(model, prompt: list[int], answer: list[int]) -> float:
    """The sum of an answer's token log-probabilities, by one plain forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1)[range(len(answer)), answer].sum().item()


@pytest.fixture
def dpo(base, rows, tmp_path):
    """`dpo(*flags)`: a DPOTrainer that has not trained yet, and the rows it works on."""

    def build(*more: object):
        argv = flags(base, rows["dpo"], tmp_path / "run", "--per_device_train_batch_size", 3, *more)
        args = cli.parse_args(dpo_train.build_parser(), argv)
        tokenizer = tokenizers.load_tokenizer(base)
        student = training.prepare_student(args, tokenizer)
        encoded = dpo_train.encode(tokenizer, rows["dpo"], dpo_train.read_pairs(rows["dpo"], False), args)
        return dpo_train.build_trainer(args, student, tokenizer, encoded, None), encoded

    return build


@pytest.mark.parametrize("start", ["base", "sft"])
def test_reference_log_probs(start, dpo, base, unbroken):
    reference = models.load_base(ModelSource(base, dtype="float32")).eval()
    more = ["--lora_dropout", 0.5]
    if start == "sft":
        more += ["--init_adapter", unbroken("sft")]
        reference = models.load_for_inference(ModelSource(str(unbroken("sft")), dtype="float32"))[0]
    trainer, encoded = dpo(*more)
    assert ("ref" in trainer.model.peft_config) == (start == "sft")
    for side in ("chosen", "rejected"):
        expected = [log_prob(reference, row["prompt_ids"], row[f"{side}_ids"]) for row in encoded]
        assert list(trainer.train_dataset[f"ref_{side}_logps"]) == pytest.approx(expected, abs=1e-4)


def test_dpo_of_all_weights(base, rows, tmp_path):
    """The reference log-probabilities come from the student as it was, before the first step."""
    run = train(dpo_train.main, base, rows["dpo"], tmp_path / "run", "--lora_r", 0, "--max_steps", 12,
                "--learning_rate", 0.001)  # fmt: skip
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(run)[-1] < 0.6
    assert not adapters.is_adapter(run)
    model, _ = models.load_for_inference(ModelSource(str(run)))
    assert model.config.use_cache


def test_the_reference_stays_and_the_policy_moves(dpo, unbroken):
    trainer, encoded = dpo("--init_adapter", unbroken("sft"), "--max_steps", 10, "--learning_rate", 0.003)
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


def gap(model, row: dict) -> float:
    chosen, rejected = (log_prob(model, row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected"))
    return chosen - rejected


@pytest.mark.parametrize("kind", ["dpo", "dpo from sft"])
def test_dpo_starts_at_ln_2(kind, unbroken, base, rows, tmp_path):
    one = train(*unbroken.task(kind), tmp_path / "run", *unbroken.settings(kind), "--max_steps", 1,
                "--lora_dropout", 0)  # fmt: skip
    assert losses(one)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_dpo_learns_and_keeps_no_reference_folder(unbroken):
    for kind in ("dpo", "dpo from sft"):
        folder = unbroken(kind)
        assert losses(folder)[-1] < 0.6
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
        dpo_train.read_pairs(data, False)
    assert len(dpo_train.read_pairs(data, True)) == 3
    assert "rows.jsonl, line 4: the chosen and the rejected answer are the same; skipped" in capsys.readouterr().err
    same = write_rows(tmp_path / "same.jsonl", [good, good | {"rejected": "Good"}])
    with pytest.raises(UserError, match=r"same.jsonl, line 2: the chosen and the rejected answer are the same"):
        train(dpo_train.main, base, same, tmp_path / "run")


def test_both_answers_of_a_cut_row_follow_the_same_prompt(tokenizer, base, tmp_path):
    long = {"prompt": "1 " * 60, "chosen": "Good", "rejected": "9" * 20}
    rows = [long, {"prompt": "5", "chosen": "a", "rejected": "b"}]
    args = cli.parse_args(dpo_train.build_parser(), flags(base, "x", tmp_path, "--max_len", 80))
    cut, whole = dpo_train.encode(tokenizer, "x", rows, args)
    assert len(cut["prompt_ids"]) + len(cut["rejected_ids"]) <= 80
    assert tokenizer.decode(cut["chosen_ids"]) == "Good<|im_end|>"
    assert tokenizer.decode(cut["rejected_ids"]) == "9" * 20 + "<|im_end|>"
    assert tokenizer.decode(cut["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert whole["prompt_ids"] == tokenizers.encode_prompt(tokenizer, "5")
    args.max_len = 10
    with pytest.raises(UserError, match="no row fits --max_len 10"):
        dpo_train.encode(tokenizer, "x", rows, args)


# 4-bit on a CPU.


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory, tokenizer, rows) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("four_bit")
    base = build_base(folder / "base", tokenizer, embeddings=0.3, hidden=64)
    more = ("--load_in_4bit", "on", "--max_steps", 12, "--per_device_train_batch_size", 8, "--lora_dropout", 0)
    return base, train(sft_train.main, base, rows["sft"], folder / "run", *more)


def test_4bit_training_learns(four_bit):
    _, run = four_bit
    curve = losses(run)
    assert all(map(math.isfinite, curve))
    assert curve[-1] < curve[0] - 1
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())
    assert run_json(run)["settings"]["load_in_4bit"] == "on"


def test_a_4bit_adapter_loads_in_either_precision(four_bit):
    base, run = four_bit
    mean = {}
    for switch in ("on", "off"):
        for folder in (base, str(run)):
            model, tokenizer = models.load_for_inference(ModelSource(folder, load_in_4bit=switch, dtype="auto"))
            four = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
            assert bool(four) == (switch == "on")
            assert not any(getattr(m, "base_layer", m).support_avx512bf16_for_cpu for m in four)
            encoded = [tokenizers.encode_pair(tokenizer, p, LABELS[i % 3]) for i, p in enumerate(PROMPTS)]
            with torch.no_grad():
                loss, _ = completions.completion_loss(model, completions.collate(encoded, tokenizer.pad_token_id))
            mean[switch, folder] = loss.item()
    for switch in ("on", "off"):
        assert mean[switch, str(run)] < mean[switch, base] - 1
    assert mean["on", str(run)] == pytest.approx(mean["off", str(run)], abs=0.2)


def test_4bit_layers_stay_as_loaded(four_bit):
    model = models.load_base(ModelSource(four_bit[0], load_in_4bit="on"), training=True)
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    before = [layer.weight.detach().clone() for layer in layers]
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(12)[None])
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))


def test_evaluating_between_4bit_epochs_changes_nothing(four_bit, rows, tmp_path):
    _, run = four_bit
    argv = run_json(run)["argv"][1:]
    argv[argv.index(str(run))] = str(tmp_path / "judged")
    sft_train.main([*argv, "--eval_data", rows["sft"]])
    assert distance(tmp_path / "judged", run) == 0


def test_4bit_dpo(four_bit, rows, tmp_path):
    run = train(dpo_train.main, four_bit[0], rows["dpo"], tmp_path / "run", "--load_in_4bit", "on", "--max_steps", 6,
                "--per_device_train_batch_size", 8)  # fmt: skip
    curve = losses(run)
    assert curve[0] == pytest.approx(math.log(2), abs=1e-3)
    assert curve[-1] < 0.6


# Two processes.


TOGETHER = ("--max_steps", 6, "--lora_dropout", 0, "--seed", 1)


def equal(two: Path, one: Path) -> None:
    assert distance(two, one) < 1e-5
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert run_json(two)["effective_batch"] == run_json(one)["effective_batch"] == 2
    assert run_json(two)["state"] == "done"


def test_torchrun_equals_one_process(base, uneven, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "sft_train.py"]
    argv = flags(base, uneven, two, *TOGETHER, "--per_device_train_batch_size", 1)
    with open(tmp_path / "log", "w") as log:
        child = subprocess.Popen([sys.executable, *launcher, *argv], stdout=log, stderr=log, cwd=ROOT)
        train(sft_train.main, base, uneven, one, *TOGETHER, "--per_device_train_batch_size", 2)
        assert child.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-3000:]
    equal(two, one)


@pytest.mark.parametrize("kind", ["kd", "dpo", "dpo from sft"])
def test_two_processes_equal_one(kind, unbroken, spawn, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    task = unbroken.task(kind)
    start = unbroken.settings(kind)[len(RESUMABLE) :]
    children = spawn.ranks(
        task[0], flags(*task[1:], two, *TOGETHER, *start, "--per_device_train_batch_size", 1), tmp_path
    )
    train(*task, one, *TOGETHER, *start, "--per_device_train_batch_size", 2)
    join(children, tmp_path)
    equal(two, one)


def test_two_processes_stop_together(base, rows, spawn, tmp_path):
    """Signals may reach one process only, or twice (from the terminal and from torchrun)."""
    save_dir = tmp_path / "run"
    more = ("--epochs", 100, "--per_device_train_batch_size", 1, "--save_steps", 10)
    children = spawn.ranks(sft_train.main, flags(base, rows["sft"], save_dir, *more), tmp_path)
    wait_for(lambda: checkpoint(save_dir, 10) or not children[0].is_alive())
    os.kill(children[0].pid, signal.SIGINT)
    wait_for(lambda: "stopping after this step" in (tmp_path / "rank0.log").read_text())
    os.kill(children[0].pid, signal.SIGINT)
    for rank, child in enumerate(children):
        child.join(60)
        assert child.exitcode == cli.INTERRUPTED, (tmp_path / f"rank{rank}.log").read_text()[-3000:]
    assert run_json(save_dir)["error"] == "interrupted"
    newest = max(int(path.name[11:]) for path in (save_dir / "checkpoints").glob("checkpoint-*"))
    assert 10 < newest < 1200
    assert training.newest_checkpoint(str(save_dir)).endswith(f"checkpoint-{newest}")


# Memory.


@pytest.fixture
def milder(monkeypatch) -> None:
    """A batch of two would help (a miniature is too small for that to be true)."""
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    monkeypatch.setattr(vram, "advise", lambda plan, args, free: changes)


def test_what_does_not_fit_is_said_before_anything_loads(base, rows, tmp_path, milder, monkeypatch):
    monkeypatch.setattr(vram, "free_bytes", lambda: 1000)
    with (
        monkeypatch.context() as before,
        pytest.raises(UserError, match=r"0.0 are free; --per_device_train_batch_size 2"),
    ):
        before.setattr(models, "load_base", lambda *args, **kwargs: pytest.fail("loaded"))
        train(sft_train.main, base, rows["sft"], tmp_path / "run")
    run = train(sft_train.main, base, rows["sft"], tmp_path / "run", "--max_steps", 1, "--auto_fit")
    assert run_json(run)["auto_fit"]["per_device_train_batch_size"] == 2
    assert run_json(run)["effective_batch"] == 4


@pytest.mark.parametrize("auto_fit", [True, False])
def test_out_of_memory_all_the_same(auto_fit, base, rows, tmp_path, milder, monkeypatch):
    """With --auto_fit it goes on from the checkpoint under milder settings, once; without, they are named."""
    from transformers import Trainer

    step, seen, restarts = Trainer.training_step, [], []

    def exhausted(*args, **kwargs):
        seen.append(0)
        if len(seen) == 4:
            raise torch.OutOfMemoryError
        return step(*args, **kwargs)

    def restart(program, argv):
        restarts.append(argv)
        raise SystemExit

    monkeypatch.setattr(Trainer, "training_step", exhausted)
    monkeypatch.setattr(os, "execv", restart)
    monkeypatch.delenv(training.STEPPED_DOWN, raising=False)
    more = ["--per_device_train_batch_size", 4, "--save_steps", 2, *(["--auto_fit"] if auto_fit else [])]
    with pytest.raises(SystemExit if auto_fit else UserError, match="" if auto_fit else "ran out of memory; try --per"):
        train(sft_train.main, base, rows["sft"], tmp_path / "run", *more)
    assert len(restarts) == auto_fit
    assert (training.STEPPED_DOWN in os.environ) == auto_fit
    if auto_fit:
        assert restarts[0][-1] == "--resume"
        args = cli.parse_args(sft_train.build_parser(), restarts[0][2:])
        assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 2)
        seen.clear()
        with pytest.raises(UserError, match="ran out of memory; try"):
            sft_train.main(restarts[0][2:])
        monkeypatch.delenv(training.STEPPED_DOWN)
