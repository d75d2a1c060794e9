"""Trainers on files of the shapes that people have: the same adapter from the same rows, whatever they look like."""

from __future__ import annotations

import json

import pytest
from support.inputs import LABELS, PROMPTS, write_rows
from support.models import distance, run_json
from support.training import train

import distill_train
import dpo_train
import kd_train
import sft_train
from common import cli

SHORT = ("--max_steps", 2, "--per_device_train_batch_size", 4)
FACTS = [(prompt, LABELS[i % 3]) for i, prompt in enumerate(PROMPTS[:8])]


def turn(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def chat(prompt: str, answer: str) -> dict:
    return {"messages": [turn("user", prompt), turn("assistant", answer)]}


OF_ONE = {
    "chats": [chat(prompt, answer) for prompt, answer in FACTS],
    "sharegpt": [{"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": a}]} for p, a in FACTS],
    "alpaca": [{"instruction": p.partition("\n\n")[0], "input": p.partition("\n\n")[2], "output": a} for p, a in FACTS],
    "trl": [{"prompt": prompt, "completion": answer} for prompt, answer in FACTS],
}


@pytest.mark.processes
def test_every_shape_trains_the_same_adapter(base, tmp_path):
    plain = write_rows(tmp_path / "plain.jsonl", [{"input": prompt, "output": answer} for prompt, answer in FACTS])
    one = train(sft_train.main, base, plain, tmp_path / "one", *SHORT)
    for name, rows in OF_ONE.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(rows))
        assert distance(one, train(sft_train.main, base, str(path), tmp_path / name, *SHORT)) == 0
    teacher = write_rows(tmp_path / "kd.jsonl", [{"input": p, "teacher_output": a, "output": "x"} for p, a in FACTS])
    for number, path in enumerate((teacher, plain, str(tmp_path / "chats.json"))):
        assert distance(one, train(kd_train.main, base, path, tmp_path / f"kd{number}", *SHORT)) == 0


@pytest.mark.processes
def test_every_preference_trains_the_same_adapter(base, tmp_path):
    rows = [{"prompt": prompt, "chosen": answer, "rejected": "no"} for prompt, answer in FACTS]
    one = train(dpo_train.main, base, write_rows(tmp_path / "a.jsonl", rows), tmp_path / "one", *SHORT)
    openai = [
        {
            "input": {"messages": [turn("user", prompt)]},
            "preferred_output": [turn("assistant", answer)],
            "non_preferred_output": [turn("assistant", "no")],
        }
        for prompt, answer in FACTS
    ]
    other = train(dpo_train.main, base, write_rows(tmp_path / "b.jsonl", openai), tmp_path / "other", *SHORT)
    assert distance(one, other) == 0


@pytest.mark.processes
@pytest.mark.parametrize("way", ["plain", "teacher", "cache", "on policy"])
def test_chats_are_distilled(way, base, tmp_path, capsys):
    rows = [{"messages": [turn("system", "Be brief."), *chat(*one)["messages"], *chat(*two)["messages"]]}
            for one, two in zip(FACTS[::2], FACTS[1::2], strict=True)]  # fmt: skip
    how = {
        "plain": ("--ce", 1),
        "teacher": ("--teacher", base),
        "cache": ("--teacher", base, "--teacher_cache", tmp_path / "cache"),
        "on policy": ("--teacher", base, "--on_policy", "--rounds", 1, "--max_new_tokens", 4),
    }[way]
    run = train(distill_train.main, base, write_rows(tmp_path / "a.jsonl", rows), tmp_path / "run", *SHORT, *how)
    assert run_json(run)["state"] == "done"


@pytest.mark.processes
def test_several_answers_are_learnt(base, tmp_path):
    """A chat of two answers has the loss of both; with the weight 0 on the first, that of the second."""
    (first, label), (second, other) = FACTS[:2]
    messages = [*chat(first, label)["messages"], *chat(second, other)["messages"]]
    losses = []
    for name, weight in (("both", 1), ("last", 0)):
        weighed = [message | {"weight": weight} if number == 1 else message for number, message in enumerate(messages)]
        path = write_rows(tmp_path / f"{name}.jsonl", [{"messages": weighed}] * 4)
        losses.append(run_json(train(sft_train.main, base, path, tmp_path / name, *SHORT))["train_loss"])
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("main", "row", "sentence"),
    [
        (sft_train.main, {"prompt": "a", "chosen": "b", "rejected": "c"}, "train them with dpo_train.py"),
        (kd_train.main, {"prompt": "a", "chosen": "b", "rejected": "c"}, "train them with dpo_train.py"),
        (dpo_train.main, {"messages": []} | chat("a", "b"), "train them with sft_train.py"),
        (sft_train.main, {"input": "a", "teacher_output": "b"}, "train them with kd_train.py"),
    ],
)
def test_a_file_for_another_trainer_is_refused(main, row, sentence, tiny_base, tmp_path, capsys):
    argv = [
        "--student",
        tiny_base,
        "--data",
        write_rows(tmp_path / "a.jsonl", [row]),
        "--save_dir",
        str(tmp_path / "r"),
    ]
    assert cli.run(main, argv) == cli.BAD_INPUT
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
