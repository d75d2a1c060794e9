"""Adapters that come while a text is written, or are not what they should be: the text and what follows are as ever."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from support.host import Later, answers_to
from support.models import build_base
from support.served import ROWS, make_run, replace_adapter, same, settings

from common.cli import UserError
from common.generation import aligned_cache
from common.generation.rows import RevisableRows
from common.models import adapters, loading
from common.models.source import ModelSource
from common.serving.adapter_host import Host
from common.serving.batch_queue import QueuedRequest
from common.serving.messages import Abandoned, KeepVersions, Text, Unusable, Withdraw
from common.serving.run_registry import Registry, Version
from common.serving.work import Chat, ChatTurn, Classify
from common.tasks.ranking import creditmix
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.creditmix import CREDITMIX

pytestmark = pytest.mark.processes

WORK = Chat(max_tokens=24, temperature=0.0, top_p=1.0, samples=1, seed=0, stop=(), schema=None)
TURN = ChatTurn([{"role": "user", "content": "Age: 23, Occupation: Scientist"}], stream=True)
TEXT = creditmix.clean_features(ROWS[0])


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> str:
    """One on which adapters write other texts."""
    return build_base(tmp_path_factory.mktemp("base") / "tiny", tokenizer)


@pytest.fixture
def runs(tmp_path, base) -> Path:
    for seed, name in enumerate(("one", "two"), start=1):
        make_run(tmp_path / "runs" / name, base, seed, spread=1.0)
    return tmp_path / "runs"


class Process:
    """A model's process, and what it is asked."""

    def __init__(self, base: str, runs: Path) -> None:
        self.registry = Registry(str(runs), base)
        self.host = Host(base, settings(runs).host, 2, Later())
        self.host.load()

    def find(self, name: str | Version) -> Version:
        return self.registry.find(name) if isinstance(name, str) else name

    def text(self, number: int, name: str) -> QueuedRequest:
        return QueuedRequest(number, (self.find(name), WORK), TURN, urgent=False)

    def row(self, number: int, name: str | Version) -> QueuedRequest:
        return QueuedRequest(number, (self.find(name), Classify()), [CREDITMIX.prompt(TEXT)], tokens=10)

    def answers(self, *requests: QueuedRequest, later: dict[int, list] | None = None) -> list:
        """See `answers_to`; in the order of their numbers."""
        return [answer for _, answer in sorted(answers_to(self.host, requests, later).items())]

    def streamed(self) -> str:
        return "".join(message.text for message in self.host.channel.sent if isinstance(message, Text))


@pytest.fixture
def process(base, runs) -> Process:
    return Process(base, runs)


@pytest.fixture(scope="module")
def of_base(base, tmp_path_factory) -> str:
    """What the base writes by itself."""
    alone = Process(base, tmp_path_factory.mktemp("none"))
    (answer,) = alone.answers(alone.text(0, "base"))
    return answer.choices[0].text


def wanted(runs: Path, name: str) -> dict:
    classifier = Classifier.load(ModelSource(str(runs / name)), CREDITMIX)
    (answer,) = classifier.answers([TEXT], classifier.calibration(None))
    return answer


def break_weights(run: Path) -> None:
    """One of its matrices has another shape than its settings say; the others fit."""
    config = run / "adapter_config.json"
    settings = json.loads(config.read_text()) | {"rank_pattern": {"layers.1.mlp.down_proj": 3}}
    config.write_text(json.dumps(settings))


def test_an_adapter_that_came_between_two_steps_is_like_any_other(process, runs, tmp_path, of_base, monkeypatch):
    """PEFT makes it the active one, to be trained, where the first one leaves."""
    monkeypatch.setattr("common.serving.run_registry.LOOK", 0.0)
    process.answers(process.row(0, "one"))
    text, row = process.answers(process.text(0, "base"), later={4: [process.row(1, "two")]})
    assert text.choices[0].text == process.streamed() == of_base
    same(*row, wanted(runs, "two"))
    for seed in range(3):
        replace_adapter(runs / "one", make_run(tmp_path / "other", process.host.base, seed=10 + seed))
        newest = process.find("one")
        process.host.channel.coming = [KeepVersions("one", process.registry.versions("one"))]
        process.host.receive(0)
        (row,) = process.answers(process.row(0, newest))
        same(*row, wanted(runs, "one"))
    assert len(process.host.model.peft_config) == 4
    (row,) = process.answers(process.row(0, "two"))
    same(*row, wanted(runs, "two"))


