"""On-policy rounds: equal to what they must be equal to, resumed at every phase, one model at a time, stopped when the
student collapses."""

from __future__ import annotations

import csv
import json
import shutil
import weakref
from pathlib import Path

import pytest
from support.distillation import distill, loss_column
from support.inputs import GROUPS, PROMPTS, read_rows, write_rows
from support.models import distance, run_json

from common.cli import UserError
from common.data import resumable
from common.distillation import fill_cache, on_policy, student_answers
from common.models import loading
from common.training import run
from common.vram import preflight

pytestmark = pytest.mark.processes

ROUNDS = ("--on_policy", "--max_new_tokens", 12, "--max_steps", 3, "--ignore_collapse", "--cache_k", 16)
DIVERGENCES = ("--reverse_kl", 1, "--forward_kl", 1, "--jsd", 1)


@pytest.fixture
def prompts(tmp_path) -> str:
    rows = [{"input": p, "group": g} for p, g in zip(PROMPTS[:12], GROUPS, strict=False)]
    return write_rows(tmp_path / "prompts.jsonl", rows)


def rounds_of(folder: Path) -> list[dict]:
    with open(folder / "rounds.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def test_a_teacher_that_is_the_student_has_nothing_to_say(base, prompts, tmp_path):
    run = distill(base, tmp_path / "run", "--teacher", base, "--data", prompts, *ROUNDS, "--rounds", 1, *DIVERGENCES)
    for name in ("reverse_kl", "forward_kl", "jsd"):
        assert loss_column(run, name)[0] == pytest.approx(0, abs=2e-5), name
    (only,) = rounds_of(run)
    assert float(only["kl"]) == pytest.approx(0, abs=0.02)  # ids that pad the LM head have 1 % of the student's mass
    assert float(only["entropy"]) > 1
    more = ("--teacher", base, "--data", prompts, *ROUNDS, "--rounds", 1, "--sample_temperature", 0.5)
    (cooler,) = rounds_of(distill(base, tmp_path / "cooler", *more))
    assert (cooler["kl"], cooler["entropy"]) == ("", "")  # of what was drawn from other distributions: not known


@pytest.mark.parametrize("lora", ["--lora_r=4", "--lora_r=0"])
def test_one_round_without_own_answers_is_offline_distillation(lora, base, teacher, uneven, tmp_path, monkeypatch):
    more = ("--teacher", teacher, "--data", uneven, *DIVERGENCES, "--cache_k", 16, lora)
    offline = distill(base, tmp_path / "offline", *more, "--teacher_cache", tmp_path / "one")
    monkeypatch.setattr(student_answers, "write", lambda *args: pytest.fail("the student wrote"))
    rounds = ("--on_policy", "--rounds", 1, "--lmbda", 0, "--max_new_tokens", 12)
    on_policy = distill(base, tmp_path / "on_policy", *more, *rounds)
    assert loss_column(on_policy) == loss_column(offline)
    if lora == "--lora_r=4":
        assert distance(on_policy, offline) == 0


@pytest.fixture(scope="module")
def unbroken(base, teacher, tmp_path_factory) -> tuple[Path, list]:
    folder = tmp_path_factory.mktemp("unbroken")
    data = write_rows(folder / "rows.jsonl", [{"input": p, "output": "Good."} for p in PROMPTS[:12]])
    more = ["--teacher", teacher, "--data", data, *ROUNDS, "--rounds", 2, "--lmbda", 0.7, "--num_samples", 2,
            "--save_steps", 2, "--max_batch_tokens", 300]  # fmt: skip
    return distill(base, folder / "run", *more), more


def test_the_rounds_are_told(unbroken):
    run, _ = unbroken
    told = rounds_of(run)
    assert [line["round"] for line in told] == ["1", "2"]
    assert [(line["prompts"], line["answers"], line["own_rows"]) for line in told] == [("4", "8", "2")] * 2
    assert all(0 < float(line["tokens"]) <= 12 and float(line["entropy"]) > 0 for line in told)
    assert all(float(line["kl"]) > 0.2 for line in told)
    record = run_json(run)
    assert record["state"] == "done"
    assert [each["round"] for each in record["rounds"]] == [1, 2]
    assert record["steps"] == 6
    assert set(record["predicted_peak_bytes"]) == {"the student writes", "the teacher reads", "the student trains"}
    assert (run / "rounds.png").read_bytes().startswith(b"\x89PNG")
    assert loss_column(run, "step") == [1, 2, 3, 4, 5, 6]
    live = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    assert [line["step"] for line in live if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert {line["max_steps"] for line in live} == {6}
    assert not list(run.glob("rounds/*/checkpoints"))
    of_round = read_rows(run / "rounds" / "02" / "answers.jsonl")
    assert [len(line["samples"]) for line in of_round] == [2] * 4


def test_each_round_goes_on_from_the_one_before(unbroken):
    run, _ = unbroken
    first, second = run / "rounds" / "01", run / "rounds" / "02"
    assert distance(first, second) > 0
    assert distance(run, second) == 0
    assert run_json(second)["settings"]["init_adapter"] == str(first)
    rows = [{line["row"] for line in read_rows(each / "answers.jsonl")} for each in (first, second)]
    assert rows[0].isdisjoint(rows[1])  # together they go through the data once


def break_at(monkeypatch, holder, name: str, call: int) -> None:
    """The run is killed in this call of `holder.name`, and does nothing more."""
    real, calls = getattr(holder, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        if len(calls) >= call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(holder, name, wrapped)


PHASES = {  # where each is broken off: an answer is kept, a batch is kept, the student is loaded, its training is done
    "writing": (resumable.AnswerStore, "add", 2),
    "reading": (fill_cache.TeacherCache, "add", 2),
    "training": (loading, "load_base", 2),  # after the teacher, which has not read everything
    "between": (on_policy, "write_json", 1),
}


def test_resumed_equals_unbroken(unbroken, base, tmp_path, monkeypatch):
    """Killed within each phase of each round, and when a round's student is saved but the round is not closed."""
    run_folder, more = unbroken
    run, resume = tmp_path / "run", []
    for number in (1, 2):
        for phase, place in PHASES.items():
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(fill_cache, "SHARD_TOKENS", 1)  # each batch is kept
                break_at(patch, *place)
                distill(base, run, *more, *resume)
            resume = ["--resume"]
            folder = run / "rounds" / f"{number:02d}"
            assert (folder / "answers.jsonl").is_file() == (phase != "writing"), (phase, number)
            assert (folder / "run.json").is_file() == (phase in ("training", "between")), (phase, number)
            assert not (folder / on_policy.STATISTICS).exists()
    distill(base, run, *more, *resume)
    assert distance(run, run_folder) < 1e-5
    assert run_json(run).keys() == run_json(run_folder).keys() >= set(on_policy.OF_THE_FIRST)
    told, whole = rounds_of(run), rounds_of(run_folder)
    for name in ("answers", "tokens", "cut", "repetition"):
        assert [line[name] for line in told] == [line[name] for line in whole]
    assert loss_column(run) == pytest.approx(loss_column(run_folder), abs=1e-5)


def test_a_checkpoint_within_a_round_is_gone_on_from(unbroken, base, tmp_path, monkeypatch):
    run_folder, more = unbroken
    watched, seen = run.watched_train, []

    def stop_after_training(trainer, settings, record, checkpoint):
        watched(trainer, settings, record, checkpoint)
        seen.append(checkpoint)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "watched_train", stop_after_training)
    with pytest.raises(KeyboardInterrupt):
        distill(base, tmp_path / "run", *more)
    shutil.rmtree(tmp_path / "run" / "rounds" / "02" / "checkpoints" / "checkpoint-3")
    distill(base, tmp_path / "run", *more, "--resume")
    assert [Path(each).name if each else None for each in seen] == [None, None, "checkpoint-2"]
    assert distance(tmp_path / "run", run_folder) == 0


def test_an_unfinished_run_is_not_begun_again_unasked(unbroken, base, tmp_path):
    run_folder, more = unbroken
    shutil.copytree(run_folder, tmp_path / "run")
    record = run_json(tmp_path / "run") | {"state": "failed"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="holds an unfinished run; pass --resume to go on"):
        distill(base, tmp_path / "run", *more)
    with pytest.raises(UserError, match=r"begun with --lmbda 0.7, now 0.5"):
        distill(base, tmp_path / "run", *more, "--lmbda", 0.5, "--resume")


def test_one_model_at_a_time(base, teacher, prompts, tmp_path, monkeypatch):
    alive: list[weakref.ref] = []
    load = loading.load_base

    def watched(*args, **kwargs):
        left = [each().config.hidden_size for each in alive if each() is not None]
        assert not left, f"a model of width {left[0]} is still in memory"
        model = load(*args, **kwargs)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "load_base", watched)
    distill(base, tmp_path / "run", "--teacher", teacher, "--data", prompts, *ROUNDS, "--rounds", 2)
    assert len(alive) == 6


def test_a_phase_that_does_not_fit_is_said_before_anything_is_loaded(base, teacher, prompts, tmp_path, monkeypatch):
    free = iter([1 << 40, 1 << 20])  # for the student that writes, for the teacher
    monkeypatch.setattr(preflight, "free_bytes", lambda: next(free))
    monkeypatch.setattr(loading, "load_base", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match="no settings need less than"):
        distill(base, tmp_path / "run", "--teacher", teacher, "--data", prompts, *ROUNDS)


def test_a_student_that_has_not_been_warmed_up_is_stopped(base, teacher, prompts, tmp_path, monkeypatch):
    def in_circles(settings, source, asked, number, path):
        path.parent.mkdir(parents=True)
        sample = {"text": "", "tokens": [5, 6] * 6, "logprob": -9.0, "finished": False}
        write_rows(path, [{"row": row, "samples": [sample]} for row, _ in asked])

    monkeypatch.setattr(student_answers, "write", in_circles)
    monkeypatch.setattr(fill_cache, "fill_cache", lambda *args, **kwargs: pytest.fail("the teacher was asked"))
    asked = [word for word in ROUNDS if word != "--ignore_collapse"]
    with pytest.raises(UserError, match=r"round 1: the student has collapsed: 78 % of what .* pass that run as --init"):
        distill(base, tmp_path / "run", "--teacher", teacher, "--data", prompts, *asked)
    assert run_json(tmp_path / "run")["state"] == "failed"


def test_running_text_has_no_prompts(base, teacher, tmp_path):
    (tmp_path / "text.txt").write_text("Acme makes lamps.")
    with pytest.raises(UserError, match=r"--on_policy needs prompts, and .*text.txt has running text"):
        distill(base, tmp_path / "run", "--teacher", teacher, "--data", tmp_path / "text.txt", *ROUNDS)
