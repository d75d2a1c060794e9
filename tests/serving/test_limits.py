"""What the inference server refuses, and what it answers when something goes wrong."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.inputs import LABELS
from support.processes import wait_for
from support.served import (
    JSON,
    LONG,
    ROWS,
    chat_turn,
    same,
    serve,
    settings,
)

from common.serving import model_process, routes
from common.serving.messages import Abandoned
from common.serving.work import Classify

pytestmark = pytest.mark.processes


def test_a_full_queue(runs):
    with ThreadPoolExecutor(8) as pool, serve(runs, max_queue=3) as served:
        with served.held():
            asked = [pool.submit(served.post, "/infer/sft", {"features": row}) for row in ROWS[1:4]]
            wait_for(lambda: served.waiting() == 3)
            status, answer, headers = served.ask("POST", "/infer/kd", {"features": ROWS[0]})
            assert (status, headers["retry-after"]) == (503, "1")
            assert answer["error"]["message"] == "the queue is full; try again"
        assert len({future.result()["model_name"] for future in asked}) == 1


def test_a_backlog_of_bytes_counts_as_a_full_queue(runs, monkeypatch):
    """Of a process that reads nothing, requests that have timed out would pile up in the server."""
    monkeypatch.setattr(model_process, "MAX_BACKLOG", 1_000_000)
    with serve(runs) as served:
        with served.held():
            monkeypatch.setattr(served.server, "settings", settings("x", request_timeout=0.1))
            body = {"document": "x" * 900_000, "schema": {}, "run": "sft"}
            statuses = [served.ask("POST", "/infer/idp", body)[0] for _ in range(4)]
        assert statuses[0] == 504
        assert statuses[-1] == 503


def test_a_text_that_is_streamed_takes_as_much_of_a_batch(served, monkeypatch):
    """Else any number of them would be worked on at once, and the queue would never be full."""
    put, told = model_process.ModelProcess.put, []

    def telling(process, *request, tokens, **more):
        told.append(tokens)
        return put(process, *request, tokens=tokens, **more)

    monkeypatch.setattr(model_process.ModelProcess, "put", telling)
    chat = {"model": "sft", "messages": [chat_turn("user") | {"content": "Age: 23, " * 30}], "max_tokens": 1}
    code = {"run": "sft", "prompt": "Add two numbers. " * 20, "max_new_tokens": 1}
    for path, body in (("/v1/chat/completions", chat), ("/infer/codegen", code)):
        for stream in (False, True):
            assert served.ask("POST", path, body | {"stream": stream})[0] == 200
    assert told[::2] == told[1::2] and min(told) > 100


def test_the_time_limit_frees_the_place(runs, monkeypatch):
    with ThreadPoolExecutor(2) as pool, serve(runs) as served:
        row = {"features": ROWS[0]}
        with served.held():
            monkeypatch.setattr(served.server, "settings", settings("x", request_timeout=0.3))
            asked = [pool.submit(served.refused, 504, f"/infer/{name}", row) for name in ("sft", "kd")]
            assert {future.result() for future in asked} == {
                "no answer within 0.3 s; send less, or raise REQUEST_TIMEOUT"
            }
            assert served.waiting() == 0
        wait_for(lambda: served.ask("POST", "/infer/sft", row)[0] == 200)


def test_a_client_that_goes_away_frees_its_place(runs):
    with serve(runs) as served, served.held():
        connection = served.connect()
        connection.request("POST", "/infer/kd", json.dumps({"features": ROWS[0]}), JSON)
        wait_for(lambda: served.waiting() == 1)
        connection.close()
        wait_for(lambda: served.waiting() == 0)


def test_an_abandoned_text_stops(served, monkeypatch):
    """The worker gives it up instead of writing it to its end."""
    served.post("/infer/sft", {"features": ROWS[0]})
    (process,) = served.processes
    answers = []
    on_answers = process.on_answers
    monkeypatch.setattr(process, "on_answers", lambda message: (answers.extend(message.answers), on_answers(message)))
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(served.refused, 504, "/v1/chat/completions", {"model": "base", **LONG})
        wait_for(served.busy)
        with served.stopped():
            served.expire()
            late.result()
    wait_for(lambda: answers)
    assert [type(answer) for answer in answers] == [Abandoned]


def test_an_api_key(runs):
    with serve(runs, api_key="s3cret") as served:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            status, answer, received = served.ask("GET", "/models", headers=headers)
            assert (status, received["www-authenticate"]) == (401, "Bearer")
            assert "send the API key as `Authorization: Bearer KEY`" in answer["error"]["message"]
        assert served.ask("GET", "/models", headers={"Authorization": "Bearer s3cret"})[0] == 200
        for path in ("/", "/healthz", "/docs", "/openapi.json"):
            assert served.ask("GET", path)[0] == 200


def test_without_a_key_only_its_own_names_are_answered_to(runs):
    """A name that somebody else has given this machine's address is none of them."""
    with serve(runs, allowed_hosts=("models.example",)) as served:
        good = ("localhost", f"127.0.0.1:{served.port}", "[::1]:8000", "10.1.2.3", "LOCALHOST:1", "models.example:80")
        for host in good:
            assert served.ask("GET", "/models", headers={"Host": host})[0] == 200, host
        for host in ("attacker.example", "localhost.attacker.example", "127.0.0.1.attacker.example:8000", "[x]"):
            status, answer, _ = served.ask("GET", "/models", headers={"Host": host})
            assert status == 403, host
            assert "set ALLOWED_HOSTS or API_KEY" in answer["error"]["message"]
            assert served.ask("GET", "/healthz", headers={"Host": host})[0] == 200
    with serve(runs, api_key="s3cret") as served:
        key = {"Authorization": "Bearer s3cret", "Host": "anything.example"}
        assert served.ask("GET", "/models", headers=key)[0] == 200


