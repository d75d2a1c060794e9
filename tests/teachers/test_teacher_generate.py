"""teacher_generate.py against a real local HTTP server that misbehaves, this project's own server, and local models."""

from __future__ import annotations

import email.utils
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from support.inputs import CORPUS, LABELS, ROOT, SHARED, write_rows
from support.processes import wait_for
from support.served import make_runs, serve

import teacher_generate
from common import cli
from common.cli import UserError
from common.data import rows as records
from common.files import sha256_file
from common.generation import generate as generation
from common.generation import json_writer
from common.generation.decoding import Decoding
from common.models import loading as models
from common.models import tokenizers
from common.models.source import ModelSource
from common.sandbox import box as sandbox
from common.tasks.codegen import prompt as codegen
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.task import LabelTask
from common.teachers import chat_endpoint as teacher_client
from common.teachers.label_probabilities import distribution
from common.teachers.preferences import Candidate, best_and_worst
from common.teachers.tasks import Code, Documents, Item, Labels, Unusable, held_out, read_items, understand

KEY = "sk-secret-4711"
SCHEMA = {
    "type": "object",
    "properties": {"company": {"type": "string"}, "total": {"type": "number"}},
    "required": ["company", "total"],
    "additionalProperties": False,
}
CUT, HANG = "cut the connection", "never answer"


