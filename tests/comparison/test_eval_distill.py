"""Teacher against student: surprise, speed, retention, and the evaluator from its rows to its report."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.inputs import GROUPS, LABELS, PROMPTS, SHARED, write_rows, write_squad
from support.models import build_base

import eval_creditmix
import eval_distill
from common import run_record
from common.cli import UserError
from common.comparison import latency as speed
from common.comparison import measure as judging
from common.comparison import metrics as distill_metrics
from common.comparison import perplexity, retention
from common.comparison import report as distill_report
from common.data import rows as records
from common.data import splits
from common.generation import generate as generation
from common.models import adapters, tokenizers
from common.models import loading as models
from common.models.source import ModelSource
from common.tasks.ranking import metrics
from common.tasks.ranking.calibration import Scores

pytestmark = pytest.mark.processes

REAL_TEXT = SHARED / "data/wikitext2/valid.txt"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> dict[str, str]:
    """A teacher twice as wide as base and student, which have other weights, each in a folder."""
    folder = tmp_path_factory.mktemp("contest")
    shapes = {"teacher": {"hidden": 64, "seed": 1}, "base": {"seed": 2}, "student": {"seed": 3}}
    return {role: build_base(folder / role, tokenizer, embeddings=0.3, **shape) for role, shape in shapes.items()}


@pytest.fixture
def here(monkeypatch):
    """Models are judged in this process."""
    monkeypatch.setattr(judging, "judge", judging._judge)


@pytest.fixture
def evaluate(capsys, folders):
    """`evaluate(flag, ...)`: the last line of stdout as JSON."""

    def run(*argv: str) -> dict:
        capsys.readouterr()
        given = [word for role, folder in folders.items() if f"--{role}" not in argv for word in (f"--{role}", folder)]
        assert eval_distill.main([*given, "--speed_rows", "2", *argv]) is None
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


# Surprise.


def test_passages_keep_the_text_and_know_the_articles(tmp_path):
    path = tmp_path / "w.txt"
    path.write_text(" = One = \n \n first\n = = Part = = \n second\n = Two = \n third\n")
    rows = perplexity.passages(str(path))
    assert [row["text"] for row in rows] == [" = One = \n \n first\n = = Part = = \n second\n", " = Two = \n third\n"]
    assert rows[0]["group"] != rows[1]["group"]
    lines = [f"line {number} " + "x" * 90 for number in range(600)]
    path.write_text("\n".join(lines))
    rows = perplexity.passages(str(path))
    assert "".join(row["text"] for row in rows) == "\n".join(lines)
    assert len({row["group"] for row in rows}) == len(rows) > 1
    assert all(len(row["text"]) <= perplexity.PASSAGE for row in rows)


def test_a_long_article_is_several_passages_of_one_group(tmp_path):
    path = tmp_path / "w.txt"
    path.write_text(" = One = \n" + "word word word\n" * 2000)
    rows = perplexity.passages(str(path))
    assert len(rows) > 1 and len({row["group"] for row in rows}) == 1


def test_windows_cut_a_text_without_loss(tokenizer):
    ids = tokenizer.encode(PROMPTS[0])
    windows = tokenizers.windows(tokenizer, PROMPTS[0], 10)
    assert [token for window in windows for token in window.input_ids] == ids[: 10 * len(windows)]
    assert all(window.prompt_length == 1 for window in windows)
    assert len(tokenizers.windows(tokenizer, PROMPTS[0], len(ids) - 1)) == 1  # a last token alone predicts nothing


@pytest.mark.skipif(not (SHARED / "models/stories260k").is_dir(), reason="needs stories260k")
def test_windows_start_with_bos_where_the_tokenizer_has_it_so():
    tokenizer = tokenizers.load_tokenizer(str(SHARED / "models/stories260k"))
    text = "Once upon a time there was a cat. " * 5
    windows = tokenizers.windows(tokenizer, text, 16)
    assert all(window.input_ids[0] == tokenizer.bos_token_id for window in windows)
    own = [token for window in windows for token in window.input_ids[window.prompt_length :]]
    assert own == tokenizer.encode(text, add_special_tokens=False)


def test_the_surprise_of_a_batch_is_that_of_each_row_alone(folders):
    model, tokenizer = models.load_for_inference(ModelSource(folders["teacher"]))
    rows = [tokenizers.encode_pair(tokenizer, prompt, label) for prompt, label in zip(PROMPTS, LABELS * 8, strict=True)]
    together = perplexity.negative_log_likelihood(model, rows, tokenizer.pad_token_id, 400)
    for row, found in zip(rows, together, strict=True):
        with torch.inference_mode():
            logprobs = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        places = range(row.prompt_length, len(row.input_ids))
        expected = -sum(float(logprobs[place - 1, row.input_ids[place]]) for place in places)
        assert found == pytest.approx(expected, rel=1e-4)


# Speed.


def test_every_row_is_timed_in_passes_on_answers_of_one_length(folders, monkeypatch):
    model, tokenizer = models.load_for_inference(ModelSource(folders["student"]))
    masked = speed._NeverEnd(tokenizer, model.generation_config)(torch.empty(1, 0), torch.zeros(1, len(tokenizer)))
    assert set(torch.isinf(masked[0]).nonzero()[:, 0].tolist()) == set(tokenizers.stop_ids(tokenizer))
    lengths, calls, generate = [], [], generation.generate

    def watched(*args, **kwargs):
        answers = generate(*args, **kwargs)
        lengths.append(len(answers[0][0].tokens))
        return answers

    monkeypatch.setattr(generation, "generate", watched)
    prompts = [tokenizers.encode_prompt(tokenizer, prompt) for prompt in PROMPTS[:3]]
    seconds = speed.measure(model, tokenizer, prompts, calls.append)
    assert calls == [0, 1] + [0, 1, 2] * speed.PASSES
    assert lengths == [speed.NEW_TOKENS] * len(calls)
    assert all(len(seconds[name]) == 3 and min(seconds[name]) > 0 for name in ("latency", "ttft", "decode"))


def test_the_summary_of_known_seconds():
    seconds = {"latency": [0.1, 0.3, 0.2], "ttft": [0.01, 0.03, 0.02], "decode": [0.31, 3.1, 0.62], "core_share": 0.5}
    assert speed.summary(seconds) == {
        "latency_s": {"p50": 0.2, "p95": 0.29},
        "ttft_s": 0.02,
        "tokens_per_s": (speed.NEW_TOKENS - 1) / 0.62,
        "speed_rows": 3,
        "core_share": 0.5,
    }


# Retention.


def test_retention_and_gap_of_a_mean_by_hand():
    teacher, base, student = [1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0]
    features = {"teacher": teacher, "base": base, "student": student}
    found = retention.figures(
        retention.ACCURACY, {role: retention.means(each * 50) for role, each in features.items()}, list(range(200))
    )
    assert found["teacher"]["value"]["value"] == 0.75
    assert found["student"]["retention"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["base"]["retention"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["student"]["gap_closed"]["value"] == pytest.approx((0.5 - 0.25) / (0.75 - 0.25))
    assert found["student"]["difference"]["value"] == -0.25 and found["student"]["gain"]["value"] == 0.25
    assert all(
        interval["low"] < interval["value"] < interval["high"]
        for interval in (found["student"][name] for name in ("value", "retention", "gap_closed", "difference"))
    )


def test_macro_f1_and_its_interval_are_those_of_the_other_evaluators():
    draw = np.random.default_rng(0)
    y, predictions = draw.integers(0, 3, 200), draw.integers(0, 3, 200)
    groups = [str(row // 3) for row in range(200)]
    features = {role: retention.hits(predictions, y, 3) for role in ("teacher", "student")}
    found = retention.figures(retention.MACRO_F1, features, groups)["student"]["value"]
    assert found == metrics.evaluate(Scores.of(np.eye(3)[predictions]), y, LABELS, groups=groups)["macro_f1"]


def test_perplexity_counts_tokens_alike_and_less_is_better():
    nll = {"teacher": [2.0, 6.0], "base": [6.0, 18.0], "student": [3.0, 9.0]}
    tokens = [2.0, 6.0]  # a token's surprise is 1, 3 and 1.5 in either row
    features = {role: np.stack([each, tokens], axis=1) for role, each in nll.items()}
    found = retention.figures(retention.PERPLEXITY, features, ["a", "b"])
    assert found["student"]["value"]["value"] == pytest.approx(math.exp(1.5), abs=1e-5)
    assert found["student"]["retention"] == pytest.approx(dict.fromkeys(("value", "low", "high"), math.exp(-0.5)))
    assert found["student"]["gap_closed"] == pytest.approx(dict.fromkeys(("value", "low", "high"), 0.75))


def test_equal_models_retain_everything_exactly():
    features = retention.means([0, 1, 1, 0, 1] * 20)
    found = retention.figures(retention.F1, {"teacher": features, "student": features}, list(range(100)))["student"]
    assert set(found["retention"].values()) == {1.0} and set(found["difference"].values()) == {0.0}


def test_a_share_of_nothing_is_undefined():
    features = {"teacher": [0, 0, 0, 1], "base": [0, 0, 1, 0], "student": [0, 1, 0, 1]}
    found = retention.figures(
        retention.F1, {role: retention.means(each) for role, each in features.items()}, list("abcd")
    )
    assert found["student"]["retention"] is None and found["student"]["gap_closed"] is None


# Figures and warnings.


def outcome(answers: list[str], **changes) -> dict:
    facts = {
        "parameters": 10,
        "adapter_parameters": 0,
        "disk_bytes": {"adapter": 0, "base": 40},
        "loaded_bytes": 40,
        "precision": "float32",
        "peak_memory_bytes": {"resident": 500, "process": 300},
        "device": "CPU",
        "threads": 1,
    }
    seconds = {"latency": [0.2, 0.4], "ttft": [0.1, 0.1], "decode": [0.3, 0.3], "core_share": 1.0}
    facts |= {name: changes.pop(name) for name in list(changes) if name in facts}
    seconds |= {name: changes.pop(name) for name in list(changes) if name in seconds}
    found = {"model_dir": "m", "facts": facts, "seconds": seconds, "speed": speed.summary(seconds), "cut": 0}
    return found | {"answers": answers} | changes


def squad_rows(n: int) -> list[dict]:
    return [{"input": "q", "answers": ["yes", "sure yes"], "group": f"{row:016x}"} for row in range(n)]


def entries(result: dict) -> dict[str, dict]:
    return {model["name"]: model for model in result["models"]}


def test_squad_figures_and_speed_up():
    half = {"latency": [0.1, 0.2], "ttft": [0.05, 0.05], "decode": [0.1, 0.1]}
    result = distill_metrics.evaluate(
        judging.SQUAD,
        squad_rows(10),
        {"teacher": outcome(["Yes."] * 10), "student": outcome(["yes"] * 5 + ["sure"] * 5, **half)},
    )
    student = entries(result)["student"]
    assert student["exact_match"]["value"] == 0.5
    assert student["f1"]["value"] == pytest.approx((5 + 5 * 2 / 3) / 10, abs=1e-6)
    assert student["retention"]["exact_match"]["value"] == 0.5
    assert student["speed_up"]["latency"]["value"] == 2 and student["speed_up"]["decode"]["value"] == 3
    assert [measure["key"] for measure in result["measures"]] == ["f1", "exact_match"]
    assert result["warnings"] == []


@pytest.mark.parametrize(
    ("teacher", "base", "student", "warning"),
    [
        (["yes"] * 20 + ["no"] * 20, None, ["yes"] * 40, "better than the teacher's interval"),
        (["no"] * 39 + ["yes"], ["yes"] * 30 + ["no"] * 10, ["no"] * 40, "a poor teacher: .* 0.025 .* beyond doubt"),
        (["yes"] * 20 + ["no"] * 20, ["no"] * 19 + ["yes"] * 21, ["no"] * 40, "a poor teacher: .* within the noise"),
        (
            ["yes"] * 21 + ["no"] * 19,
            ["no"] * 20 + ["yes"] * 20,
            ["yes"] * 20 + ["no"] * 20,
            "lead over the base in F1 is not certain",
        ),
        (["no"] * 40, None, ["no"] * 40, "retention of F1 is undefined"),
    ],
)
def test_warnings_about_quality(teacher, base, student, warning):
    outcomes = {"teacher": outcome(teacher)} | ({"base": outcome(base)} if base else {}) | {"student": outcome(student)}
    found = distill_metrics.evaluate(judging.SQUAD, squad_rows(40), outcomes)["warnings"]
    assert any(re.search(warning, each) for each in found), found


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"core_share": 0.5}, "student: timed while the machine was busy (it had a core for 50% of the time)"),
        ({"precision": "nf4"}, "different precision (teacher float32, student nf4)"),
        ({"cut": 3}, "student: 3 prompts were cut"),
    ],
)
def test_warnings_about_conditions(changes, warning):
    outcomes = {"teacher": outcome(["yes"] * 4), "student": outcome(["yes"] * 4, **changes)}
    (found,) = distill_metrics.evaluate(judging.SQUAD, squad_rows(4), outcomes)["warnings"]
    assert warning in found


def test_unlike_tokenizers_are_compared_by_bytes():
    surprise = {"nll": [2.0, 4.0], "bytes": [10, 20]}
    rows = [{"text": "t", "group": "a"}, {"text": "t", "group": "b"}]
    outcomes = {"teacher": outcome([], tokens=[4, 8], **surprise), "student": outcome([], tokens=[5, 8], **surprise)}
    result = distill_metrics.evaluate(judging.TEXT, rows, outcomes)
    assert [measure["key"] for measure in result["measures"]] == ["bits_per_byte"]
    assert entries(result)["student"]["bits_per_byte"]["value"] == pytest.approx(0.2 / math.log(2), abs=1e-6)
    assert any("different tokenizers" in warning for warning in result["warnings"])


# The evaluator.


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
        *("results.txt", "metrics.json", "report.html", "trade_off.png", "relative_costs.png", "quality.png")
    }
    stored = json.loads((report / "metrics.json").read_text())
    assert {key: stored[key] for key in result} == result
    table = (report / "results.txt").read_text()
    assert table.startswith(distill_report.format_tables(stored)) and table.count("--- drawn blindly") == 5
    page = (report / "report.html").read_text()
    assert "<b>x</b>" not in page and "Answers side by side" in page
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in report.glob("*.png"))


def test_a_label_task_gets_the_figures_of_eval_creditmix(evaluate, folders, here, tmp_path, capsys):
    task = tmp_path / "credit.yaml"
    task.write_text("labels: [Good, Standard, Bad]\ninstruction: Which credit mix?\ngroup_key: customer\n")
    draw = random.Random(0)
    data = write_rows(
        tmp_path / "rows.jsonl",
        [
            {"text": f"{draw.choice(PROMPTS)} {n}", "label": LABELS[n % 3], "customer": str(n // 2)}
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
    encoded = [tokenizers.encode_pair(tokenizer, *pair) for pair in pairs]
    nll = perplexity.negative_log_likelihood(model, encoded, tokenizer.pad_token_id, 8192).sum()
    tokens = sum(len(row.input_ids) - row.prompt_length for row in encoded)
    teacher = entries(result)["teacher"]
    assert teacher["perplexity"]["value"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert teacher["groups"] == len(set(GROUPS)) and 0 <= teacher["exact_match"]["value"] <= 1


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


def test_an_adapter_counts_with_its_base(folders, tmp_path):
    base = models.load_base(ModelSource(folders["base"]))
    adapter = str(tmp_path / "run")
    adapters.add_lora(base, r=4, alpha=8, dropout=0.0, seed=0).save_pretrained(adapter)
    model, _ = models.load_for_inference(ModelSource(adapter, base=folders["base"]))
    facts = judging.size_facts(model, adapter, folders["base"])
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert facts["adapter_parameters"] == lora > 0
    assert facts["parameters"] == lora + models.load_for_inference(ModelSource(folders["base"]))[0].num_parameters()
    assert facts["disk_bytes"] == {
        "adapter": os.path.getsize(Path(adapter, "adapter_model.safetensors")),
        "base": os.path.getsize(Path(folders["base"], "model.safetensors")),
    }


def test_prompts_are_cut_to_leave_room_for_the_answer(folders):
    model, tokenizer = models.load_for_inference(ModelSource(folders["student"]))
    rows = [{"input": PROMPTS[3], "output": "Good"}]
    length = len(tokenizers.encode_prompt(tokenizer, PROMPTS[3]))
    job = judging.Job(folders["student"], None, judging.ROWS, rows, 1, length + 4, 4, 8192, "off", "auto", False)
    whole = judging.Contestant(job, model, tokenizer)
    assert (whole.cut(), len(whole.prompt(0, 4))) == (0, length)
    shorter = judging.Contestant(replace(job, max_len=length), model, tokenizer)
    assert shorter.cut() == 1 and len(shorter.prompt(0, 4)) <= length - 4
    with pytest.raises(UserError, match="leave no room for a prompt and 4 new ones"):
        judging.Contestant(replace(job, max_len=6), model, tokenizer).prompt(0, 4)


def test_a_sample_is_the_same_whatever_the_order(tmp_path):
    args = eval_distill.build_parser().parse_args(
        ["--teacher", "t", "--student", "s", "--data", "x", "--split", "all", "--sample", "5"]
    )
    content = [
        {"input": prompt, "output": "Good", "group": group} for prompt, group in zip(PROMPTS, GROUPS, strict=True)
    ]
    drawn = []
    for order in (content, content[::-1]):
        args.data = write_rows(tmp_path / "r.jsonl", order)
        rows, of = eval_distill.choose_rows(args, judging.ROWS, None)
        assert of == 24
        drawn.append(sorted(row["input"] for row in rows))
    assert drawn[0] == drawn[1] and len(drawn[0]) == 5


def test_contamination_is_counted_where_it_can_be(tmp_path, folders):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "run.json").write_text(json.dumps({"data": {"sha256": "abc"}}))
    groups = ["a", "b", "b"]
    assert eval_distill.contamination(str(run), groups, judging.ROWS, "abc") is None
    assert eval_distill.contamination(str(run), groups, judging.TEXT, "abc") == {"rows": 3, "of": 3}
    assert eval_distill.contamination(str(run), groups, judging.TEXT, "other") is None
    run_record.write_groups(run, {"b"})
    assert eval_distill.contamination(str(run), groups, judging.ROWS, "abc") == {"rows": 2, "of": 3}
    assert eval_distill.contamination(folders["base"], groups, judging.TEXT, "abc") == {"rows": 0, "of": 3}


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
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(argv, message, folders, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "judge", None)
    words = [word.format(folder=tmp_path, **folders) for word in argv]
    given = ["--teacher", folders["teacher"], "--student", folders["student"], "--data", rows["sft"], "--split", "all"]
    with pytest.raises(UserError, match=message):
        eval_distill.main([*given, *words])


def test_a_model_is_judged_in_a_process_of_its_own(folders, tmp_path):
    rows = [{"input": prompt, "output": "Good"} for prompt in PROMPTS[:3]]
    job = judging.Job(folders["student"], None, judging.ROWS, rows, 1, 256, 2, 8192, "off", "auto", False)
    apart, here = judging.judge(job), judging._judge(job)
    assert (apart["answers"], apart["nll"], apart["tokens"]) == (here["answers"], here["nll"], here["tokens"])
    memory = apart["facts"]["peak_memory_bytes"]
    assert memory["resident"] >= memory["process"] > 50e6
    broken = shutil.copytree(folders["student"], tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot load .*broken"):
        judging.judge(replace(job, model_dir=str(broken)))


@pytest.mark.skipif(not REAL_TEXT.is_file(), reason="needs wikitext-2")
def test_real_wikitext_has_its_sixty_articles():
    rows = perplexity.passages(str(REAL_TEXT))
    assert len({row["group"] for row in rows}) == 60
    assert sum(len(row["text"].split()) for row in rows) == len(REAL_TEXT.read_text().split())
    assert all(splits.GROUP_HASH.fullmatch(row["group"]) for row in rows)
