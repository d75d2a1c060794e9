"""Texts of several adapters and tasks on one base are written together, each as by its adapter alone."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.families import ARCHITECTURES, build_architecture
from support.host import Later, answers_to
from support.models import build_base
from support.served import ROWS, make_adapter, make_run, same, settings

from common.generation import aligned_cache
from common.generation.answer_streamer import AnswerStreamer
from common.generation.continuous_batch import ContinuousBatch
from common.generation.decoding import Decoding
from common.generation.generate import generate
from common.generation.json_grammar import JsonGrammar, JsonRow
from common.generation.json_schema import preflight
from common.generation.rows import RevisableRows
from common.models import loading, tokenizers
from common.models.source import LoadedModel, ModelSource
from common.serving.adapter_host import Host
from common.serving.batch_queue import QueuedRequest
from common.serving.messages import Abandoned, Answers, Fault, Taken, Text, Withdraw
from common.serving.run_registry import Registry
from common.serving.texts import TextSession
from common.serving.work import Chat, ChatTurn, Classify, Extract, WriteCode
from common.tasks.codegen.code_batch import CodeBatch
from common.tasks.codegen.writer import CodeWriter, style_of
from common.tasks.idp.answer_form import form_of
from common.tasks.idp.extractor import ExtractionSettings, Extractor
from common.tasks.ranking import creditmix
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.creditmix import CREDITMIX

pytestmark = pytest.mark.processes

SHARING = ("plain", "wide", "first_layer")
ALONE = {"dora": {"use_dora": True}, "with_head": {"target_modules": ["q_proj", "lm_head"]}}
SCHEMA = {
    "type": "object",
    "properties": {"number": {"type": "string", "maxLength": 12}, "paid": {"type": "boolean"}},
    "required": ["number", "paid"],
    "additionalProperties": False,
}
ASKED = {"max_tokens": 24, "temperature": 0.0, "top_p": 1.0, "samples": 1, "seed": 0, "stop": (), "schema": None}
MESSAGES = [{"role": "user", "content": "Age: 23, Occupation: Scientist"}]
TASK, DOCUMENT = "Write a function that adds.", "Invoice 77 of 2025-10-01\nPaid: yes"
WORKS = {
    "chat": Chat(**ASKED),
    "drawn": Chat(**ASKED | {"temperature": 1.0, "top_p": 0.9, "samples": 2, "seed": 3}),
    "json": Chat(**ASKED | {"max_tokens": 40, "schema": json.dumps(SCHEMA)}),
    "code": WriteCode(False, 20),
    "planned": WriteCode(True, 12),
    "document": Extract(json.dumps(SCHEMA), 40, confidence=True),
}
# Whose layers do not let several adapters share a step: tasks share one all the same.
OWN_STEPS = {"mistral", "qwen3.5", "qwen3.5 with images", "lfm2", "gemma3", "gemma3 with images", "gpt2"}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> str:
    """One on which adapters write other texts."""
    return build_base(tmp_path_factory.mktemp("base") / "tiny", tokenizer)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base) -> Path:
    """Adapters of several kinds. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("plain", "wide"), start=1):
        make_run(folder / name, base, seed, r=4 * seed**2, spread=1.0)
    for name, kind in ({"first_layer": {"layers_to_transform": [0]}} | ALONE).items():
        make_adapter(folder / name, base, **kind)
    return folder