class Patient(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # the default of 5 makes clients wait a second for their connection

    def handle_error(self, request, client_address) -> None:
        """A client that went away is none of our business."""


class Stub:
    """An OpenAI-shaped server. `reply(body)` gives the text of the answer, or (status, headers, body bytes), or how to
    misbehave; `asked` are the bodies and `headers` the headers that came, `answered` the prompts that got an answer."""

    def __init__(self) -> None:
        self.reply: Callable[[dict], Any] = lambda body: "Good"
        self.asked: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.answered: list[str] = []
        self.release = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                stub.asked.append(body)
                stub.headers.append(dict(self.headers))
                found = stub.reply(body) if self.path == "/v1/chat/completions" else (404, {}, b"no such path")
                if found == HANG:
                    stub.release.wait(60)
                if found in (CUT, HANG):
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                status, headers, content = found if isinstance(found, tuple) else (200, {}, completion(found))
                self.send_response(status)
                for name, value in {"content-length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
                if status == 200:
                    stub.answered.append(body["messages"][-1]["content"])

            def log_message(self, *args) -> None:
                pass

        self.server = Patient(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


def completion(text: str | dict) -> bytes:
    """The body of an answer with a text, or with these fields of its one choice."""
    choice = {"message": {"role": "assistant", "content": text}} if isinstance(text, str) else text
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return json.dumps({"id": "chatcmpl-1", "choices": [{"finish_reason": "stop", **choice}], "usage": usage}).encode()


def error(status: int, message: str, **headers: str) -> tuple[int, dict, bytes]:
    return status, headers, json.dumps({"error": {"message": message}}).encode()


def question_of(body: dict) -> str:
    return body["messages"][0]["content"]


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(teacher_client, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running = Stub()
    yield running
    running.close()


@pytest.fixture
def files(tmp_path):
    """`files(rows)` writes rows and gives --data and --out."""

    def write(rows: list[dict]) -> list[str]:
        return ["--data", write_rows(tmp_path / "rows.jsonl", rows), "--out", str(tmp_path / "out.jsonl")]

    write.out = tmp_path / "out.jsonl"
    return write


def numbered(count: int, **more: Any) -> list[dict]:
    return [{"input": CREDITMIX.prompt(f"Age: {20 + i}"), **more} for i in range(count)]


def generate(stub: Stub, *argv: str) -> int:
    return cli.run(teacher_generate.main, ["--endpoint", stub.url, "--model", "m", *argv])


def lines(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def run_of(files) -> dict:
    return json.loads(Path(f"{files.out}.run.json").read_text())


def rejects_of(files) -> list[dict]:
    return lines(f"{files.out}.rejects.jsonl")


# Endpoints that misbehave.


def test_rows_keep_their_order_and_what_they_carry(stub, files, capsys):
    """The first rows are answered last; four requests are under way at once."""
    rows = numbered(8)
    for place, row in enumerate(rows):
        row |= {"output": "Good", "group": f"{place:016x}", "id": place, "note": "not carried"}
    together, most = [0], [0]
    lock = threading.Lock()

    def reply(body):
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        place = [row["input"] for row in rows].index(question_of(body))
        wait_for(lambda: most[0] == 4, 20)
        time.sleep(0.02 * (8 - place))
        with lock:
            together[0] -= 1
        return LABELS[place % 3]

    stub.reply = reply
    assert generate(stub, *files(rows), "--concurrency", "4", "--price_in", "2", "--price_out", "10") == 0
    assert most[0] == 4
    assert lines(files.out) == [
        {
            "input": row["input"],
            "teacher_output": LABELS[place % 3],
            "id": place,
            "output": "Good",
            "group": row["group"],
        }
        for place, row in enumerate(rows)
    ]
    assert len(records.read_rows(files.out, records.KD_KEYS)) == 8  # as kd_train.py reads them
    taught = CREDITMIX.read_teacher(files.out)  # as creditmix_prepare.py --teacher_file does
    assert [*taught.values()] == [LABELS[place % 3] for place in range(8)]
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


def test_failures_that_pass_are_tried_again(stub, files):
    """Every row meets two kinds of failure before it is answered."""
    rows = numbered(len(FAILURES))
    tries = Counter()

    def reply(body):
        place = [row["input"] for row in rows].index(question_of(body))
        tries[place] += 1
        return FAILURES[(place + tries[place]) % len(FAILURES)] if tries[place] <= 2 else "Bad"

    stub.reply = reply
    assert generate(stub, *files(rows), "--timeout", "0.5", "--concurrency", "10", "--max_attempts", "3") == 0
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
    assert teacher_client._retry_after(httpx2.Response(429, headers={"Retry-After": header})) == seconds


def test_retry_after_as_a_date():
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 90 < teacher_client._retry_after(httpx2.Response(429, headers={"Retry-After": date})) <= 100


def test_requests_per_minute(monkeypatch):
    """Three that ask for their turn at the same moment begin 0.1 s apart, tries again included."""
    import asyncio

    waits = []

    async def sleep(seconds: float) -> None:
        waits.append(round(seconds, 6))

    endpoint = teacher_client.ChatEndpoint("http://h/v1", "m", {}, requests_per_minute=600)
    monkeypatch.setattr(teacher_client, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    monkeypatch.setattr(teacher_client, "asyncio", SimpleNamespace(sleep=sleep))
    for _ in range(3):
        asyncio.run(endpoint._turn())
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
    told = capsys.readouterr().err
    assert (
        "error: 10 requests in a row failed (the endpoint refuses the request (400: bad field; your key is ...))"
        in told
    )
    assert KEY not in told
    assert len(stub.asked) < 40


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
    told = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", told.splitlines(keepends=True)[-1]) and message in told
    assert "Traceback" not in told and len(stub.asked) <= 4
    assert not files.out.exists()


def test_an_endpoint_that_is_not_there(files, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    argv = ["--endpoint", url, "--model", "m", *files(numbered(3))]
    assert cli.run(teacher_generate.main, argv) == cli.BAD_INPUT
    told = capsys.readouterr().err
    assert f"error: --endpoint {url}/chat/completions cannot be reached (" in told and "start it, or check" in told


@pytest.mark.parametrize(("ending", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, cli.INTERRUPTED)])
def test_stopped_and_run_again(stub, files, ending, code):
    """With answers on the disk and requests under way: the second run asks only what has no answer yet."""
    rows = numbered(9)
    argv = [*files(rows), "--concurrency", "2"]
    stub.reply = lambda body: HANG if len(stub.answered) >= 5 else "Standard"
    command = [sys.executable, str(ROOT / "teacher_generate.py"), "--endpoint", stub.url, "--model", "m", *argv]
    hearing = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job is started deaf to it
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=hearing)
    raw = Path(f"{files.out}.raw.jsonl")
    wait_for(lambda: raw.exists() and raw.read_text().count("\n") >= 5 and len(stub.asked) >= 7)
    child.send_signal(ending)
    assert child.wait(30) == code
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


# What of an answer can be used.


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Good", "Good"), (" bad.\n", "Bad"), ("**Standard**", "Standard"), ("Label: Good", "Good"),
        ("<think>Bad? No.</think>\n\n`Good`", "Good"), ("Goods", None), ("Good or Bad", None), ("not Good", None),
        ("", None), ("<think>Good</think>", None), ("Average", None),
    ],
)  # fmt: skip
def test_labels(text, label):
    reading = understand(Labels(CREDITMIX), "?", text, True, False)
    assert reading.answer == label and (reading.fault is None) == (label is not None)


def test_labels_that_differ_in_marks_and_other_words():
    task = Labels(LabelTask("languages", ("C", "C#", "Go"), "Which?", verbalizers={"Go": ["Golang"]}))
    assert [task.parse(text) for text in ("C", "C#", "golang", "Language: C#")] == ["C", "C#", "Go", "C#"]
    with pytest.raises(Unusable, match="one of C, C#, Go and nothing else"):
        task.parse("c")  # which of the two?


def test_an_unusable_answer_is_asked_for_again_with_the_reason(stub, files):
    rows = numbered(3, output="Good")
    said = ["I think good?", "Standard, or Bad", "Good"]

    def reply(body):
        turn = len(body["messages"]) // 2
        return {"finish_reason": "length", "message": {"content": "Bad"}} if "Age: 22" in question_of(body) else (
            said[turn] if "Age: 21" in question_of(body) else "Good"
        )  # fmt: skip

    stub.reply = reply
    assert generate(stub, *files(rows)) == 0
    assert [(row["input"][-2:], row["teacher_output"]) for row in lines(files.out)] == [("20", "Good"), ("21", "Good")]
    (reject,) = rejects_of(files)
    assert reject["reason"] == "the answer breaks off at --max_new_tokens"
    assert (reject["row"], reject["answers"], reject["unanswered"]) == (3, ["Bad"] * 3, False)
    last = next(body for body in stub.asked if len(body["messages"]) == 5 and "Age: 21" in question_of(body))
    assert [turn["content"] for turn in last["messages"][1:]] == [
        said[0],
        "That cannot be used: the answer must be one of Good, Standard, Bad and nothing else. "
        "Answer again, in the form asked for.",
        said[1],
        last["messages"][2]["content"],
    ]
    assert run_of(files)["requests"]["answers"] == 1 + 3 + 3
    assert run_of(files)["agreement_with_gold"]["of"] == 3  # a rejected row does not agree


def test_no_answer_the_second_time(stub, files):
    stub.reply = lambda body: "hm\ud83d" if len(body["messages"]) == 1 else error(500, "oops")
    assert generate(stub, *files(numbered(1)), "--max_attempts", "2") == cli.FAILED
    (reject,) = rejects_of(files)
    assert (reject["answers"], reject["unanswered"]) == (["hm?"], True)
    assert re.fullmatch(r"the answer must be one .*; asked again: no answer in 2 attempts: 500: oops", reject["reason"])


def test_raw_rows_of_a_label_task(tmp_path, stub, files):
    """Rows of creditmix_prepare.py and of the public CSV; the prompt and the group are prepare's."""
    dev = write_rows(
        tmp_path / "dev.jsonl", [{"question": "Age: 23, Outstanding Debt: 5", "answer": "Bad", "group": "ab" * 8}]
    )
    (item,) = read_items(dev, Labels(CREDITMIX))
    assert item.prompt == CREDITMIX.prompt(CREDITMIX.clean("Age: 23, Outstanding Debt: 5"))
    assert (item.gold, item.kept) == ("Bad", {"output": "Bad", "group": "ab" * 8})
    (tmp_path / "raw.csv").write_text('question,answer\n"Age: 23, Outstanding Debt: 5",_\n')
    (item,) = read_items(str(tmp_path / "raw.csv"), Labels(CREDITMIX))
    assert item.gold is None and item.kept.keys() == {"group"}
    task = tmp_path / "mood.yaml"
    task.write_text("labels: [Up, Down]\ninstruction: Mood?\ngroup_key: who\n")
    data = write_rows(
        tmp_path / "mood.jsonl", [{"text": "fine", "label": "Up", "who": "a"}, {"text": "so", "who": "a"}]
    )
    stub.reply = lambda body: "down"
    argv = ["--data", data, "--out", str(files.out), "--task", str(task)]
    assert generate(stub, *argv) == 0
    first, second = lines(files.out)
    assert first == {"input": "Mood?\n\nfine", "teacher_output": "Down", "output": "Up", "group": first["group"]}
    assert second == {"input": "Mood?\n\nso", "teacher_output": "Down", "group": first["group"]}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('{"total": 5, "company": "A"}', '{"company":"A","total":5}'),
        ('Here it is:\n```json\n{"company": "A",\n "total": 1.50}\n```\nDone.', '{"company":"A","total":1.5}'),
        ('{"company": "A"}', None),
        ("Sorry.", None),
    ],
)
def test_documents(text, answer):
    reading = understand(Documents(SCHEMA), "?", text, True, False)
    assert reading.answer == answer
    assert answer or ("schema" if "{" in text else "not JSON") in reading.fault


def test_documents_end_to_end(tmp_path, stub, files):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    rows = [{"document": f"ACME {i}", "fields": {"company": "ACME", "total": i}, "id": f"d{i}"} for i in range(3)]
    stub.reply = lambda body: json.dumps({"total": 1, "company": "ACME"})
    assert generate(stub, *files(rows), "--task", "idp", "--schema", str(schema)) == 0
    found = lines(files.out)
    assert [row["teacher_output"] for row in found] == ['{"company":"ACME","total":1}'] * 3
    assert [row["output"] for row in found] == [json_writer.dumps(row["fields"], SCHEMA) for row in rows]
    assert found[1].keys() == {"input", "teacher_output", "id", "output", "group"}
    assert run_of(files)["agreement_with_gold"]["agree"] == 1
    task = Documents(SCHEMA)
    item = Item(1, "?", '{"company":"A","total":1}')
    assert [task.score(item, text) for text in ('{"company":"A","total":1}', '{"company":"A","total":2}')] == [1.0, 0.5]


CODE = "def add(a, b):\n    return a + b"
WRONG = "def add(a, b):\n    return a - b"


@pytest.mark.parametrize(
    ("prompt", "text", "answer", "fault"),
    [
        ("Add.", f"Sure:\n```python\n{CODE}\n```", codegen.code_answer(CODE), None),
        ("Add.", "<CODE>\ndef add(a, b:\n</CODE>", None, "the code does not compile (line 1"),
        ("Add.", "Sure", None, "there is no code"),
        (codegen.plan_prompt("Add."), "<PLAN>\n- Add.\n</PLAN>", "<PLAN>\n- Add.\n</PLAN>", None),
        (codegen.plan_prompt("Add."), f"<CODE>\n{CODE}\n</CODE>", None, "there is no plan"),
    ],
)
def test_code(prompt, text, answer, fault):
    reading = understand(Code(False, False), prompt, text, True, False)
    assert reading.answer == answer
    assert (reading.fault or "").startswith(fault or "") and bool(reading.fault) == bool(fault)


def test_code_that_fails_its_tests_is_asked_for_again(tmp_path, stub, files):
    try:
        sandbox.level()
    except UserError as error_:
        pytest.skip(str(error_))
    problem = {"prompt": "Write add(a, b).", "solution": CODE, "tests": ["assert add(2, 3) == 5"]}
    bare = {"prompt": "Write add.", "tests": ["assert add(2, 3) == 5"]}
    stub.reply = lambda body: (WRONG, CODE)[min(1, len(body["messages"]) // 2)]
    argv = [*files([problem]), "--task", "codegen", "--confirm_run_unsafe_code"]
    assert generate(stub, *argv) == 0
    (row,) = lines(files.out)
    assert (row["input"], row["teacher_output"]) == (
        codegen.direct_prompt(problem["prompt"]),
        codegen.code_answer(CODE),
    )
    assert "the code fails its tests (assertion: assert add(2, 3) == 5" in stub.asked[1]["messages"][2]["content"]
    assert run_of(files)["agreement_with_gold"]["agree"] == 1
    assert generate(stub, *files([bare]), "--task", "codegen", "--max_tries", "1") == 0  # no consent: only compiled
    assert lines(files.out)[0]["teacher_output"] == codegen.code_answer(WRONG)
    assert generate(stub, *files([bare]), "--task", "codegen", "--confirm_run_unsafe_code", "--max_tries", "1") == 0
    assert lines(files.out) == [] and "fails its tests" in rejects_of(files)[0]["reason"]


# Reasons, pairs, probabilities.


def test_reasons(stub, files):
    rows = numbered(2, output="Good", group="ab" * 8)
    said = ["Low debt.\nHigh income.\n\n**Answer:** Good", "Answer: Good", "Much debt. Answer:\nanswer: Bad"]
    stub.reply = lambda body: said[0] if "Age: 20" in question_of(body) else said[1 + len(body["messages"]) // 2]
    assert generate(stub, *files(rows), "--reasons") == 0
    first, second = lines(files.out)
    assert first == {
        "input": rows[0]["input"], "teacher_output": "Good", "reason": "Low debt.\nHigh income.", "output": "Good",
        "group": "ab" * 8,
    }  # fmt: skip
    assert (second["teacher_output"], second["reason"]) == ("Bad", "Much debt. Answer:")
    for row in rows:
        asked = {question_of(body) for body in stub.asked if question_of(body).startswith(row["input"])}
        assert len(asked) == 1 and 'begins with "Answer:"' in asked.pop()
    asked = len(stub.asked)
    assert generate(stub, *files(rows), "--reasons", "rows") == 0
    assert len(stub.asked) == asked
    label, rationale = lines(files.out)[:2]
    assert label == first
    assert rationale["input"].startswith(rows[0]["input"] + "\n\nExplain")
    assert (rationale["teacher_output"], rationale["group"]) == ("Low debt.\nHigh income.", "ab" * 8)


def test_pairs_by_gold(stub, files):
    """Four samples a row, each with a seed of its own; the best and the worst of them."""
    rows = numbered(3, output="Good", group="ab" * 8)
    said = {"20": ["Bad", "Good", "Good", "Bad"], "21": ["Bad", "hm", "Bad", "Standard"], "22": ["Good"] * 4}
    stub.reply = lambda body: said[question_of(body)[-2:]][body["seed"]]
    assert generate(stub, *files(rows), "--preferences") == 0
    assert lines(files.out) == [
        {"prompt": rows[0]["input"], "chosen": "Good", "rejected": "Bad", "output": "Good", "group": "ab" * 8}
    ]
    assert len(records.read_rows(files.out, records.DPO_KEYS)) == 1  # as dpo_train.py reads them
    assert [(row["row"], row["reason"].partition(";")[0]) for row in rejects_of(files)] == [
        (2, "none of the answers agrees with gold"),
        (3, "all answers are the same"),
    ]
    assert {(body["seed"], body["temperature"]) for body in stub.asked} == {(seed, 0.8) for seed in range(4)}
    found = run_of(files)["agreement_with_gold"]
    assert (found["agree"], found["of"]) == (1, 1)  # of what is chosen


def test_pairs_by_the_teachers_own_ranking(stub, files):
    rows = numbered(3)
    said = {"20": ["Good", "Bad", "Good"], "21": ["Bad", "hm", "Bad"], "22": ["x", "y", "z"]}

    def reply(body):
        if "Which answer is the best" in question_of(body):
            return "the second" if len(body["messages"]) == 1 else "Best: 2\nWorst: 1"
        return said[question_of(body)[-2:]][body["seed"]]

    stub.reply = reply
    assert generate(stub, *files(rows), "--preferences", "--num_samples", "3", "--rank_by", "teacher") == 0
    assert lines(files.out) == [
        {"prompt": rows[0]["input"], "chosen": "Bad", "rejected": "Good"},
        {"prompt": rows[1]["input"], "chosen": "Bad", "rejected": "hm"},
    ]
    assert [row["reason"] for row in rejects_of(files)] == ["none of the answers can be used"]
    (ranking,) = (body for body in stub.asked if len(body["messages"]) == 3)
    assert "Answer 1:\nGood\n\nAnswer 2:\nBad" in question_of(ranking) and rows[0]["input"] in question_of(ranking)
    assert "two different numbers from 1 to 2" in ranking["messages"][2]["content"]


def test_the_best_and_the_worst():
    """By use first, then by score; an answer that was understood is better than one that was not."""
    task, item = Documents(SCHEMA), Item(1, "?", '{"company":"A","total":1}')
    half, whole = Candidate("half", (True, 0.5, True)), Candidate("whole", (True, 1.0, True))
    broken = Candidate("broken", (False, 0.0, False))
    for found, sides in (([half, whole], ("whole", "half")), ([broken, half, whole], ("whole", "broken"))):
        pair = best_and_worst(task, item, found)
        assert (pair.chosen, pair.rejected, pair.fault) == (*sides, None)
    assert best_and_worst(task, item, [broken]).fault == "none of the answers can be used"
    assert best_and_worst(task, item, [whole]).fault.startswith("all answers are the same")
    assert best_and_worst(task, item, [half, Candidate("other", half.quality)]).fault.startswith("the answers differ")


def test_label_distribution():
    """Masses by hand: tokens that begin one label's word count, the rest of the mass bounds an absent label."""

    def top(**found: float) -> list[tuple[str, float]]:
        return [(token, math.log(probability)) for token, probability in found.items()]

    found, uncovered = distribution([*top(Good=0.5, St=0.2, The=0.1), (" good", math.log(0.1))], CREDITMIX)
    # Good 0.6, Standard 0.2; Bad, absent, at most what is left over: 1 - 0.9
    assert found == pytest.approx({"Good": 0.6 / 0.9, "Standard": 0.2 / 0.9, "Bad": 0.1 / 0.9}, abs=1e-5)
    assert uncovered == pytest.approx(0.2)
    found, uncovered = distribution(top(Bad=0.9), CREDITMIX)
    assert found == pytest.approx({"Good": 0.05, "Standard": 0.05, "Bad": 0.9}) and uncovered == pytest.approx(0.1)
    severities = LabelTask("s", ("Low", "Lower"), "?", verbalizers={"Low": ["Minor"]})
    found, uncovered = distribution(top(Low=0.5, Lower=0.3, Minor=0.2), severities)
    assert found == pytest.approx({"Low": 0.4, "Lower": 0.6}) and uncovered == pytest.approx(0.5)  # Low may go on
    with pytest.raises(Unusable, match=r"no label is among the likeliest first tokens \('The', ' '\)"):
        distribution([("The", -0.1), (" ", -3.0)], CREDITMIX)


def test_probabilities_of_an_endpoint(stub, files, capsys):
    rows = numbered(2, output="Bad", group="ab" * 8)

    def reply(body):
        tops = {"Bad": 0.6, " Standard": 0.2, "Good": 0.1} if "Age: 20" in question_of(body) else {"I": 0.9}
        listed = [{"token": token, "logprob": math.log(p)} for token, p in tops.items()]
        return {"message": {"content": "Bad"}, "logprobs": {"content": [{"token": "Bad", "top_logprobs": listed}]},
                "finish_reason": "length"}  # fmt: skip

    stub.reply = reply
    assert generate(stub, *files(rows), "--probabilities", "--top_logprobs", "5") == 0
    assert (stub.asked[0]["logprobs"], stub.asked[0]["top_logprobs"], stub.asked[0]["max_tokens"]) == (True, 5, 1)
    (row,) = lines(files.out)
    assert row.keys() == {"input", "teacher_output", "probabilities", "uncovered_mass", "output", "group"}
    assert row["teacher_output"] == "Bad" and row["uncovered_mass"] == pytest.approx(0.1)
    assert row["probabilities"] == pytest.approx({"Good": 1 / 9, "Standard": 2 / 9, "Bad": 6 / 9}, abs=1e-5)
    assert rejects_of(files)[0]["reason"] == "no label is among the likeliest first tokens ('I')"
    assert run_of(files)["uncovered_mass"] == {"mean": 0.1, "max": 0.1, "rows_above_half": 0}
    shown = capsys.readouterr()
    assert (
        "probability that the labels did not cover: 0.1000 on average, 0.1000 at most, above a half in 0" in shown.out
    )
    assert "warning: The teacher gives" not in shown.err
    assert len(stub.asked) == 2  # a distribution is not asked for twice


def test_probabilities_of_a_local_model(base, files):
    from common.tasks.ranking.classifier import Classifier

    rows = [{"input": text, "output": "Good"} for text in CORPUS[:5]]
    argv = ["--teacher", base, *files(rows), "--probabilities"]
    assert teacher_generate.main(argv) is None
    classifier = Classifier.load(ModelSource(base), CREDITMIX)
    texts = [text.removeprefix(CREDITMIX.prompt("")) for text in CORPUS[:5]]
    wanted = classifier.answers(texts, classifier.calibration(None))
    found = lines(files.out)
    assert [row["teacher_output"] for row in found] == [answer["prediction"] for answer in wanted]
    for row, answer in zip(found, wanted, strict=True):
        assert row["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-5)
    with pytest.raises(UserError, match="row 1: the input does not begin with the instruction of creditmix"):
        teacher_generate.main(["--teacher", base, *files([{"input": "Age: 3"}]), "--probabilities"])


# Local teachers.


def test_a_local_teacher(base, files, monkeypatch):
    """Its raw answers are the model's own, in one batch or several; a second run loads nothing from it again."""
    from common.teachers import local_model as teacher_local

    rows = [{"input": text[: 60 + 9 * place]} for place, text in enumerate(CORPUS[:5])] + [{"input": "x" * 4000}]
    monkeypatch.setattr(teacher_local, "WINDOW", 2)
    argv = ["--teacher", base, *files(rows), "--max_new_tokens", "6", "--max_tries", "1"]
    assert teacher_generate.main(argv) is None
    model, tokenizer = models.load_for_inference(ModelSource(base))
    prompts = [tokenizers.encode_prompt(tokenizer, row["input"]) for row in rows[:5]]
    wanted = [found for (found,) in generation.generate(model, tokenizer, prompts, Decoding(6))]
    raw = {line["value"]["row"]: line["value"] for line in lines(f"{files.out}.raw.jsonl")}
    assert raw.keys() == {1, 2, 3, 4, 5}
    for row, answer, prompt in zip((1, 2, 3, 4, 5), wanted, prompts, strict=True):
        told = raw[row]
        assert (told["text"], told["finished"]) == (answer.text, answer.finished)
        assert (told["prompt_tokens"], told["completion_tokens"]) == (len(prompt), len(answer.tokens))
    assert re.search(r"its \d+ tokens do not fit the \d+ that the teacher has", rejects_of(files)[-1]["reason"])
    monkeypatch.setattr(generation, "generate", None)
    assert teacher_generate.main(argv) is None
    assert run_of(files)["requests"]["asked_now"] == 0


def test_samples_of_a_local_teacher_differ(base, files):
    argv = ["--teacher", base, *files(numbered(2)), "--max_new_tokens", "6", "--preferences", "--num_samples", "3"]
    teacher_generate.main([*argv, "--temperature", "1"])
    raw = [line["value"] for line in lines(f"{files.out}.raw.jsonl")]
    assert sorted((value["row"], value["sample"]) for value in raw) == [(row, s) for row in (1, 2) for s in range(3)]
    assert len({value["text"] for value in raw}) > 2
    assert {row["reason"] for row in rejects_of(files)} == {"none of the answers can be used"}


# Gold.


def test_a_teacher_that_is_worse_than_gold(stub, files, capsys):
    rows = numbered(60)
    for place, row in enumerate(rows):
        row["output"] = LABELS[place % 2]
    assert generate(stub, *files(rows)) == 0
    record = run_of(files)
    assert record["agreement_with_gold"].keys() == {"agree", "of", "value", "low", "high"}
    assert (record["agreement_with_gold"]["agree"], record["agreement_with_gold"]["value"]) == (30, 0.5)
    assert 0.35 < record["agreement_with_gold"]["low"] < 0.5 < record["agreement_with_gold"]["high"] < 0.65
    wanted = "The teacher is worse than the gold that it would replace: 30 of its 60 answers are not gold's."
    assert record["statement"].startswith(wanted)
    shown = capsys.readouterr()
    assert f"warning: {wanted}" in shown.err and "agreement with gold: 30 of 60 answers, 0.500 [" in shown.out
    assert generate(stub, *files(numbered(60, output="Good"))) == 0
    assert "not significantly worse" in run_of(files)["statement"] and "warning" not in capsys.readouterr().err
    assert generate(stub, *files(numbered(60))) == 0
    assert run_of(files)["agreement_with_gold"] is None and "nothing is known" in run_of(files)["statement"]


def test_rows_of_held_out_groups_are_told(stub, files, capsys):
    groups = ["0" * 16, "f" * 16]  # validation, train
    rows = [row | {"group": group} for row, group in zip(numbered(2), groups, strict=True)]
    assert len([*held_out(read_items(files(rows)[1], Labels(CREDITMIX)))]) == 1
    assert generate(stub, *files(rows)) == 0
    assert "warning: 1 of 2 rows belong to groups that are held out" in capsys.readouterr().err


def test_a_real_teachers_answers(stub, files):
    """The 300 rows that a real LLM labelled: it agrees with gold on 152."""
    path = SHARED / "data" / "creditmix" / "llm_teacher_300.csv"
    if not path.is_file():
        pytest.skip("needs the shared data")
    answers = {CREDITMIX.clean(row["question"]): row["teacher_label"]
               for _, row in records.numbered_rows(path)[1]}  # fmt: skip
    stub.reply = lambda body: answers[question_of(body).removeprefix(CREDITMIX.prompt(""))]
    assert generate(stub, "--data", str(path), "--out", str(files.out), "--concurrency", "16") == 0
    found = run_of(files)["agreement_with_gold"]
    assert (found["agree"], found["of"]) == (152, 300)
    assert run_of(files)["statement"].startswith(
        "The teacher is worse than the gold that it would replace: 148 of its 300"
    )


# Bad usage.

HERE = ["--data", "rows.jsonl", "--out", "out.jsonl"]
THERE = [*HERE, "--endpoint", "http://localhost:1/v1", "--model", "m"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "a.jsonl", "--out", "./a.jsonl", "--teacher", "t"], "--out ./a.jsonl would replace --data"),
        (["--data", "a.raw.jsonl", "--out", "a", "--teacher", "t"], "--out a would replace --data"),
        (["--data", "a.jsonl", "--out", ".", "--teacher", "t"], "--out . is a folder"),
        (HERE, "give either --teacher with a local model, or --endpoint with --model"),
        ([*THERE, "--teacher", "t"], "give either --teacher with a local model, or --endpoint with --model"),
        ([*HERE, "--endpoint", "http://h/v1"], "--endpoint needs --model"),
        ([*HERE, "--teacher", "t", "--model", "m"], "--model goes with --endpoint"),
        ([*HERE, "--teacher", "./t"], "./t does not exist"),
        ([*HERE, "--endpoint", "localhost:1", "--model", "m"], "--endpoint localhost:1 is no address"),
        ([*HERE, "--endpoint", "http://h:99999/v1", "--model", "m"], "--endpoint http://h:99999/v1 is no address"),
        ([*HERE, "--endpoint", "http://u:p@h/v1", "--model", "m"], "--endpoint must not hold a key"),
        ([*THERE, "--task", "idp"], "--task idp needs --schema"),
        ([*THERE, "--schema", "s.json"], "--schema goes with --task idp"),
        ([*THERE, "--confirm_run_unsafe_code"], "go with --task codegen"),
        ([*THERE, "--task", "codegen", "--probabilities"], "--task codegen has no labels"),
        ([*THERE, "--task", "no.yaml"], "no.yaml does not exist"),
        ([*THERE, "--num_samples", "3"], "go with --preferences"),
        ([*THERE, "--top_logprobs", "3"], "--top_logprobs goes with --probabilities"),
        ([*THERE, "--preferences", "--num_samples", "1"], "--num_samples must be at least 2"),
        ([*THERE, "--preferences", "--temperature", "0"], "gives the same answer each time"),
        ([*THERE, "--preferences", "--reasons"], "not allowed with argument"),
        ([*THERE, "--extra_body", "{"], "--extra_body is not JSON"),
        ([*THERE, "--extra_body", "[]"], "--extra_body must be a JSON object"),
        ([*THERE, "--top_p", "0"], "--top_p 0.0 is not in (0, 1]"),
        ([*THERE, "--requests_per_minute", "0"], "0 is not above 0"),
        ([*THERE, "--price_in", "-1"], "-1 is below 0"),
        (THERE, "rows.jsonl, line 2: output 'Fine' is not one of Good, Standard, Bad"),
        ([*THERE, "--skip_bad_rows", "--api_key_env", "NO_KEY"], "there is no such environment variable"),
    ],
)
def test_bad_usage_is_one_sentence(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"input": "a"}, {"input": "b", "output": "Fine"}])
    assert cli.run(teacher_generate.main, argv) == cli.BAD_INPUT
    told = capsys.readouterr().err
    assert message in told and told.splitlines()[-1].startswith("error: ") and "Traceback" not in told
    assert not Path("out.jsonl").exists()


def test_bad_rows_are_named_or_skipped(tmp_path):
    task = Documents(SCHEMA)
    for row, fault in (
        ({"document": ""}, "'document' must be a non-empty string"),
        ({"document": "a", "fields": {"company": 3}}, "fields: the JSON does not satisfy the schema"),
        ({"input": "a", "output": "{"}, "output: the JSON breaks off"),
    ):
        path = write_rows(tmp_path / "bad.jsonl", [{"document": "fine"}, row])
        with pytest.raises(UserError, match=re.escape(f"bad.jsonl, line 2: {fault}")):
            read_items(path, task)
        assert [item.number for item in read_items(path, task, skip_bad_rows=True)] == [1]
