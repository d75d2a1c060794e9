"""What a run leaves behind, and what is refused before it starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.inputs import GROUPS, LABELS, PROMPTS, write_rows
from support.models import distance, run_json, weights
from support.training import RESUMABLE, flags, loss_curve, train

import dpo_train
import sft_train
import tiny_student
from common import run_record
from common.cli import UserError
from common.models import adapters, chats, tokenizers
from common.models import loading as models
from common.models.source import ModelSource
from common.training import batches, checkpoints, losses

pytestmark = pytest.mark.processes


def test_the_record_of_a_run(unbroken, rows, base):
    from common.files import sha256_file

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
    curve = loss_curve(folder)
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
    every = loss_curve(often)
    assert loss_curve(seldom) == pytest.approx([sum(every[:3]) / 3, sum(every[3:]) / 2], abs=1e-6)
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


def test_a_tokenizer_of_two_templates_is_put_in_place_again(base, tmp_path):
    """Which it saves in a folder."""
    model, tokenizer = models.load_base(ModelSource(base)), tokenizers.load_tokenizer(base)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    for _ in range(2):
        checkpoints.put_student(model, tokenizer, tmp_path)
    assert [file.name for file in (tmp_path / "additional_chat_templates").iterdir()] == ["tool_use.jinja"]


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


@pytest.mark.parametrize("flag", ["--student", "--init_adapter", "--data"])
def test_what_a_run_is_made_of_is_not_replaced(flag, base, unbroken, rows, tmp_path):
    run = tmp_path / "run"
    if flag == "--data":
        own = run / "rounds" / "01" / "rows.jsonl"
        own.parent.mkdir(parents=True)
        shutil.copy(rows["sft"], own)
    else:
        own = Path(shutil.copytree(base if flag == "--student" else unbroken("sft"), run))
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError, match=f"--save_dir {run} would replace {flag} {own}; choose another folder"):
        train(sft_train.main, base, rows["sft"], run, flag, own, "--overwrite")
    assert sorted(run.rglob("*")) == before


def test_a_base_is_made_anew_in_the_place_of_one_alone(tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match=r"runs holds no base\.json, so it is no base of this script; choose another"):
        tiny_student.main(["--save_dir", str(tmp_path / "runs")])
    assert (tmp_path / "runs" / "mine").is_dir()


def test_an_adapter_is_no_student(unbroken, rows, tmp_path):
    with pytest.raises(UserError, match="is an adapter; give its base, and this folder as --init_adapter"):
        train(sft_train.main, str(unbroken("sft")), rows["sft"], tmp_path / "run")


def test_eval_data_is_measured_and_changes_nothing(base, rows, uneven, tmp_path):
    more = ("--max_steps", 6, "--per_device_train_batch_size", 8)  # with dropout, and a loader that draws, too
    plain = train(sft_train.main, base, rows["sft"], tmp_path / "plain", *more)
    judged = train(sft_train.main, base, rows["sft"], tmp_path / "judged", *more, "--eval_data", rows["sft"])
    assert distance(plain, judged) == 0
    model, tokenizer = models.load_for_inference(ModelSource(str(judged), dtype="float32"))
    pairs = [(p, LABELS[i % 3]) for i, p in enumerate(PROMPTS)]
    encoded = [chats.encode(tokenizer, *pair) for pair in pairs]
    with torch.no_grad():
        loss, _ = losses.completion_loss(model, batches.collate(encoded, tokenizer.pad_token_id))
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