class Script:
    """What the scripts write with one model."""

    def __init__(self, model_dir: str) -> None:
        self.model_dir = model_dir
        self.model, self.tokenizer = loading.load_for_inference(ModelSource(model_dir))
        self.loaded = LoadedModel(self.model, self.tokenizer, 8192)

    def write(self, kind: str) -> Any:
        work = WORKS[kind]
        if isinstance(work, Chat):
            decoding = Decoding(work.max_tokens, work.temperature, work.top_p, work.samples, work.seed)
            columns, grammar = self.model.config.get_text_config().vocab_size, None
            if work.schema:
                schema, spaced = preflight(SCHEMA).grammar_schema, form_of(self.model_dir).spaced
                grammar = JsonGrammar(schema, self.tokenizer, columns, spaced=spaced).rows(work.max_tokens)
            prompt = tokenizers.encode_chat(self.tokenizer, MESSAGES)
            (answers,) = generate(self.model, self.tokenizer, [prompt], decoding, steering=grammar)
            return [answer.text for answer in answers]
        if isinstance(work, WriteCode):
            writer = CodeWriter(self.loaded, style_of(self.model_dir, self.tokenizer)[0])
            ((_, (written,)),) = writer.write_each([TASK], Decoding(work.max_new_tokens), work.plan_then_code)
            return written.plan, written.code
        form = form_of(self.model_dir)
        extractor = Extractor(self.loaded, SCHEMA, preflight(SCHEMA), ExtractionSettings(work.max_new_tokens), form)
        return read(extractor.extract([DOCUMENT], confidence=True)[0])


def read(answer: Any) -> Any:
    """What of an answer is to be the same as the script's."""
    if hasattr(answer, "choices"):
        return [choice.text for choice in answer.choices]
    if hasattr(answer, "code"):
        return answer.plan, answer.code
    confidences = {name: pytest.approx(value, abs=1e-4) for name, value in answer.confidence.items()}
    return answer.text, answer.value, answer.error, confidences


@pytest.fixture(scope="module")
def wanted(runs, base):
    """The script's answer of a run to a kind of request."""
    script = cache(lambda name: Script(base if name == "base" else str(runs / name)))
    return cache(lambda name, kind: script(name).write(kind))


class Asked:
    """A model's process, its messages, and what it is asked."""

    def __init__(self, base: str, runs: Path, names: Sequence[str]) -> None:
        self.registry = Registry(str(runs), base)
        self.host = Host(base, settings(runs).host, 3, Later())
        self.host.load()
        self.passes = 0
        self.host.model.register_forward_pre_hook(self._count)
        self.all([self.request(number, name, "code") for number, name in enumerate(names)])  # all are loaded

    def _count(self, *_) -> None:
        self.passes += 1

    def request(self, number: int, name: str, kind: str, **changes) -> QueuedRequest:
        payload = {"chat": ChatTurn(MESSAGES), "codegen": TASK, "idp": DOCUMENT}[WORKS[kind].name]
        return QueuedRequest(number, (self.registry.find(name), WORKS[kind]), payload, urgent=False, **changes)

    def all(self, requests: Sequence[QueuedRequest], later: dict[int, list] | None = None) -> dict[int, Any]:
        """See `answers_to`."""
        return answers_to(self.host, requests, later)

    def sent(self, *kinds: type) -> list:
        return [message for message in self.host.channel.sent if isinstance(message, kinds)]

    def batches(self) -> list[int]:
        return [len(message.numbers) for message in self.sent(Taken)]


@pytest.fixture(scope="module")
def asked(runs, base) -> Asked:
    return Asked(base, runs, ["base", *SHARING, *ALONE])


def same_texts(answers: dict[int, Any], pairs: Sequence[tuple[str, str]], wanted) -> None:
    for number, pair in enumerate(pairs):
        assert read(answers[number]) == wanted(*pair), pair


def test_all_adapters_and_tasks_share_steps_and_have_the_answers_of_each(asked, wanted):
    pairs = [(name, kind) for kind in WORKS for name in ("base", *SHARING)]
    asked.passes = 0
    answers = asked.all([asked.request(number, *pair) for number, pair in enumerate(pairs)])
    assert asked.batches() == [24]
    same_texts(answers, pairs, wanted)
    for kind in ("chat", "drawn", "code", "document"):  # so that a mix-up would show
        assert len({str(wanted(name, kind)) for name in ("base", "plain", "wide")}) == 3
    together, asked.passes = asked.passes, 0
    for number, pair in enumerate(pairs):
        asked.all([asked.request(number, *pair)])
    assert together < asked.passes / 3


