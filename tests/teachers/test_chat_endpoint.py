"""A teacher behind an endpoint: a real local HTTP server that misbehaves, and this project's own."""

from __future__ import annotations

import email.utils
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from support.inputs import CORPUS, LABELS, ROOT
from support.processes import LONGEST, wait_for
from support.served import make_runs, serve
from support.teacher import CUT, HANG, error, generate, lines, numbered, question_of, rejects_of, run_of

import teacher_generate
from common import cli
from common.cli import UserError
from common.data import rows as records
from common.files import sha256_file
from common.generation import generate as generation
from common.generation.decoding import Decoding
from common.models import loading as models
from common.models import tokenizers
from common.models.source import ModelSource
from common.tasks.ranking.creditmix import CREDITMIX
from common.teachers import chat_endpoint
from common.teachers.settings import EndpointSettings

KEY = "sk-secret-4711"


def test_rows_keep_their_order_and_what_they_carry(stub, files, capsys):
    """The first rows are answered last; four requests are under way at once."""
    rows = numbered(8)
    for index, row in enumerate(rows):
        row |= {"output": "Good", "group": f"{index:016x}", "id": index, "note": "not carried"}
    together, most = [0], [0]
    lock = threading.Lock()

    def reply(body):
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        index = [row["input"] for row in rows].index(question_of(body))
        wait_for(lambda: most[0] == 4)
        time.sleep(0.02 * (8 - index))
        with lock:
            together[0] -= 1
        return LABELS[index % 3]

    stub.reply = reply
    assert generate(stub, *files(rows), "--concurrency", "4", "--price_in", "2", "--price_out", "10") == 0
    assert most[0] == 4
    assert lines(files.out) == [
        {
            "input": row["input"],
            "teacher_output": LABELS[index % 3],
            "id": index,
            "output": "Good",
            "group": row["group"],
        }
        for index, row in enumerate(rows)
    ]
    assert len(records.read_rows(files.out, records.KD_KEYS)) == 8  # as kd_train.py reads them
    taught = CREDITMIX.read_teacher(files.out)  # as creditmix_prepare.py --teacher_file does
    assert [*taught.values()] == [LABELS[index % 3] for index in range(8)]
    assert stub.asked[0]["messages"] == [{"role": "user", "content": question_of(stub.asked[0])}]
    assert (stub.asked[0]["model"], stub.asked[0]["temperature"], stub.asked[0]["max_tokens"]) == ("m", 0.0, 512)
    record = run_of(files)
    assert record["rows"] == {"asked": 8, "written": 8, "rejected": 0, "unanswered": 0}
    assert record["requests"] == {
        "answers": 8, "asked_now": 8, "attempts": 8, "prompt_tokens": 800, "completion_tokens": 80,
        "without_token_counts": 0,
    }  # fmt: skip
    assert record["cost"] == pytest.approx((800 * 2 + 80 * 10) / 1e6)
    assert record["data"]["sha256"] == sha256_file(files.out.parent / "rows.jsonl")
    raw = [line["value"] for line in lines(f"{files.out}.raw.jsonl")]
    assert sorted(value["row"] for value in raw) == [*range(1, 9)]
    assert {(value["request_id"], value["prompt_tokens"], value["attempts"]) for value in raw} == {
        ("chatcmpl-1", 100, 1)
    }
    out = capsys.readouterr().out
    assert "8 rows asked, 8 written, 0 rejected" in out and "cost 0.0024" in out
    assert "agreement with gold: 3 of 8 answers, 0.375 [" in out


FAILURES = [
    error(429, "slow down", **{"Retry-After": "0"}),
    error(429, "slow down", **{"Retry-After": email.utils.formatdate(0)}),
    error(500, "oops"),
    (503, {}, b"<html>busy</html>"),
    (200, {}, b"<html>a login page</html>"),
    (200, {}, b'{"choices": []}'),
    (200, {}, b'{"choices": [{"message": {"content": [1]}}]}'),
    (200, {"content-length": "5000"}, b'{"choices": [{"mess'),  # breaks off; the client waits for the rest
    CUT,
    HANG,
]


