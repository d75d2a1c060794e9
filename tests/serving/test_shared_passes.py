"""Rows of several adapters on one base share forward passes, and each is answered as by its adapter alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from support.families import ARCHITECTURES, build_architecture
from support.host import Messages
from support.served import ROWS, make_adapter, make_run, make_runs, replace_adapter, same, settings

from common.cli import UserError
from common.models.source import ModelSource
from common.serving import work
from common.serving.adapter_host import Host
from common.serving.batch_queue import QueuedRequest
from common.serving.messages import Answers, KeepVersions, State, Taken
from common.serving.run_registry import Registry, Version
from common.serving.work import Classify, Decide
from common.tasks.ranking import creditmix
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.creditmix import CREDITMIX

pytestmark = pytest.mark.processes

TEXTS = [creditmix.clean_features(row) for row in ROWS]
PROMPTS = [CREDITMIX.prompt(text) for text in TEXTS]
SHARING = {
    "plain": {},
    "wide": {"r": 16, "target_modules": ["k_proj", "v_proj", "o_proj", "up_proj"]},
    "scaled": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj", "gate_proj"]},
    "first_layer": {"layers_to_transform": [0]},
    "with_head": {"target_modules": ["q_proj", "lm_head"]},
}
# Batches of two rows of two adapters and of the base: layers with a state, GPT-2's transposed matrices, and a base
# whose tokenizer transformers saves as another class beside the adapters.
OWN_PASSES = {name: [2, 2, 2] for name in ("qwen3.5", "qwen3.5 with images", "lfm2", "gpt2")} | {"mistral": [4, 2]}
ALONE = {"dora": {"use_dora": True}, "embedding": {"target_modules": ["q_proj", "embed_tokens"]}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base) -> Path:
    """Adapters of several kinds. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, kind in (SHARING | ALONE).items():
        make_adapter(folder / name, base, **kind)
    return folder


@pytest.fixture(scope="module")
def wanted(runs, base) -> dict[str, list[dict]]:
    """The script's answers, by name."""
    return {name: script(str(runs / name) if name != "base" else base) for name in ["base", *SHARING, *ALONE]}


def script(model_dir: str) -> list[dict]:
    classifier = Classifier.load(ModelSource(model_dir), CREDITMIX)
    return classifier.answers_of(classifier.raw_scores(TEXTS), classifier.calibration(None))


class Asked:
    """A model's process, its messages, and what it is asked."""

    def __init__(self, base: str, runs: Path) -> None:
        self.messages, self.registry = Messages(), Registry(str(runs), base)
        self.host = Host(base, settings(runs).host, 3, self.messages)
        self.host.load()
        self.numbers = itertools.count(1)

    def request(self, name: str | Version, payload, kind=None) -> QueuedRequest:
        version = self.registry.find(name) if isinstance(name, str) else name
        return QueuedRequest(next(self.numbers), (version, kind or Classify()), payload, tokens=10)

    def rows(self, names: list) -> list[dict]:
        """The answers to the first row of the first name, the second one of the second, ...; all wait at once."""
        return self.all([self.request(name, [PROMPTS[row]]) for row, name in enumerate(names)], first=True)

    def all(self, requests: list[QueuedRequest], *, first: bool = False) -> list:
        """The answers in the order of the requests.

        Args:
            first: each is a list of one.
        """
        for request in requests:
            self.host.queue.put(request)
        while self.host.queue:
            self.host.begin(self.host.queue.take())
        answers = dict(self.messages.numbered())
        return [answers[request.number][0] if first else answers[request.number] for request in requests]

    def batches(self) -> list[int]:
        """How many requests each batch had since the last look."""
        sizes = [len(message.numbers) for message in self.messages.sent if isinstance(message, Taken)]
        self.messages.sent.clear()
        return sizes


@pytest.fixture(scope="module")
def loaded(runs, base) -> Asked:
    """All that shares and all that does not are loaded."""
    asked = Asked(base, runs)
    asked.rows(["base", *SHARING, *ALONE])
    return asked


def test_rows_of_all_adapters_share_a_pass_and_have_the_answers_of_each(loaded, wanted):
    loaded.batches()
    names = [*SHARING, "base"] * 4
    for row, (name, answer) in enumerate(zip(names, loaded.rows(names), strict=True)):
        same(answer, wanted[name][row])
    assert loaded.batches() == [24]
    assert len({wanted[name][0]["raw_scores"]["Good"] for name in wanted}) == len(wanted)  # so that a mix-up would show