def test_requests_enter_while_others_are_written(asked, wanted):
    pairs = [("plain", "chat"), ("wide", "document"), ("base", "planned"), ("plain", "json"), ("wide", "drawn")]
    first, *others = [asked.request(number, *pair) for number, pair in enumerate(pairs)]
    answers = asked.all([first], {3 + 2 * number: [request] for number, request in enumerate(others)})
    assert asked.batches() == [1] * 5
    order = [(type(message), *message.numbers) for message in asked.sent(Taken, Answers)]
    assert order.index((Answers, 0)) > order.index((Taken, 4))
    same_texts(answers, pairs, wanted)


def test_rows_of_labels_go_between_the_steps(asked, wanted, runs):
    """Which have the adapters of their own then, and not those of the step that they interrupt."""
    texts = [creditmix.clean_features(row) for row in ROWS[:2]]
    prompts, labels = [CREDITMIX.prompt(text) for text in texts], {}
    for name in ("plain", "wide"):
        classifier = Classifier.load(ModelSource(str(runs / name)), CREDITMIX)
        labels[name] = classifier.answers_of(classifier.raw_scores(texts), classifier.calibration(None))
    pairs = [("plain", "chat"), ("wide", "chat"), ("base", "chat")]
    rows = [QueuedRequest(10 + n, (asked.registry.find(name), Classify()), [prompts[n]], tokens=10)
            for n, name in enumerate(labels)]  # fmt: skip
    later = {2: rows[:1], 8: rows[1:], 12: [QueuedRequest(12, rows[0].key, prompts, tokens=10)]}
    answers = asked.all([asked.request(number, *pair) for number, pair in enumerate(pairs)], later)
    assert [number for number, _ in asked.host.channel.numbered()][:3] == [10, 11, 12]
    same_texts(answers, pairs, wanted)
    for answer, expected in zip(answers[10] + answers[11] + answers[12],
                                [labels["plain"][0], labels["wide"][1], *labels["plain"]], strict=True):  # fmt: skip
        same(answer, expected)


def test_one_that_nobody_waits_for_leaves_the_others(asked, wanted):
    pairs = [("plain", "drawn"), ("plain", "chat"), ("wide", "document")]
    later = {8: [Withdraw(0)]}
    answers = asked.all([asked.request(number, *pair) for number, pair in enumerate(pairs)], later)
    order = [number for number, _ in asked.host.channel.numbered()]
    assert order.index(0) < order.index(1) and isinstance(answers[0], Abandoned)
    same_texts({number: answers[number + 1] for number in range(2)}, pairs[1:], wanted)


def test_one_that_fails_harms_itself_alone(asked, wanted, monkeypatch):
    def broken(self, question, number, generation):
        raise RuntimeError("a bug")

    monkeypatch.setattr(CodeBatch, "take", broken)
    pairs = [("plain", "code"), ("plain", "chat"), ("wide", "json")]
    answers = asked.all([asked.request(number, *pair) for number, pair in enumerate(pairs)])
    assert isinstance(answers[0], Fault) and "a bug" in str(answers[0])
    same_texts({number: answers[number + 1] for number in range(2)}, pairs[1:], wanted)
    assert asked.batches() == [3] and asked.host._mixes


@pytest.mark.parametrize("broken", [(JsonRow, "narrow"), (JsonRow, "consume"), (AnswerStreamer, "end")])
def test_one_whose_grammar_or_stream_fails_leaves_the_others_going(asked, wanted, monkeypatch, broken):
    """And has given back what it had in memory when they have ended."""

    def fail(*given):
        raise RuntimeError("a bug")

    monkeypatch.setattr(*broken, fail)
    begun, make, caches = [], aligned_cache.empty_cache, []
    write = TextSession.write
    monkeypatch.setattr(TextSession, "write", lambda self: (begun.append(len(self.requests)), write(self)))

    def watched(config):
        cache = make(config)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(aligned_cache, "empty_cache", watched)
    pairs = [("plain", "json"), ("plain", "chat"), ("wide", "code")]
    requests = [asked.request(number, *pair) for number, pair in enumerate(pairs)]
    requests[0].payload = ChatTurn(MESSAGES, stream=True)
    gc.collect()
    gc.disable()
    try:
        answers = asked.all(requests)
    finally:
        gc.enable()
    assert isinstance(answers[0], Fault) and "a bug" in str(answers[0])
    same_texts({number: answers[number + 1] for number in range(2)}, pairs[1:], wanted)
    assert begun == [3] and caches and not any(cache() for cache in caches)


