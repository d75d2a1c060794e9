"""The evaluator from its rows to its report."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.inputs import GROUPS, LABELS, PROMPTS, write_rows, write_squad

import eval_creditmix
import eval_distill
from common.cli import UserError
from common.comparison import measure, perplexity
from common.comparison import report as report_module
from common.comparison.rows import RowSelection
from common.data import rows as records
from common.models import chats, tokenizers
from common.models import loading as models
from common.models.source import ModelSource

pytestmark = pytest.mark.processes


@pytest.fixture
def here(monkeypatch):
    """Models are measured in this process."""
    monkeypatch.setattr(measure, "measure_in_own_process", measure.measure)


@pytest.fixture
def evaluate(capsys, folders):
    """`evaluate(flag, ...)`: the last line of stdout as JSON."""

    def run(*argv: str) -> dict:
        capsys.readouterr()
        given = [word for role, folder in folders.items() if f"--{role}" not in argv for word in (f"--{role}", folder)]
        assert eval_distill.main([*given, "--speed_rows", "2", *argv]) is None
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def entries(result: dict) -> dict[str, dict]:
    return {model["name"]: model for model in result["models"]}


def test_squad_from_file_to_report(evaluate, folders, here, tmp_path):
    data = write_squad(tmp_path / "squad.json", articles=30, question="Is <b>x</b> & y one?")
    report = tmp_path / "report"
    result = evaluate("--data", data, "--sample", "12", "--max_new_tokens", "4", "--report_dir", str(report))
    assert (result["evaluator"], result["version"], result["n"], result["group_name"]) == (
        "distill",
        1,
        12,
        "Wikipedia article",
    )
    assert result["contamination"] == {"rows": 0, "of": 12}
    models_ = entries(result)
    assert list(models_) == ["teacher", "base", "student"]
    for role, model in models_.items():
        own, _ = models.load_for_inference(ModelSource(folders[role]))
        assert model["parameters"] == sum(p.numel() for p in own.parameters())
        assert model["disk_bytes"] == {"adapter": 0, "base": os.path.getsize(Path(folders[role], "model.safetensors"))}
        assert model["model_dir"] == folders[role] and model["speed_rows"] == 2
        assert 0 < model["latency_s"]["p50"] <= model["latency_s"]["p95"]
    assert {file.name for file in report.iterdir()} == {
        *("results.txt", "metrics.json", "report.html", "trade_off.png", "relative_costs.png", "quality.png"),
        "answers.jsonl",
    }
    stored = json.loads((report / "metrics.json").read_text())
    assert {key: stored[key] for key in result} == result
    table = (report / "results.txt").read_text()
    assert table.startswith(report_module.format_tables(stored)) and table.count("--- drawn blindly") == 5
    page = (report / "report.html").read_text()
    assert "<b>x</b>" not in page and "Answers side by side" in page
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in report.glob("*.png"))


def test_a_label_task_gets_the_figures_of_eval_creditmix(evaluate, folders, here, tmp_path, capsys):
    task = tmp_path / "credit.yaml"
    task.write_text("labels: [Good, Standard, Bad]\ninstruction: Which credit mix?\ngroup_key: customer\n")
    rng = random.Random(0)
    data = write_rows(
        tmp_path / "rows.jsonl",
        [
            {"text": f"{rng.choice(PROMPTS)} {n}", "label": LABELS[n % 3], "customer": str(n // 2)}
            for n in range(240)
        ],
    )  # fmt: skip
    result = evaluate("--task", str(task), "--data", data)
    capsys.readouterr()
    eval_creditmix.main(
        ["--model_dir", folders["teacher"], folders["student"], "--task", str(task), "--data", data, "--seed", "0"]
    )
    other = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["n"], result["task"], result["group_name"]) == (other["n"], "credit", "customer")
    for role, model in zip(("teacher", "student"), other["models"], strict=True):
        for key in ("accuracy", "macro_f1", "groups", "contamination"):
            assert entries(result)[role][key] == model[key]
    difference = entries(result)["student"]["difference"]
    assert difference["macro_f1"] == other["differences"][0]["macro_f1"]


def test_rows_get_perplexity_and_exact_match(evaluate, folders, here, rows):
    result = evaluate("--data", rows["sft"], "--split", "all", "--max_new_tokens", "3")
    model, tokenizer = models.load_for_inference(ModelSource(folders["teacher"]))
    pairs = [(row["input"], row["output"]) for _, row in records.iter_jsonl(rows["sft"])]
    encoded = [chats.encode(tokenizer, *pair) for pair in pairs]
    nll = perplexity.negative_log_likelihood(model, encoded, tokenizer.pad_token_id, 8192).sum()
    tokens = sum(len(row.input_ids) - row.prompt_length for row in encoded)
    teacher = entries(result)["teacher"]
    assert teacher["perplexity"]["value"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert teacher["groups"] == len(set(GROUPS)) and 0 <= teacher["exact_match"]["value"] <= 1


def test_an_example_that_is_an_instruction_alone_is_shown(evaluate, here, tmp_path):
    data = write_rows(tmp_path / "r.jsonl", [{"input": f"Name colour {n}.\n\n", "output": "red"} for n in range(3)])
    report = tmp_path / "report"
    evaluate("--data", data, "--split", "all", "--max_new_tokens", "2", "--report_dir", str(report))
    assert (report / "report.html").read_text().count("<summary>Name colour ") >= 3


def test_an_interrupted_comparison_goes_on(evaluate, here, rows, tmp_path, monkeypatch):
    """A model that was measured is not loaded again, and of the next one only what is missing is asked."""
    argv = ["--data", rows["sft"], "--split", "all", "--max_new_tokens", "3"]
    whole = evaluate(*argv)
    count, unbroken = whole["n"], entries(whole)
    asked, loads = [], []
    generate, load = measure.MeasuredModel.generate, measure.preflight.load_within_memory

    def generating(self, numbers):
        if len(numbers) > 1:  # one alone is timed
            asked.append(len(numbers))
        for number, answer in enumerate(generate(self, numbers)):
            if number == 2 and len(asked) == 2:
                raise KeyboardInterrupt
            yield answer

    def loading(source, *args, **how):
        loads.append(source.model_dir)
        return load(source, *args, **how)

    monkeypatch.setattr(measure.MeasuredModel, "generate", generating)
    monkeypatch.setattr(measure.preflight, "load_within_memory", loading)
    kept = [*argv, "--report_dir", str(tmp_path / "report")]
    with pytest.raises(KeyboardInterrupt):
        evaluate(*kept)
    resumed = entries(evaluate(*kept))
    assert [asked[0], asked[1], asked[3]] == [count] * 3
    assert count - 4 <= asked[2] <= count - 2  # some inputs are there twice
    assert len(loads) == 4 and loads[1] == loads[2]  # the teacher, the base twice, the student
    for role, model in resumed.items():
        for name in ("exact_match", "perplexity", "parameters"):
            assert model[name] == unbroken[role][name]
    evaluate(*kept)
    assert len(loads) == 4 and len(asked) == 4


def test_a_copy_of_the_teacher_retains_all_of_it(evaluate, folders, here, rows, tmp_path):
    copy = str(shutil.copytree(folders["teacher"], tmp_path / "copy"))
    result = evaluate("--student", copy, "--data", rows["sft"], "--split", "all", "--max_new_tokens", "2")
    retained = entries(result)["student"]["retention"]
    assert retained["perplexity"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert result["models"][0]["perplexity"] == result["models"][2]["perplexity"]


def test_text_gets_perplexity_of_all_its_windows(evaluate, folders, here, tmp_path):
    data = tmp_path / "t.txt"
    data.write_text("\n".join(PROMPTS))
    result = evaluate("--data", str(data), "--max_len", "64")
    model, tokenizer = models.load_for_inference(ModelSource(folders["student"]))
    windows = tokenizers.windows(tokenizer, "\n".join(PROMPTS), 64)
    losses, counts = [], []
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor([window.input_ids])
            losses.append(float(model(ids, labels=ids).loss))
            counts.append(len(window.input_ids) - 1)
    assert entries(result)["student"]["perplexity"]["value"] == pytest.approx(
        math.exp(np.average(losses, weights=counts)), rel=1e-4
    )
    assert (result["split"], result["measures"][0]["key"]) == ("all", "perplexity")


def test_a_sample_is_the_same_whatever_the_order(tmp_path):
    content = [
        {"input": prompt, "output": "Good", "group": group} for prompt, group in zip(PROMPTS, GROUPS, strict=True)
    ]
    drawn = []
    for order in (content, content[::-1]):
        data = write_rows(tmp_path / "r.jsonl", order)
        rows, available = RowSelection(data, split="all", sample=5).read()
        assert available == 24
        drawn.append(sorted(row["input"] for row in rows))
    assert drawn[0] == drawn[1] and len(drawn[0]) == 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--teacher", "{student}"], "must be different models"),
        (["--teacher", "models/none"], "models/none does not exist"),
        (["--calibration", "prior"], "--calibration goes with --task"),
        (["--task", "creditmix", "--max_new_tokens", "3"], "--max_new_tokens is for written answers"),
        (["--sample", "99"], "--sample 99 is more than the 24 rows"),
        (["--split", "dev"], "has no row of the dev part"),
        (["--data", "{folder}/x.txt"], "x.txt does not exist"),
        (["--speed_rows", "0"], "0 is not above 0"),
        (["--data", "{folder}/grouped.jsonl"], "line 1: group 'article-7' is not the 16 hex digits that"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(argv, message, folders, rows, tmp_path, monkeypatch):
    write_rows(tmp_path / "grouped.jsonl", [{"input": "a", "output": "b", "group": "article-7"}])
    monkeypatch.setattr(measure, "measure_in_own_process", None)
    words = [word.format(folder=tmp_path, **folders) for word in argv]
    given = ["--teacher", folders["teacher"], "--student", folders["student"], "--data", rows["sft"], "--split", "all"]
    with pytest.raises(UserError, match=message):
        eval_distill.main([*given, *words])