def test_a_body_that_is_too_large(runs):
    with serve(runs, max_body_bytes=1000) as served:
        large = {"features": "x" * 5_000_000}
        assert served.refused(413, "/infer/sft", large).startswith("the body is larger than 1,000 bytes")
        connection = served.connect()
        chunks = (b"x" * 600 for _ in range(3))
        connection.request("POST", "/infer/sft", chunks, JSON, encode_chunked=True)
        assert connection.getresponse().status == 413
        assert served.ask("GET", "/healthz")[0] == 200


CHAT = {"model": "base", "messages": [chat_turn("user")]}


@pytest.mark.parametrize(
    ("path", "body", "field", "message"),
    [
        ("/infer/sft", {}, "features", "features: Field required"),
        ("/infer/sft", {"features": 3}, "features", "features: Input should be a valid string"),
        ("/infer/sft", {"features": ""}, "features", "features: String should have at least 1 character"),
        ("/infer/sft", {"features": " \n"}, "features", "features: String should match pattern"),
        ("/infer/sft", {"features": "x" * 30_000}, "features", "features: String should have at most 20000 char"),
        ("/infer/sft", b'{"features": "\\ud800"}', "features", "features: Input should be a valid string"),
        ("/infer/sft", "a", "body", "body: Input should be a valid dictionary"),
        ("/infer/sft", [1], "body", "body: Input should be a valid dictionary"),
        ("/infer/sft/batch", [{"features": "a"}, {"features": None}], "1.features", "1.features: Input should be"),
        ("/infer/sft/batch", [], "body", "body: List should have at least 1 item"),
        ("/infer/sft/batch", [{"features": "a"}] * 1025, "body", "body: List should have at most 1024 items"),
        ("/infer/sft", {"features": "Age: " + "7 " * 3000}, None, "does not fit the model's context of 2048"),
        ("/infer/..", {"features": "a"}, "run", "'..' is not the name of a run"),
        ("/infer/idp", {"document": "a"}, "schema", "send a schema: there is no none.json, where IDP_SCHEMA says"),
        ("/infer/idp", {"document": "a", "schema": {"type": "no"}}, "schema", ""),
        ("/infer/idp", {"document": "a", "max_new_tokens": 0}, "max_new_tokens", "max_new_tokens: Input should be"),
        ("/infer/codegen", {"prompt": "a", "run": "../x"}, "run", "is not the name of a run"),
        ("/v1/chat/completions", {"model": "base", "messages": []}, "messages", "messages: List should have at least"),
        ("/v1/chat/completions", {"model": "a/b", "messages": [chat_turn("user")]}, "model", "not the name of a run"),
        ("/v1/chat/completions", {"model": "base", "messages": [chat_turn("tool")]}, "messages.0.role", ""),
        ("/v1/chat/completions", CHAT | {"tools": [{"type": "function"}]}, "tools", "tools: the models here call none"),
        ("/v1/chat/completions", CHAT | {"functions": [{}]}, "functions", "functions: the models here call none"),
        ("/v1/chat/completions", CHAT | {"logprobs": True}, "logprobs", "logprobs: answers have none here"),
        ("/v1/chat/completions", CHAT | {"top_logprobs": 2}, "top_logprobs", "top_logprobs: answers have none here"),
    ],
)  # fmt: skip
def test_bad_input_names_its_field(served, path, body, field, message):
    status, answer, _ = served.ask("POST", path, body)
    assert status == 422, answer
    assert message in answer["error"]["message"]
    assert answer["error"]["param"] == field


def test_one_bad_row_among_others_fails_alone(runs, expected):
    with ThreadPoolExecutor(3) as pool, serve(runs, max_batch_tokens=8192) as served:
        with served.held():
            bad = pool.submit(served.refused, 422, "/infer/sft", {"features": "Age: " + "7 " * 2500})
            good = pool.submit(served.post, "/infer/sft", {"features": ROWS[1]})
            wait_for(lambda: served.waiting() == 2)
        same(good.result(), expected["sft"][1])
        assert "row 1 has" in bad.result()
        assert (served.waiting(), served.busy()) == (0, 0)


def test_a_fault_of_the_server_shows_no_trace(served, monkeypatch, capfd):
    monkeypatch.setattr(routes, "Classify", Faulty)
    status, answer, headers = served.ask("POST", "/infer/sft", {"features": "a"}, {"X-Request-ID": "my-id.7"})
    assert (status, headers["x-request-id"]) == (500, "my-id.7")
    assert "secret" not in json.dumps(answer)
    assert "Traceback" not in json.dumps(answer)
    logged = capfd.readouterr().err
    assert "request my-id.7 failed:" in logged
    assert "the secret of /etc/passwd" in logged
    monkeypatch.undo()
    assert served.post("/infer/sft", {"features": "a"})["prediction"] in LABELS


class Faulty(Classify):
    def run(self, view, payloads):
        raise RuntimeError("the secret of /etc/passwd")


def test_request_ids(served):
    first, second = (served.ask("GET", "/healthz")[2]["x-request-id"] for _ in range(2))
    assert first != second
    assert served.ask("GET", "/healthz", headers={"X-Request-ID": "abc"})[2]["x-request-id"] == "abc"
    assert served.ask("GET", "/healthz", headers={"X-Request-ID": 'a"b c'})[2]["x-request-id"] != 'a"b c'
    assert served.refused(404, "/infer/nope", {"features": "a"}).startswith("there is no run 'nope'; there are: base")
    assert served.refused(404, "/nothing", {}) == "Not Found"
    assert served.refused(400, "/infer/sft", b"{broken") == "the body is not JSON"