def test_a_base_whose_shared_steps_fail_goes_on_adapter_by_adapter(asked, wanted, monkeypatch, capsys):
    step, shared = RevisableRows.step, []

    def failing(self, rows):
        shared.append(len({row.adapter for row in rows}) > 1)
        if shared[-1] and len(shared) > 4:
            raise ValueError("a layer has 40 rows, in segments of [1, 1]")
        return step(self, rows)

    monkeypatch.setattr(RevisableRows, "step", failing)
    monkeypatch.setattr(asked.host, "_mixes", True)  # and not so any more then
    pairs = [("plain", "chat"), ("wide", "chat"), ("wide", "json")]
    streamed = ChatTurn(MESSAGES, stream=True)
    for _ in range(2):
        requests = [asked.request(number, *pair) for number, pair in enumerate(pairs)]
        requests[0].payload = streamed
        same_texts(asked.all(requests), pairs, wanted)
        assert "".join(message.text for message in asked.sent(Text)) == wanted(*pairs[0])[0]  # not once more
    assert asked.batches() == [1, 2] and sum(shared) == 5  # it is tried once
    assert "have passes of their own from now on" in capsys.readouterr().err


def test_a_text_is_sent_as_it_comes_beside_others(asked, wanted):
    pairs = [("plain", "chat"), ("wide", "json"), ("base", "chat")]
    requests = [asked.request(number, *pair) for number, pair in enumerate(pairs)]
    for number in (0, 2):
        requests[number].payload = ChatTurn(MESSAGES, stream=True)
    same_texts(asked.all(requests), pairs, wanted)
    for number in (0, 2):
        parts = [message.text for message in asked.sent(Text) if message.number == number]
        assert len(parts) > 3 and "".join(parts) == wanted(*pairs[number])[0]


def test_other_kinds_of_adapters_have_batches_of_their_own(asked, wanted):
    pairs = [(name, kind) for kind in ("chat", "json") for name in ("plain", "dora", "with_head", "wide")]
    answers = asked.all([asked.request(number, *pair) for number, pair in enumerate(pairs)])
    same_texts(answers, pairs, wanted)
    assert asked.batches() == [4, 2, 2]  # with the tasks of one in the same


def test_a_budget_holds_for_all_together(asked, wanted, monkeypatch):
    """Rows that outgrow it are set aside, and go on later."""
    monkeypatch.setattr(ContinuousBatch, "_has_room", lambda self, entering: True)
    pairs = [(name, "chat") for name in SHARING] + [("base", "json")]
    longest = len(tokenizers.encode_chat(asked.host._tokenizer(asked.host.base), MESSAGES)) + 12
    monkeypatch.setattr(asked.host, "settings", settings("", max_batch_tokens=3 * longest).host)
    same_texts(asked.all([asked.request(number, *pair) for number, pair in enumerate(pairs)]), pairs, wanted)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_share_steps_or_keep_their_own(tmp_path, tokenizer, name):
    base = build_architecture(name, tmp_path / "base", tokenizer)
    for seed, run in enumerate(("one", "two")):
        make_run(tmp_path / "runs" / run, base, seed, r=2 + seed, spread=1.0)
    scripts = {run: Script(base if run == "base" else str(tmp_path / "runs" / run)) for run in ("one", "two", "base")}
    pairs = [(run, kind) for kind in ("chat", "code") for run in scripts]
    asked = Asked(base, tmp_path / "runs", list(scripts))
    answers = asked.all([asked.request(number, *pair) for number, pair in enumerate(pairs)])
    same_texts(answers, pairs, lambda run, kind: scripts[run].write(kind))
    assert asked.batches() == ([2, 2, 2] if name in OWN_STEPS else [6])
