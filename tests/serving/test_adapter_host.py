"""A model's process from the inside: memory before loading, 4 bits, adapters that leave."""

from __future__ import annotations

import pytest
import torch
from support.host import Messages, run_host
from support.served import ROWS, make_run, make_runs, replace_adapter, settings

from common.cli import UserError
from common.models import adapters, loading
from common.models.source import ModelSource
from common.serving.adapter_host import Host
from common.serving.batch_queue import QueuedRequest
from common.serving.messages import Broken, KeepVersions, State, Withdraw
from common.serving.run_registry import Registry
from common.serving.work import Classify
from common.tasks.ranking import creditmix
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.creditmix import CREDITMIX
from common.vram import preflight as vram

pytestmark = pytest.mark.processes

PROMPT = CREDITMIX.prompt(creditmix.clean_features(ROWS[0]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base):
    """Not to be changed."""
    return make_runs(tmp_path_factory.mktemp("serve") / "runs", base)


def serve(base: str, runs, versions, *, adapters: int = 3, **changes) -> Messages:
    """The messages of a process that is asked for the first row by each version, and closed."""
    asked = [((version, Classify()), [PROMPT]) for version in versions]
    return run_host(base, settings(runs, **changes).host, asked, adapters)


def retrain(host: Host, registry: Registry, base: str, folder, times: int, abandoned: int = 0) -> None:
    """Replace creditmix_sft so many times, each asked for a row; nobody waits for the request `abandoned` any more."""
    for seed in range(times):
        other = make_run(folder / f"other{seed}", base, seed=10 + seed)
        replace_adapter(folder / "runs" / "creditmix_sft", other)
        version = registry.find("sft")
        host.channel.coming = [KeepVersions(version.name, registry.versions(version.name)), Withdraw(abandoned)]
        host.receive(0)
        host.begin([QueuedRequest(100 + seed, (version, Classify()), [PROMPT])])


def test_too_little_memory_is_said_before_loading(base, runs, monkeypatch):
    registry = Registry(str(runs), base)
    assert registry.adapters_of(base) == 3
    monkeypatch.setattr(vram, "free_bytes", lambda: 10_000)
    monkeypatch.setattr("common.models.loading.load_base", lambda *args, **kwargs: pytest.fail("loaded"))
    messages = serve(base, runs, [registry.find("sft")])
    assert [type(message) for message in messages.sent] == [Broken]
    assert "GB are needed, 0.0 are free, and no settings need less than" in messages.sent[0].reason


@pytest.mark.parametrize("auto_fit", [False, True])
def test_a_batch_that_is_too_large_for_the_memory(auto_fit, base, runs, monkeypatch):
    """By default it is an error that names what would fit; with AUTO_FIT=1 that is taken."""
    wanted = vram.predict(vram.replace(vram.inference_plan(ModelSource(base), max_batch_tokens=8192), adapters=3))
    monkeypatch.setattr(vram, "free_bytes", lambda: wanted.total - 1)
    version = Registry(str(runs), base).find("sft")
    messages = serve(base, runs, [version], max_batch_tokens=8192, auto_fit=auto_fit)
    if auto_fit:
        assert messages.answers()[0][0]["prediction"] in CREDITMIX.labels
    else:
        assert messages.sent[0].reason.endswith("are free; MAX_BATCH_TOKENS=4096")


def test_a_base_in_4_bits_answers_as_the_script_in_4_bits(base, runs):
    version = Registry(str(runs), base).find("kd")
    ((answer,),) = serve(base, runs, [version], load_in_4bit="on").answers()
    classifier = Classifier.load(ModelSource(version.model_dir, load_in_4bit="on"), CREDITMIX)
    (wanted,) = classifier.answers([creditmix.clean_features(ROWS[0])], classifier.calibration(None))
    for key in ("raw_scores", "prior", "scores"):
        assert answer[key] == pytest.approx(wanted[key], abs=1e-4)
    exact = Classifier.load(ModelSource(version.model_dir), CREDITMIX).raw_scores([creditmix.clean_features(ROWS[0])])[
        0
    ]
    assert abs(exact[0] - wanted["raw_scores"]["Good"]) > 1e-4  # it was in 4 bits


class Exhausting(Classify):
    """More than two rows at once are too many, and so is any long one."""

    def run(self, view, payloads):
        if len(payloads) > 2 or any(payload == ["long"] for payload in payloads):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return payloads


def test_a_batch_that_runs_out_of_memory_is_done_row_by_row(base, runs):
    messages = Messages()
    host = Host(base, settings(runs).host, 3, messages)
    host.load()
    version = Registry(str(runs), base).find("sft")
    rows = [["a"], ["long"], ["b"]]
    host.begin([QueuedRequest(number, (version, Exhausting()), row) for number, row in enumerate(rows)])
    first, long, last = messages.answers()
    assert (first, last) == (["a"], ["b"])
    assert type(long) is UserError
    assert "send less text in one request, or lower MAX_BATCH_TOKENS" in str(long)


def test_an_adapter_that_is_at_work_stays_whatever_comes_between(base, tmp_path, monkeypatch):
    """A long text is not finished by the bare base because its adapter was trained again meanwhile, three times."""
    monkeypatch.setattr("common.serving.run_registry.LOOK", 0.0)
    runs = make_runs(tmp_path / "runs", base)
    registry = Registry(str(runs), base)
    messages = Messages()
    host = Host(base, settings(runs).host, 3, messages)
    host.load()

    class Long(Classify):
        """Between its steps other versions of its run are asked for."""

        def run(self, view, payloads):
            retrain(host, registry, base, tmp_path, times=4, abandoned=7)
            return [[view.adapter in host.model.peft_config] for _ in payloads]

    host.begin([QueuedRequest(7, (registry.find("sft"), Long()), [PROMPT])])
    assert messages.answers()[-1] == [True]
    assert len(host.views) == 4


def test_versions_that_left_the_registry_leave_memory(base, tmp_path, monkeypatch):
    monkeypatch.setattr("common.serving.run_registry.LOOK", 0.0)
    runs = make_runs(tmp_path / "runs", base)
    registry = Registry(str(runs), base)
    messages = Messages()
    host = Host(base, settings(runs).host, 3, messages)
    host.load()
    retrain(host, registry, base, tmp_path, times=5)
    assert len({answer["raw_scores"]["Good"] for (answer,) in messages.answers()}) == 5
    assert len(host.model.peft_config) == len(host.views) == 3
    state = messages.last(State)
    fingerprint = adapters.fingerprint(loading.load_base(ModelSource(base)))
    assert state == State(fingerprint, dict.fromkeys(host.views, True), 0)
