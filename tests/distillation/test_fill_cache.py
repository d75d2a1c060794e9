"""Training from a cache against training beside the live teacher; what is written, and by whom."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import chain, repeat

import pytest
import torch
from support.distillation import distill, loss_column
from support.inputs import read_rows
from support.models import distance, run_json

from common.cli import UserError
from common.distillation import fill_cache, objective
from common.distillation import rows as distill_rows
from common.distillation.teacher_cache import TeacherCache, record_type, unpack
from common.models import loading
from common.models.batching import CHUNK_LOGITS
from common.models.source import ModelSource
from common.training.hidden_states import HiddenStateReader
from common.vram import preflight

pytestmark = pytest.mark.processes

OF_LOGITS = ("--forward_kl", 1, "--reverse_kl", 0.1, "--jsd", 0.1, "--ce", 0.5, "--teacher_ce", 0.2, "--temperature", 2)
ALL_TERMS = (*OF_LOGITS, "--hidden_mse", 0.1, "--hidden_cosine", 0.1)


@pytest.mark.parametrize("layers", ["uniform", "2:1,1:3,2:3"])
def test_a_cache_of_everything_equals_the_live_teacher(layers, base, teacher, uneven, tmp_path):
    more = ("--teacher", teacher, "--data", uneven, *ALL_TERMS, "--layer_map", layers)
    live = distill(base, tmp_path / "live", *more)
    cached = distill(base, tmp_path / "cached", *more, "--teacher_cache", tmp_path / "cache", "--cache_k", 100_000)
    assert loss_column(cached) == pytest.approx(loss_column(live), abs=1e-3)
    for name in ("forward_kl", "reverse_kl", "jsd", "teacher_ce", "hidden_mse", "hidden_cosine"):
        assert loss_column(cached, name) == pytest.approx(loss_column(live, name), rel=0.01, abs=1e-3), name
    assert loss_column(live)[-1] < loss_column(live)[0]


def test_a_complete_cache_needs_no_teacher(base, teacher, uneven, tmp_path, monkeypatch):
    gone = tmp_path / "teacher"
    shutil.copytree(teacher, gone)
    more = ("--teacher", gone, "--data", uneven, "--teacher_cache", tmp_path / "cache", "--cache_k", 8)
    first = distill(base, tmp_path / "first", *more)
    monkeypatch.setattr(objective, "load_teacher", lambda *args: pytest.fail("the teacher was loaded"))
    again = distill(base, tmp_path / "again", *more, "--per_device_train_batch_size", 2,
                    "--gradient_accumulation_steps", 2)  # fmt: skip
    assert distance(first, again) < 1e-5  # accumulation changes nothing
    loss = loss_column(first)
    assert loss[-1] < loss[0]


def test_draws_serve_as_well(base, teacher, uneven, tmp_path):
    more = ("--teacher", teacher, "--data", uneven, "--forward_kl", 1)
    live = distill(base, tmp_path / "live", *more)
    cache = ("--teacher_cache", tmp_path / "cache", "--cache_targets", "sampled", "--cache_k", 3000)
    drawn = distill(base, tmp_path / "drawn", *more, *cache)
    assert loss_column(drawn) == pytest.approx(loss_column(live), abs=0.05)


def test_an_interrupted_cache_goes_on(base, teacher, uneven, tmp_path, monkeypatch):
    monkeypatch.setattr(fill_cache, "SHARD_TOKENS", 10)
    add, shards = fill_cache.TeacherCache.add, []

    def stop_at_the_third(self, rows, packed):
        if len(shards) == 2:
            raise KeyboardInterrupt
        shards.append(len(rows))
        add(self, rows, packed)

    more = ("--teacher", teacher, "--data", uneven, "--teacher_cache", tmp_path / "cache", "--max_batch_tokens", 200)
    monkeypatch.setattr(fill_cache.TeacherCache, "add", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        distill(base, tmp_path / "run", *more)
    assert run_json(tmp_path / "run")["error"] == "interrupted"
    seen = []
    monkeypatch.setattr(
        fill_cache.TeacherCache, "add", lambda self, rows, packed: (seen.extend(rows), add(self, rows, packed))
    )
    distill(base, tmp_path / "run", *more)
    assert len(seen) == 16 - sum(shards)


@pytest.fixture(scope="module")
def filling(teacher, uneven):
    """`filling(folder, rows, seed)` has the teacher read them, 40 tokens at a time, and gives the cache with draws."""
    model, tokenizer = loading.load_for_inference(ModelSource(teacher, dtype="float32"))
    reader = HiddenStateReader(model)
    size = reader.head.weight.shape[0]
    targets = fill_cache.Targets(drawn=True, own=False, k=8, temperature=50.0, vocabulary=size, layers=[])

    def fill(folder, rows, seed: int = 0) -> TeacherCache:
        cache = TeacherCache(folder, {}, record_type(targets.k, logprobs=False))
        fill_cache.fill_cache(cache, reader, rows, targets, 0, max_batch_tokens=40, seed=seed)
        return cache

    fill.rows = distill_rows.encode(tokenizer, uneven, read_rows(uneven), 1024, False)
    fill.reader = reader
    return fill


def draws(cache: TeacherCache, rows) -> list[list]:
    return [unpack(cache.get(row))["ids"].tolist() for row in rows]


def test_draws_are_those_of_a_row_and_a_seed(filling, tmp_path):
    """Whatever is read along with it, and wherever an interrupted pass went on."""
    rows = filling.rows
    whole = draws(filling(tmp_path / "whole", rows), rows)
    filling(tmp_path / "parts", rows[:5])
    assert draws(filling(tmp_path / "parts", rows[5:]), rows) == whole
    assert draws(filling(tmp_path / "other", rows, seed=1), rows) != whole
    assert len({tuple(token) for row in whole for token in row}) == sum(map(len, whole))


@pytest.mark.parametrize(("limit", "value"), [("SHARD_TOKENS", 1), ("SHARD_BYTES", 1), ("SHARD_SECONDS", 0)])
def test_a_shard_is_bounded_in_tokens_bytes_and_seconds(limit, value, filling, tmp_path, monkeypatch):
    filling(tmp_path / "one", filling.rows)
    monkeypatch.setattr(fill_cache, limit, value)
    filling(tmp_path / "many", filling.rows)
    one, many = (len(list((tmp_path / name).glob("*.rows"))) for name in ("one", "many"))
    assert one == 1 < many


def test_what_was_read_before_an_exception_is_kept(filling, tmp_path, monkeypatch):
    read, calls = filling.reader.read, []

    def out_of_memory(*args):
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        calls.append(args)
        return read(*args)

    monkeypatch.setattr(filling.reader, "read", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        filling(tmp_path / "cache", filling.rows)
    monkeypatch.undo()
    kept = TeacherCache(tmp_path / "cache", {}, record_type(8, logprobs=False))
    assert kept.sizes()["rows"] == sum(len(batch["input_ids"]) for _, batch in calls) > 0


@pytest.fixture
def tight(teacher, monkeypatch):
    """`tight(**plan)`: the memory that is free is a byte less than the teacher's pass takes under that plan."""

    def leave(**changes) -> None:
        plan = preflight.inference_plan(ModelSource(teacher), max_batch_tokens=1 << 20, generates=True)
        needed = preflight.predict(replace(plan, generates=False, logits=CHUNK_LOGITS, **changes)).total
        free = chain([1 << 40], repeat(needed - 1))  # of the student's training, then of the teacher's pass
        monkeypatch.setattr(preflight, "free_bytes", lambda: next(free))

    return leave