def test_other_kinds_have_passes_of_their_own(loaded, wanted):
    loaded.batches()
    names = ["plain", "dora", "wide", "embedding", "base", "dora"]
    for row, (name, answer) in enumerate(zip(names, loaded.rows(names), strict=True)):
        same(answer, wanted[name][row])
    assert sorted(loaded.batches()) == [1, 2, 3]


def test_rows_by_themselves_are_read_behind_what_their_adapter_made_of_the_start(loaded, wanted):
    for row, name in enumerate([*wanted] * 2):
        (answer,) = loaded.all([loaded.request(name, [PROMPTS[row]])], first=True)
        same(answer, wanted[name][row])
    kept = [view.classifier(CREDITMIX).ranker.prefixes for view in loaded.host.views.values()]
    firsts = [next(iter(prefixes.values())).layers[1].keys for prefixes in kept]
    assert len(firsts) == len(wanted)
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(firsts, 2))


def test_many_rows_in_a_request_and_several_passes(loaded, wanted, monkeypatch):
    """Passes are smaller than the batch, and some have rows of one adapter alone."""
    rows = [loaded.request("plain", PROMPTS[:20]), loaded.request("wide", PROMPTS), loaded.request("base", [])]
    for shown in loaded.host.views.values():
        for classifier in shown._classifiers.values():
            monkeypatch.setattr(classifier.ranker, "max_batch_tokens", 200)
    answers = loaded.all(rows)
    for name, answered in zip(("plain", "wide", "base"), answers, strict=True):
        for answer, expected in zip(answered, wanted[name], strict=False):
            same(answer, expected)
    assert [len(answered) for answered in answers] == [20, 24, 0]


def test_the_first_rows_of_an_adapter_load_it_and_tell_the_server(runs, base, wanted):
    asked = Asked(base, runs)
    names = ["plain", "wide", "base", "plain"]
    for row, (name, answer) in enumerate(zip(names, asked.rows(names), strict=True)):
        same(answer, wanted[name][row])
    assert set(asked.messages.last(State).views.values()) == {True}
    assert sum(asked.batches()) == 4


def test_other_questions_do_not_share_a_batch(loaded):
    loaded.batches()
    own, prior = Decide(CREDITMIX.text, "own"), Decide(CREDITMIX.text, "prior")
    kinds = [("plain", own), ("wide", own), ("plain", prior), ("base", prior), ("wide", Classify(CREDITMIX.text))]
    requests = [loaded.request(name, PROMPTS[row], kind) for row, (name, kind) in enumerate(kinds[:4])]
    requests.append(loaded.request("wide", [PROMPTS[4]], kinds[4][1]))
    answers = loaded.all(requests)
    assert loaded.batches() == [2, 2, 1]
    for request, answer in zip(requests, answers, strict=True):
        (alone,) = loaded.all([loaded.request(request.key[0], request.payload, request.key[1])])
        if isinstance(alone, list):
            same(*answer, *alone)
        else:
            assert answer.probabilities == pytest.approx(alone.probabilities, abs=1e-4)
            assert (answer.chosen, answer.calibration, answer.tokens) == (
                alone.chosen,
                alone.calibration,
                alone.tokens,
            )


def test_versions_of_a_run_share_a_pass(tmp_path, base, monkeypatch):
    """An adapter is replaced on the disk: who asked for the old one has its answer beside those of the new one."""
    monkeypatch.setattr("common.serving.run_registry.LOOK", 0.0)
    runs = make_runs(tmp_path / "runs", base)
    asked = Asked(base, runs)
    old, expected = asked.registry.find("sft"), {"old": script(str(runs / "creditmix_sft"))}
    asked.rows(["sft", "kd"])
    replace_adapter(runs / "creditmix_sft", make_run(tmp_path / "other", base, seed=9))
    expected["new"], expected["kd"] = script(str(runs / "creditmix_sft")), script(str(runs / "creditmix_kd"))
    new = asked.registry.find("sft")
    assert new != old
    asked.host.channel.coming = [KeepVersions(new.name, asked.registry.versions(new.name))]
    asked.host.receive(0)
    asked.rows([new])
    asked.batches()
    names = ["old", "kd", "new", "old", "new"]
    answers = asked.rows([{"old": old, "new": new}.get(name, name) for name in names])
    assert asked.batches() == [5]
    for row, (name, answer) in enumerate(zip(names, answers, strict=True)):
        same(answer, expected[name][row])


