"""Texts leave a model's process as they end, and requests enter while others are being written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.host import Later
from support.models import build_base
from support.served import settings

from common.cli import UserError
from common.generation.decoding import Decoding
from common.generation.generate import generate
from common.models import tokenizers
from common.serving.adapter_host import Host
from common.serving.batch_queue import QueuedRequest
from common.serving.messages import Answers, Taken, Withdraw
from common.serving.run_registry import Registry
from common.serving.texts import TextSession
from common.serving.work import Chat, ChatTurn, Extract, WriteCode
from common.tasks.codegen.writer import CodeAnswer

pytestmark = pytest.mark.processes

ASKED = {"temperature": 0.0, "top_p": 1.0, "samples": 1, "seed": 0, "stop": (), "schema": None}
SCHEMA = json.dumps({"type": "object", "properties": {"a": {"type": "string", "maxLength": 40}}, "required": ["a"]})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def host(tmp_path_factory, tokenizer, runs):
    folder = build_base(tmp_path_factory.mktemp("base") / "tiny", tokenizer)
    host = Host(folder, settings(runs, base_model=folder).host, 0, Later())
    host.load()
    return host


@pytest.fixture
def channel(host) -> Later:
    host.channel = Later()
    return host.channel


@pytest.fixture(scope="module")
def version(host, runs):
    return Registry(str(runs), host.base).find("base")


def chat(number: int, version, words: str, max_tokens: int, **changes) -> QueuedRequest:
    work = Chat(max_tokens, **ASKED | {key: changes.pop(key) for key in [*changes] if key in ASKED})
    return QueuedRequest(
        number, (version, work), ChatTurn([{"role": "user", "content": words}]), urgent=False, **changes
    )


def begin(host: Host, *batch: QueuedRequest) -> dict:
    """Do a batch, and all that comes of the queue meanwhile."""
    host.begin([*batch])
    while host.queue:
        host.begin(host.queue.take())
    return dict(host.channel.numbered())


def test_each_answer_leaves_as_it_ends(host, channel, version):
    begin(host, *(chat(number, version, "word " * (6 - number), 60) for number in range(4)))
    sent = [message for message in channel.sent if isinstance(message, Answers)]
    assert sorted(number for message in sent for number in message.numbers) == [0, 1, 2, 3]
    assert [message.beside for message in sent] == [3, 2, 1, 0]


def test_requests_enter_while_others_are_written(host, channel, version):
    """Each gets what it gets alone."""
    first, second = (chat(number, version, text, 40) for number, text in enumerate(("one", "two")))
    third = chat(2, version, "and a third one", 40)
    channel.later[5] = [second]
    channel.later[9] = [third]
    answers = begin(host, first)
    taken = [message.numbers for message in channel.sent if isinstance(message, Taken)]
    assert taken == [[0], [1], [2]]
    kinds = [type(message) for message in channel.sent if isinstance(message, Taken | Answers)]
    assert kinds == [Taken] * 3 + [Answers] * 3
    for number, request in enumerate((first, second, third)):
        prompt = tokenizers.encode_chat(host.views[version].tokenizer, request.payload.messages)
        ((alone,),) = generate(host.model, host.views[version].tokenizer, [prompt], Decoding(40))
        assert answers[number].choices[0].text == alone.text and answers[number].prompt_tokens == len(prompt)


def test_what_waits_for_a_batch_of_its_own_has_its_turn(host, channel, version):
    """A version that is not loaded yet."""
    first = chat(0, version, "one", 30)
    channel.later[3] = [chat(1, replace(version, name="other"), "two", 30)]
    channel.later[4] = [chat(2, version, "late", 30)]
    begin(host, first)
    assert [number for number, _ in channel.numbered()] == [0, 1, 2]


def test_other_works_and_settings_enter_too(host, channel, version):
    channel.later[3] = [QueuedRequest(1, (version, WriteCode(False, 8)), "add", urgent=False)]
    channel.later[5] = [chat(2, version, "late", 4, temperature=1.0)]
    assert begin(host, chat(0, version, "one", 30)).keys() == {0, 1, 2}
    assert channel.numbered()[-1][0] == 0


def test_there_is_no_more_in_a_batch_than_its_tokens_allow(host, channel, version):
    most = host.settings.max_batch_tokens
    first, large = chat(0, version, "one", 30, tokens=most // 2), chat(1, version, "two", 30, tokens=most)
    channel.later[3] = [large]
    begin(host, first)
    order = [(type(message).__name__, message.numbers) for message in channel.sent if hasattr(message, "numbers")]
    assert order == [("Taken", [0]), ("Answers", [0]), ("Taken", [1]), ("Answers", [1])]


def test_a_bad_one_that_enters_harms_itself_alone(host, channel, version):
    context = host.model.config.max_position_embeddings
    channel.later[3] = [chat(1, version, "too long " * context, 30)]
    channel.later[5] = [chat(2, version, "fine", 30)]
    answers = begin(host, chat(0, version, "one", 30))
    assert isinstance(answers[1], UserError) and "does not fit the model's context" in str(answers[1])
    assert answers[0].choices and answers[2].choices
    code = (version, WriteCode(True, 30))
    channel.later[channel.looks + 3] = [QueuedRequest(4, code, "x" * 9 * context, urgent=False)]
    channel.later[channel.looks + 5] = [QueuedRequest(5, code, "fine", urgent=False)]
    answers = begin(host, QueuedRequest(3, code, "one", urgent=False))
    assert isinstance(answers[4], UserError) and {type(answers[3]), type(answers[5])} == {CodeAnswer}


def test_a_chat_that_the_template_refuses_disturbs_no_other(host, channel, version, monkeypatch):
    """What is half written goes on, and is not begun again."""
    encode, read = tokenizers.encode_chat, []

    def refusing(tokenizer, messages, **how):
        read.append(messages[0]["content"])
        if read[-1] == "bad":
            raise UserError("the template refuses the order of the roles")
        return encode(tokenizer, messages, **how)

    monkeypatch.setattr(tokenizers, "encode_chat", refusing)
    for look in (3, 5, 7):
        channel.later[look] = [chat(look, version, "bad", 30)]
    answers = begin(host, chat(0, version, "one", 30))
    assert read == ["one", "bad", "bad", "bad"]
    assert answers[0].choices and all(isinstance(answers[look], UserError) for look in (3, 5, 7))


def test_a_batch_that_is_done_again_one_by_one_lets_nobody_in(host, channel, version, monkeypatch):
    works, write = [], TextSession.write

    def failing(self):
        works.append(len(self.requests))
        if len(works) == 1:
            raise RuntimeError("no kernel")
        write(self)

    monkeypatch.setattr(TextSession, "write", failing)
    monkeypatch.setattr(host, "_mixes", True)  # and not so any more then
    channel.later[3] = [chat(2, version, "late", 30)]
    answers = begin(host, chat(0, version, "one", 30), chat(1, version, "two", 30))
    assert works == [2, 1, 1, 1] and all(answers[number].choices for number in range(3))


def test_documents_and_code_enter_too(host, channel, version):
    for number, (work, texts) in enumerate(
        ((Extract(SCHEMA, 60), ("a b c", "d", "e f")), (WriteCode(True, 12), ("add", "multiply", "sort")))
    ):
        requests = [QueuedRequest(10 * number + index, (version, work), text, urgent=False)
                    for index, text in enumerate(texts)]  # fmt: skip
        channel.later[channel.looks + 3] = requests[1:2]
        channel.later[channel.looks + 5] = requests[2:]
        answers = begin(host, requests[0])
        for request in requests:
            host.channel = Later()
            assert begin(host, request)[request.number] == answers[request.number]
        host.channel = channel


def test_nobody_waits_any_more_for_one_that_entered(host, channel, version):
    """Work ends once that holds for all that is not answered."""
    channel.later[3] = [chat(1, version, "two", 400)]
    channel.later[6] = [Withdraw(0), Withdraw(1)]
    host.begin([chat(0, version, "one", 400)])
    assert channel.looks < 10
    assert {type(answer).__name__ for answer in channel.answers()} == {"Abandoned"}