@pytest.mark.processes  # it waits for seconds
def test_failures_that_pass_are_tried_again(stub, files):
    """Every row meets two kinds of failure before it is answered."""
    rows = numbered(len(FAILURES))
    tries = Counter()

    def reply(body):
        index = [row["input"] for row in rows].index(question_of(body))
        tries[index] += 1
        return FAILURES[(index + tries[index]) % len(FAILURES)] if tries[index] <= 2 else "Bad"

    stub.reply = reply
    assert generate(stub, *files(rows), "--timeout", "3", "--concurrency", "10", "--max_attempts", "3") == 0
    assert [row["teacher_output"] for row in lines(files.out)] == ["Bad"] * len(rows)
    assert [*tries.values()] == [3] * len(rows)
    assert run_of(files)["requests"]["attempts"] == 3 * len(rows)


def test_the_server_says_how_long_to_wait(stub, files):
    times = []

    def reply(body):
        times.append(time.monotonic())
        return error(429, "slow down", **{"Retry-After": "0.6"}) if len(times) == 1 else "Good"

    stub.reply = reply
    assert generate(stub, *files(numbered(1))) == 0
    assert times[1] - times[0] >= 0.6


@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7), ("0.5", 0.5), ("", 0), ("soon", 0), ("-3", 0), ("86400", 600), ("nan", 0)]
)
def test_retry_after(header, seconds):
    assert chat_endpoint.retry_after(httpx2.Response(429, headers={"Retry-After": header})) == seconds


def test_retry_after_as_a_date():
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 90 < chat_endpoint.retry_after(httpx2.Response(429, headers={"Retry-After": date})) <= 100