def test_a_teacher_that_does_not_fit_is_said_before_it_is_loaded(base, teacher, uneven, tmp_path, tight, monkeypatch):
    """Its pass has a batch of its own; what training changes is another matter."""
    more = ["--teacher", teacher, "--data", uneven, "--teacher_cache", tmp_path / "cache"]
    more += ["--max_batch_tokens", 1 << 20]
    tight()
    with monkeypatch.context() as patch, pytest.raises(UserError, match=f"are free; --max_batch_tokens {1 << 19}"):
        patch.setattr(objective, "load_teacher", lambda *args: pytest.fail("the teacher was loaded"))
        distill(base, tmp_path / "run", *more)
    tight()
    run = distill(base, tmp_path / "run", *more, "--auto_fit", "--overwrite")
    assert run_json(run)["auto_fit"] == {"max_batch_tokens": 1 << 19}


@pytest.mark.parametrize("auto_fit", [False, True])
def test_an_empty_cache_is_nobodys(auto_fit, base, teacher, uneven, tmp_path, tight, monkeypatch):
    """A teacher that fits in 4 bits alone can be loaded in them, though the cache was opened for another precision."""
    more = ["--teacher", teacher, "--data", uneven, "--teacher_cache", tmp_path / "cache", "--max_steps", 1]
    tight(batch_tokens=512)
    if auto_fit:
        first = distill(base, tmp_path / "first", *more, "--auto_fit")
        assert run_json(first)["auto_fit"]["load_teacher_in_4bit"] == "on"
        more += ["--auto_fit"]  # which, with more memory, still finds what it has written
    else:
        with pytest.raises(UserError, match=r"are free; .*--load_teacher_in_4bit on"):
            distill(base, tmp_path / "first", *more)
        more += ["--load_teacher_in_4bit", "on"]
    monkeypatch.undo()
    run = distill(base, tmp_path / "run", *more)
    assert run_json(run).get("auto_fit") == ({"load_teacher_in_4bit": "on"} if auto_fit else None)
    with pytest.raises(UserError, match=r"another precision \(NF4, not 16 or 32 bits\)"):
        distill(base, tmp_path / "other", *more[:8], "--load_teacher_in_4bit", "off")