def test_a_first_adapter_that_does_not_fit_leaves_the_text_that_it_came_between(process, runs, of_base, monkeypatch):
    """It was on the base for a moment, most of it; so that has to go, before it is loaded anew."""
    break_weights(runs / "one")
    load, held, old = loading.load_base, [], weakref.ref(process.host.model)

    def loading_anew(source):
        held.append(old() is not None)
        return load(source)

    monkeypatch.setattr(loading, "load_base", loading_anew)
    later = {4: [process.row(1, "one")], 8: [process.row(2, "two")]}
    text, refused, row = process.answers(process.text(0, "base"), later=later)
    assert isinstance(refused, Unusable) and "does not fit the base" in str(refused)
    assert text.choices[0].text == process.streamed() == of_base
    assert held == [False]
    same(*row, wanted(runs, "two"))


def test_a_base_that_cannot_be_loaded_again_is_tried_at_the_next_request(process, runs, of_base, monkeypatch):
    break_weights(runs / "one")
    load = loading.load_base

    def failing(source):
        monkeypatch.setattr(loading, "load_base", load)
        raise UserError("the base is not there; put it back")

    monkeypatch.setattr(loading, "load_base", failing)
    text, refused = process.answers(process.text(0, "base"), later={4: [process.row(1, "one")]})
    assert isinstance(text, Unusable) and "put it back" in str(text)
    assert isinstance(refused, Unusable) and "does not fit the base" in str(refused)
    (text,) = process.answers(process.text(0, "base"))
    assert text.choices[0].text == of_base


def test_what_ran_out_of_memory_has_given_it_back_when_it_is_tried_again(process, of_base, monkeypatch):
    process.answers(process.row(0, "one"))
    step, failed, held = RevisableRows.step, [], []

    def failing(self, rows):
        if not failed:
            failed.append(weakref.ref(self))
            raise torch.OutOfMemoryError("CUDA out of memory")
        held.append(failed[0]() is not None)
        return step(self, rows)

    monkeypatch.setattr(RevisableRows, "step", failing)
    _, text = process.answers(process.text(0, "one"), process.text(1, "base"))
    assert text.choices[0].text == of_base
    assert held and not any(held)


@pytest.mark.parametrize("withdrawn", [[0], [0, 1]], ids=["one", "all"])
def test_what_nobody_waits_for_any_more_gives_its_memory_back(process, of_base, monkeypatch, withdrawn):
    """At once, and not when Python next looks for what holds on to itself."""
    process.answers(process.row(0, "one"), process.row(1, "base"))
    make, caches = aligned_cache.empty_cache, []

    def watched(config):
        cache = make(config)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(aligned_cache, "empty_cache", watched)
    later = {8: [Withdraw(number) for number in withdrawn]}
    gc.collect()
    gc.disable()
    try:
        answers = process.answers(process.text(0, "one"), process.text(1, "base"), later=later)
    finally:
        gc.enable()
    assert [isinstance(answer, Abandoned) for answer in answers] == [True, len(withdrawn) > 1]
    if len(withdrawn) == 1:
        assert answers[1].choices[0].text == of_base
    assert len(caches) == 2 and not any(cache() for cache in caches)


@pytest.mark.parametrize("before", [["one"], []], ids=["beside_another", "as_the_only_one"])
def test_an_adapter_that_changes_while_it_is_loaded_takes_no_memory(process, runs, tmp_path, base, monkeypatch, before):
    """One that is alone leaves when the next one comes: a model of adapters without any computes nothing."""
    for name in before:
        process.answers(process.row(0, name))
    load = adapters.load_adapter

    def changing(model, folder, **how):
        loaded = load(model, folder, **how)
        replace_adapter(Path(folder), make_run(tmp_path / "other", base, 5))
        monkeypatch.setattr(adapters, "load_adapter", load)
        return loaded

    monkeypatch.setattr(adapters, "load_adapter", changing)
    (refused,) = process.answers(process.row(0, "two"))
    assert isinstance(refused, Unusable) and "changed while it was being loaded" in str(refused)
    assert len(process.host.model.peft_config) == 1
    monkeypatch.setattr("common.serving.run_registry.LOOK", 0.0)
    first, second = process.answers(process.row(0, "one"), process.row(1, "two"))
    same(*first, wanted(runs, "one"))
    same(*second, wanted(runs, "two"))
    assert len(process.host.model.peft_config) == 2


def test_an_adapter_whose_run_was_deleted_takes_no_memory_beside_the_next(process, runs):
    process.answers(process.row(0, "one"))
    shutil.rmtree(runs / "one")
    (row,) = process.answers(process.row(0, "two"))
    same(*row, wanted(runs, "two"))
    assert len(process.host.model.peft_config) == len(process.host.views) == 1