def test_requests_per_minute(monkeypatch):
    """Three that ask for their turn at the same moment begin 0.1 s apart, tries again included."""
    import asyncio

    waits = []

    async def sleep(seconds: float) -> None:
        waits.append(round(seconds, 6))

    endpoint = chat_endpoint.ChatEndpoint(EndpointSettings("http://h/v1", "m", requests_per_minute=600), {})
    monkeypatch.setattr(chat_endpoint, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    monkeypatch.setattr(chat_endpoint, "asyncio", SimpleNamespace(sleep=sleep))
    for _ in range(3):
        asyncio.run(endpoint.wait_for_turn())
    assert waits == [0.0, 0.1, 0.2]


def test_a_row_without_an_answer_is_listed_and_asked_for_again(stub, files, capsys):
    rows = numbered(3)
    stub.reply = lambda body: error(500, "oops") if question_of(body) == rows[1]["input"] else "Good"
    assert generate(stub, *files(rows), "--max_attempts", "2") == cli.FAILED
    assert [row["input"] for row in lines(files.out)] == [rows[0]["input"], rows[2]["input"]]
    (reject,) = rejects_of(files)
    assert (reject["row"], reject["unanswered"], reject["input"]) == (2, True, rows[1]["input"])
    assert reject["reason"] == "no answer in 2 attempts: 500: oops"
    assert "error: 1 of 3 rows got no answer; the same command asks for them again" in capsys.readouterr().err
    stub.asked.clear()
    stub.reply = lambda body: "Bad"
    assert generate(stub, *files(rows), "--max_attempts", "2") == 0
    assert [question_of(body) for body in stub.asked] == [rows[1]["input"]]
    assert [row["teacher_output"] for row in lines(files.out)] == ["Good", "Bad", "Good"]
    assert not Path(f"{files.out}.rejects.jsonl").exists()


def test_it_gives_up_on_an_endpoint_that_refuses_everything(stub, files, capsys):
    stub.reply = lambda body: error(400, f"bad field; your key is {KEY}")
    os.environ["OPENAI_API_KEY"] = KEY
    try:
        assert generate(stub, *files(numbered(40))) == cli.BAD_INPUT
    finally:
        del os.environ["OPENAI_API_KEY"]
    stderr = capsys.readouterr().err
    assert (
        "error: 10 requests in a row failed (the endpoint refuses the request (400: bad field; your key is ...))"
        in stderr
    )
    assert KEY not in stderr
    assert len(stub.asked) < 40


def test_any_number_of_rows_may_be_refused_for_good(stub, files):
    """More in a row than an endpoint may fail to answer, in the first run, and where it is asked again for one row."""
    rows = numbered(16)
    refused = [row["input"] for row in rows[1:13]]
    first = [True]

    def reply(body):
        if question_of(body) in refused:
            return error(400, "the prompt is too long")
        return error(500, "oops") if first[0] and question_of(body) == rows[14]["input"] else "Good"

    stub.reply = reply
    argv = [*files(rows), "--max_attempts", "1", "--concurrency", "1"]
    assert generate(stub, *argv) == cli.FAILED
    assert len(lines(files.out)) == 3 and sum(row["unanswered"] for row in rejects_of(files)) == 1
    first[0] = False
    stub.asked.clear()
    assert generate(stub, *argv) == cli.DONE
    assert len(stub.asked) == 13 and len(lines(files.out)) == 4
    assert [row["unanswered"] for row in rejects_of(files)] == [False] * 12


def test_the_key_is_sent_and_never_shown(stub, files, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    rows = numbered(4)
    answers = {0: error(422, f"no {KEY}"), 1: f"nonsense {KEY[:2]}", 2: "Good", 3: "Bad"}
    stub.reply = lambda body: answers[[row["input"] for row in rows].index(question_of(body))]
    assert generate(stub, *files(rows), "--api_key_env", "MY_KEY", "--max_tries", "1") == 0
    assert {headers["authorization"] for headers in map(lowered, stub.headers)} == {f"Bearer {KEY}"}
    shown = capsys.readouterr()
    written = [path.read_text() for path in files.out.parent.iterdir()]
    assert len(written) == 5
    assert not [text for text in (shown.out, shown.err, *written) if KEY in text]
    monkeypatch.delenv("MY_KEY")
    generate(stub, *files(rows[2:3]), "--max_new_tokens", "9")
    assert "authorization" not in lowered(stub.headers[-1])  # a server of one's own needs none


def lowered(headers: dict[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (error(401, "no such key"), "the endpoint refuses the API key (401: no such key); put it in OPENAI_API_KEY"),
        (error(403, "not yours"), "the endpoint refuses the API key (403: not yours)"),
        (error(404, "no model m"), "the endpoint knows no model 'm' (404: no model m); check --model and --endpoint"),
        ((307, {"location": "https://else.where/v1"}, b""), "sends elsewhere (307: https://else.where/v1)"),
    ],
)
def test_what_no_repetition_mends_stops_at_once(stub, files, capsys, reply, message):
    stub.reply = lambda body: reply
    assert generate(stub, *files(numbered(30)), "--concurrency", "2") == cli.BAD_INPUT
    stderr = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", stderr.splitlines(keepends=True)[-1]) and message in stderr
    assert "Traceback" not in stderr and len(stub.asked) <= 4
    assert not files.out.exists()


def test_an_endpoint_that_is_not_there(files, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # and listens to nobody
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
        argv = ["--endpoint", url, "--model", "m", *files(numbered(3))]
        assert cli.run(teacher_generate.main, argv) == cli.BAD_INPUT
    stderr = capsys.readouterr().err
    assert f"error: --endpoint {url}/chat/completions cannot be reached (" in stderr and "start it, or check" in stderr


@pytest.mark.processes
@pytest.mark.parametrize(("ending", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, cli.INTERRUPTED)])
def test_stopped_and_run_again(stub, files, ending, code):
    """With answers on the disk and requests under way: the second run asks only what has no answer yet."""
    rows = numbered(9)
    argv = [*files(rows), "--concurrency", "2"]
    hung = []

    def reply(body):
        if question_of(body) not in [row["input"] for row in rows[5:]]:
            return "Standard"
        hung.append(body)
        return HANG

    stub.reply = reply
    command = [sys.executable, str(ROOT / "teacher_generate.py"), "--endpoint", stub.url, "--model", "m", *argv]
    hearing = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job is started deaf to it
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=hearing)
    raw = Path(f"{files.out}.raw.jsonl")
    wait_for(lambda: raw.exists() and raw.read_text().count("\n") >= 5 and len(hung) == 2)
    child.send_signal(ending)
    assert child.wait(LONGEST) == code
    kept = raw.read_text().count("\n")
    assert not files.out.exists()
    with raw.open("a") as handle:
        handle.write('{"key": "half a li')  # what a kill in the middle of a write leaves
    stub.asked.clear()
    stub.reply = lambda body: "Bad"
    stub.release.set()
    assert generate(stub, *argv) == 0
    assert len(stub.asked) == 9 - kept
    assert Counter(stub.answered) == Counter(row["input"] for row in rows)  # each once
    assert [row["input"] for row in lines(files.out)] == [row["input"] for row in rows]
    assert Counter(row["teacher_output"] for row in lines(files.out)) == {"Standard": kept, "Bad": 9 - kept}
    assert (run_of(files)["requests"]["answers"], run_of(files)["requests"]["asked_now"]) == (9, 9 - kept)
    first = files.out.read_bytes()
    stub.asked.clear()
    assert generate(stub, *argv) == 0  # whole: asks nothing
    assert (stub.asked, files.out.read_bytes()) == ([], first)
    assert generate(stub, *argv, "--temperature", "1") == 0  # other answers are wanted
    assert len(stub.asked) == 9 and stub.asked[0]["seed"] == 0


def test_equal_rows_are_asked_once(stub, files):
    assert generate(stub, *files(numbered(1) * 3)) == 0
    assert (len(stub.asked), len(lines(files.out))) == (1, 3)


def test_extra_body(stub, files):
    extra = '{"max_tokens": null, "max_completion_tokens": 9, "temperature": 1}'
    assert generate(stub, *files(numbered(1)), "--extra_body", extra) == 0
    assert stub.asked[0].keys() == {"model", "messages", "temperature", "max_completion_tokens"}
    assert stub.asked[0]["temperature"] == 1


@pytest.mark.processes
def test_the_projects_own_server(tmp_path, base, files):
    """What it answers is what the model behind it generates."""
    runs = make_runs(tmp_path / "runs", base)
    rows = [{"input": text} for text in CORPUS[:3]]
    with serve(runs) as served:
        argv = ["--endpoint", served.url + "/v1", "--model", "creditmix_sft", *files(rows)]
        teacher_generate.main([*argv, "--max_new_tokens", "7", "--max_tries", "1"])
        with pytest.raises(
            UserError, match=r"knows no model 'gpt-4' \(404: there is no run 'gpt-4'; there are: base, creditmix_dpo"
        ):
            teacher_generate.main(["--endpoint", served.url + "/v1", "--model", "gpt-4", *files(rows)])
        with pytest.raises(UserError, match="gives no top_logprobs"):
            teacher_generate.main([*argv, "--probabilities"])
    model, tokenizer = models.load_for_inference(ModelSource(str(runs / "creditmix_sft")))
    prompts = [tokenizers.encode_prompt(tokenizer, row["input"]) for row in rows]
    wanted = [found.text for (found,) in generation.generate(model, tokenizer, prompts, Decoding(7))]
    raw = {line["value"]["row"]: line["value"] for line in lines(f"{files.out}.raw.jsonl")}
    assert [raw[row]["text"] for row in (1, 2, 3)] == wanted
    assert [raw[row]["prompt_tokens"] for row in (1, 2, 3)] == [*map(len, prompts)]
