"""codegen_prepare.py: from problems to the rows that train and judge, and the demo's base."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from support.code_problems import HELD_OUT, TRAIN, problem, right
from support.inputs import read_rows, write_rows

import codegen_prepare
import tiny_student
from common import cli
from common.sandbox import grading
from common.tasks.codegen import answer, prompt
from common.tasks.codegen import rows as code_rows
from common.training import miniature

pytestmark = pytest.mark.processes


def test_prepared_rows(prepared):
    good = [number for number in TRAIN if number != TRAIN[1]]
    sft, kd, dpo, val = (read_rows(prepared / f"one/codegen_{what}.jsonl") for what in ("sft", "kd", "dpo", "val"))
    expected = [
        pair
        for number in good
        for pair in prompt.training_pairs(problem(number)["prompt"], [f"Return n + {number}."], right(number))
    ]
    assert sorted((row["input"], row["output"]) for row in sft) == sorted(expected)
    assert [(row["input"], row["teacher_output"]) for row in kd] == [(row["input"], row["output"]) for row in sft]
    assert {row["group"] for row in sft} == {problem(number)["group"] for number in good}
    assert [row["task_id"] for row in val] == list(map(str, HELD_OUT))
    assert not {row["group"] for row in val} & {row["group"] for row in sft + kd + dpo}
    assert code_rows.read(prepared / "one/codegen_val.jsonl")[0].solution == right(HELD_OUT[0])
    assert len(dpo) == 2 * len(good)
    for row in dpo:
        number = next(n for n in good if problem(n)["group"] == row["group"])
        rejected = answer.code_of(row["rejected"])
        assert answer.code_of(row["chosen"]) == right(number) and answer.compile_error(rejected) is None
        assert row["prompt"] in [prompt for prompt, _ in expected] and prompt.PLAN_REQUEST not in row["prompt"]
    tests = {problem(number)["group"]: grading.Tests(tuple(problem(number)["tests"])) for number in good}
    verdicts = grading.grade_many([(answer.code_of(row["rejected"]), tests[row["group"]]) for row in dpo])
    assert not any(verdict.passed for verdict in verdicts)


def test_prepare_reports_what_it_left_out(prepared):
    manifest = json.loads((prepared / "one/codegen_manifest.json").read_text())
    (left_out,) = manifest["left_out"]
    assert (left_out["task_id"], left_out["error"]) == (str(TRAIN[1]), "assertion")
    assert manifest["problems"] == 8 and manifest["parts"]["train"] == {"groups": 3, "problems": 3}
    assert manifest["files"]["codegen_sft.jsonl"]["rows"] == 9
    for file in (prepared / "one").iterdir():
        assert file.read_bytes() == (prepared / "two" / file.name).read_bytes()


def test_prepare_refuses(tmp_path, capsys):
    def said(*argv: str) -> str:
        assert cli.run(codegen_prepare.main, argv) == cli.BAD_INPUT
        return capsys.readouterr().err.splitlines()[-1]

    bad = write_rows(tmp_path / "bad.jsonl", [problem(1) | {"solution": "def plus1(n):\n    return n"}])
    assert said("--src", bad, "--outdir", str(tmp_path)).startswith("error: none of the 1 solutions passes")
    few = write_rows(tmp_path / "few.jsonl", [problem(TRAIN[0])])
    assert "has no problem for the validation part (1 in all)" in said("--src", few, "--outdir", str(tmp_path))
    own = write_rows(tmp_path / "codegen_val.jsonl", [problem(1)])
    assert "would be overwritten" in said("--src", own, "--outdir", str(tmp_path))
    assert said("--outdir", str(tmp_path)).startswith("error: one of the arguments --src --synthesize is required")


def test_synthesized_problems_become_rows(tmp_path):
    codegen_prepare.main(["--synthesize", "12", "--seed", "4", "--outdir", str(tmp_path)])
    manifest = json.loads((tmp_path / "codegen_manifest.json").read_text())
    parts = {part: told["problems"] for part, told in manifest["parts"].items()}
    assert manifest["synthetic"] and sum(parts.values()) == 12
    assert len(read_rows(tmp_path / "codegen_sft.jsonl")) == 3 * parts["train"]
    assert len(read_rows(tmp_path / "codegen_dpo.jsonl")) == 2 * parts["train"]
    assert len(read_rows(tmp_path / "codegen_train.jsonl")) == parts["train"]


def test_texts_are_told_by_their_keywords():
    """Names, numbers and quoted words are exchanged alike in both; what is common to the texts is no keyword."""
    texts = [f"def name{i:04}(n):\n    return '{i % 7}' * n + {i % 30}" for i in range(600)]
    pairs = list(miniature.keyword_prompts(texts, random.Random(0)))
    assert pairs == list(miniature.keyword_prompts(texts, random.Random(0)))
    assert [text for _, text in pairs] != texts
    for keywords, text in pairs:
        name, quoted, number = re.fullmatch(r"def (\w+)\(n\):\n    return ('\d') \* n \+ (\d+)", text).groups()
        assert keywords == f"{miniature.KEYWORDS}{name} {quoted} {number}"


def test_the_coder_base_reads_prompts_and_answers_apart(tmp_path, prepared):
    data = str(prepared / "one/codegen_sft.jsonl")
    base = tmp_path / "coder"
    argv = ["--prompts", data, "--texts", data, "--save_dir", str(base), "--steps", "1", "--rows_per_step", "2"]
    tiny_student.main(argv)
    facts = json.loads((base / "base.json").read_text())
    assert facts["texts"] == facts["prompts"] != []
    source = miniature.SelfSupervision([row["input"] for row in read_rows(Path(data))], 0, ["x = 1", "y = 2"])
    assert all(source.answer(row["input"]) != row["output"] for row in read_rows(Path(data)))
    assert {source.answer(prompt) for prompt in source.texts} <= {"x = 1", "x = 2", "y = 1", "y = 2"}
