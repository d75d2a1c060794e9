"""What --dry_run shows: rows under the model's template with what is learnt of them, and what a training would take."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from support.inputs import LABELS, PROMPTS, write_rows
from support.models import run_json

import distill_train
import dpo_train
import kd_train
import sft_train
from common import cli
from common.models import loading
from common.training import preview
from common.vram import preflight

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Age: 23?"},
        {"role": "assistant", "content": "Good"},
        {"role": "user", "content": "And 24?"},
        {"role": "assistant", "content": "Bad"},
    ]
}
MARKED = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAge: 23?<|im_end|>\n<|im_start|>assistant\n"
    "[+Good<|im_end|>+]\n<|im_start|>user\nAnd 24?<|im_end|>\n<|im_start|>assistant\n[+Bad<|im_end|>+]"
)
PAIR = {"prompt": "Age: 23?", "chosen": "Good", "rejected": "Bad"}


@pytest.fixture
def dry(monkeypatch, capsys):
    """`dry(main, *flags)`: (exit code, what was printed) of a command that may load no weights."""

    def no_weights(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_base", no_weights)

    def run(main, *flags: object) -> tuple[int, str]:
        code = cli.run(main, [*map(str, flags), "--dry_run"])
        return code, capsys.readouterr().out

    return run


def test_a_chat_is_shown_as_the_model_will_see_it(dry, tiny_base, tmp_path):
    data, run = write_rows(tmp_path / "a.jsonl", [CHAT] * 5), tmp_path / "run"
    code, out = dry(sft_train.main, "--student", tiny_base, "--data", data, "--save_dir", run)
    assert code == cli.DONE
    assert out.startswith(f"{data}: 5 training rows, chats (messages)\n")
    assert out.count(MARKED) == 3  # the first rows
    tokens, learnt = map(int, re.search(r"row 1: (\d+) tokens, (\d+) learnt", out).groups())
    assert f"median {tokens}, p95 {tokens}, max {tokens}\n" in out
    assert f"median {learnt}, p95 {learnt}, max {learnt}; {5 * learnt} in all" in out
    assert "every row fits" in out and "GB predicted at the peak" in out
    assert "16 x 1 accumulated = 16 rows a step" in out and re.search(r"optimizer steps +3 \(1 an epoch\)", out)
    assert "time                   not known: " in out
    assert not run.exists()


def test_without_a_base_rows_are_shown_as_they_are(dry, tmp_path):
    code, out = dry(kd_train.main, "--data", write_rows(tmp_path / "a.jsonl", [CHAT]))
    assert code == cli.DONE
    assert "assistant: [+Good+]\nuser: And 24?\nassistant: [+Bad+]" in out
    assert "Give --student for token counts" in out


def test_of_a_preference_both_answers_are_shown(dry, tiny_base, tmp_path):
    data = write_rows(tmp_path / "a.jsonl", [PAIR] * 2)
    code, out = dry(dpo_train.main, "--student", tiny_base, "--data", data, "--eval_data", data)
    assert code == cli.DONE
    assert out.count("<|im_start|>assistant\n[+Good<|im_end|>+]") == out.count("[-Bad<|im_end|>-]") == 4
    assert "2 held out, preferences" in out and "[-rejected-]" in out
    assert "assistant: [-Bad-]" in dry(dpo_train.main, "--data", data)[1]


def test_bad_rows_are_listed_and_stop(dry, tmp_path):
    data = write_rows(tmp_path / "a.jsonl", [CHAT | {"tools": [1]}, {"messages": []}, CHAT])
    code, out = dry(sft_train.main, "--data", data)
    assert code == cli.BAD_INPUT
    assert "2 training rows" in out and "keys that are not read: 'tools' (1 of 2 rows)" in out
    assert "bad rows: 1;" in out and "line 2: 'messages' must be a list of turns" in out
    assert dry(sft_train.main, "--data", data, "--skip_bad_rows")[0] == cli.DONE
    assert dry(dpo_train.main, "--data", data) == (cli.BAD_INPUT, "")  # refused, as in a training


def test_what_does_not_fit_is_counted(dry, tiny_base, tmp_path):
    rows = [{"input": "word " * n, "output": "Good"} for n in (1, 300, 2)] + [{"input": "x", "output": "9 " * 200}]
    data = write_rows(tmp_path / "a.jsonl", rows)
    flags = ("--student", tiny_base, "--data", data, "--max_len", 100)
    out = dry(sft_train.main, *flags)[1]
    assert "--max_len 100          1 cut (rows 2), 1 left out (rows 4)" in out
    assert out.count("--- row") == 3
    assert "2 left out (rows 2, 4)" in dry(sft_train.main, *flags, "--idp_mode")[1]


def test_memory_that_is_not_there(dry, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "free_bytes", lambda: int(0.62e9))
    data = write_rows(tmp_path / "a.jsonl", [CHAT] * 300)
    out = dry(sft_train.main, "--student", tiny_base, "--data", data, "--per_device_train_batch_size", 4096)[1]
    assert re.search(r"predicted at the peak, 0.62 GB free; it would fit with --|no settings need less", out)


def test_distillation(dry, tiny_base, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("Age: 23, Occupation: Lawyer. " * 40)
    out = dry(distill_train.main, "--student", tiny_base, "--data", text, "--ce", 1, "--max_len", 64)[1]
    assert "[+ge: 23" in out or "[+" in out
    chats = write_rows(tmp_path / "a.jsonl", [CHAT])
    assert MARKED in dry(distill_train.main, "--student", tiny_base, "--data", chats, "--teacher", tiny_base)[1]
    asked = write_rows(tmp_path / "b.jsonl", [{"input": PROMPTS[0]}])
    flags = ("--student", tiny_base, "--data", asked, "--teacher", tiny_base, "--on_policy")
    code, out = dry(distill_train.main, *flags)
    assert code == cli.DONE and "0 learnt" in out and "tokens a row" in out
    (tmp_path / "dataset").mkdir()
    write_rows(tmp_path / "dataset" / "train.jsonl", [{"prompt": PROMPTS[0]}])
    flags = ("--student", tiny_base, "--dataset", tmp_path / "dataset", "--teacher", tiny_base, "--on_policy")
    assert dry(distill_train.main, *flags)[0] == cli.DONE
    labelled = {"input": PROMPTS[0], "probabilities": {"Good": 0.2, "Standard": 0.7, "Bad": 0.1}}
    path = write_rows(tmp_path / "c.jsonl", [labelled])
    assert "[+Standard<|im_end|>+]" in dry(distill_train.main, "--student", tiny_base, "--data", path, "--labels")[1]


@pytest.mark.processes
@pytest.mark.parametrize("size", [(), ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2)])
def test_steps_are_those_of_a_run_and_time_rests_on_it(size, base, tmp_path, capsys):
    rows = [{"input": prompt, "output": LABELS[i % 3]} for i, prompt in enumerate(PROMPTS)]
    data = write_rows(tmp_path / "a.jsonl", rows)
    flags = ("--epochs", 1.5, *size)
    argv = ["--student", base, "--data", data, "--save_dir", str(tmp_path / "next"), *map(str, flags)]
    sft_train.main([*argv, "--dry_run"])
    before = capsys.readouterr().out
    sft_train.main([*argv[: -len(flags)], *map(str, flags), "--save_dir", str(tmp_path / "done")])
    facts = run_json(tmp_path / "done")
    assert f"= {facts['effective_batch']} rows a step" in before
    assert re.search(rf"optimizer steps +{facts['steps']} \(", before)
    capsys.readouterr()
    sft_train.main([*argv, "--dry_run"])
    assert re.search(r"time +about \d+ s, at the [\d,]+ tokens a second of .*done \(", capsys.readouterr().out)


def test_colours_are_for_terminals(monkeypatch):
    runs = [(preview.READ, "a"), (preview.LEARNT, "b")]
    assert preview.painted(runs, colours=True) == "\x1b[2ma\x1b[0m\x1b[1;32mb\x1b[0m"
    assert preview.painted(runs, colours=False) == "a[+b+]"
    assert not preview.in_colour()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert preview.in_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not preview.in_colour()


def test_a_text_can_neither_paint_nor_flood(capsys):
    assert preview.painted([(preview.READ, "a\x1b[31m\tb\nc")], colours=False) == "a\\x1b[31m\\tb\nc"
    long = preview.painted([(preview.READ, "x" * 5000)], colours=False)
    assert " ... 3,800 characters ... " in long and len(long) < 1300


@pytest.mark.parametrize("main", [sft_train.main, kd_train.main, dpo_train.main])
def test_a_training_needs_a_base_and_a_folder(main, tmp_path, capsys):
    assert cli.run(main, ["--data", write_rows(tmp_path / "a.jsonl", [PAIR])]) == cli.BAD_INPUT
    assert "required: --student" in capsys.readouterr().err


def test_a_broken_run_beside_is_passed_over(dry, tiny_base, tmp_path):
    for name, text in (("a", "{"), ("b", json.dumps({"state": "done"})), ("c", "[]")):
        folder = Path(tmp_path, name)
        folder.mkdir()
        (folder / "run.json").write_text(text)
    data = write_rows(tmp_path / "rows.jsonl", [CHAT])
    assert "not known" in dry(sft_train.main, "--student", tiny_base, "--data", data, "--save_dir", tmp_path / "d")[1]