def test_a_bad_row_harms_itself_alone(loaded, wanted):
    loaded.batches()
    requests = [loaded.request("plain", [PROMPTS[0]]), loaded.request("wide", ["x " * 20_000])]
    requests += [loaded.request("wide", [PROMPTS[2]]), loaded.request("base", [PROMPTS[3]])]
    answers = loaded.all(requests)
    assert isinstance(answers[1], UserError) and "shorten the row" in str(answers[1])
    (sent,) = [message for message in loaded.messages.sent if isinstance(message, Answers)]
    assert len(sent.numbers) == 4  # none was begun again by itself
    for row, name in ((0, "plain"), (2, "wide"), (3, "base")):
        same(*answers[row], wanted[name][row])
    loaded.batches()
    loaded.rows(["plain", "wide"])
    assert loaded.batches() == [2]  # they share passes as before


def test_rows_that_are_too_long_are_refused_and_no_others(loaded, wanted):
    decide = Decide(CREDITMIX.text, "prior")
    long = "x " * 20_000
    loaded.batches()
    asked = [([PROMPTS[0], PROMPTS[1]], None), ([PROMPTS[2], long], None), ([long], None), ([PROMPTS[3]], None)]
    asked += [(PROMPTS[0], decide), (long, decide), (PROMPTS[1], decide)]
    answers = loaded.all([loaded.request("plain", *each) for each in asked])
    assert [isinstance(answer, UserError) for answer in answers] == [False, True, True, False, False, True, False]
    assert [str(answers[row]).split(" has")[0] for row in (1, 2, 5)] == ["row 2", "row 1", "row 1"]
    for answer, row in zip([*answers[0], *answers[3]], (0, 1, 3), strict=True):
        same(answer, wanted["plain"][row])
    assert answers[4].tokens != answers[6].tokens
    assert len([message for message in loaded.messages.sent if isinstance(message, Answers)]) == 2
    assert all(isinstance(each, UserError) for each in loaded.all([loaded.request(n, [long]) for n in SHARING]))


def test_a_run_that_cannot_be_used_harms_itself_alone(runs, base, wanted, monkeypatch):
    asked = Asked(base, runs)
    asked.rows(["plain", "wide"])
    ready = work._ready

    def broken(view, text):
        if view.version.name == "wide":
            raise work.Unusable("its calibration is broken")
        return ready(view, text)

    monkeypatch.setattr(work, "_ready", broken)
    first, second = asked.all([asked.request("plain", [PROMPTS[0]]), asked.request("wide", [PROMPTS[0]])])
    same(*first, wanted["plain"][0])
    assert isinstance(second, work.Unusable)


def test_a_base_on_which_it_fails_goes_on_adapter_by_adapter(runs, base, wanted, monkeypatch, capsys):
    asked = Asked(base, runs)
    asked.rows(["plain", "wide"])
    asked.batches()

    def failing(rankings):
        raise ValueError("a layer has 40 rows, in segments of [1, 1]")

    monkeypatch.setattr("common.serving.adapter_host.rank_together", failing)
    for _ in range(2):
        for row, (name, answer) in enumerate(zip(("plain", "wide"), asked.rows(["plain", "wide"]), strict=True)):
            same(answer, wanted[name][row])
    assert asked.batches() == [2, 1, 1]  # it is tried once
    assert "have passes of their own from now on" in capsys.readouterr().err


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_share_passes_or_keep_their_own(tmp_path, tokenizer, name):
    base = build_architecture(name, tmp_path / "base", tokenizer)
    names = ["one", "two", "base"]
    for seed, run in enumerate(names[:2]):
        make_run(tmp_path / "runs" / run, base, seed, r=2 + seed)
    expected = {run: script(base if run == "base" else str(tmp_path / "runs" / run)) for run in names}
    asked = Asked(base, tmp_path / "runs")
    asked.rows(names)
    asked.batches()
    rows = names * 2
    for row, (run, answer) in enumerate(zip(rows, asked.rows(rows), strict=True)):
        same(answer, expected[run][row])
    assert asked.batches() == OWN_PASSES.get(name, [6])
    assert len({expected[run][0]["raw_scores"]["Good"] for run in names}) == 3
