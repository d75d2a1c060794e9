"""teacher_generate.py in tests: a chat API that misbehaves on demand, and what a run wrote."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import teacher_generate
from common import cli
from common.tasks.ranking.creditmix import CREDITMIX
from support.processes import LONGEST

SCHEMA = {
    "type": "object",
    "properties": {"company": {"type": "string"}, "total": {"type": "number"}},
    "required": ["company", "total"],
    "additionalProperties": False,
}
PATHS = ("/v1/chat/completions", "/v1/decisions", "/v1/systemone")
CUT, HANG = "cut the connection", "never answer"


class Patient(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # the default of 5 makes clients wait a second for their connection

    def handle_error(self, request, client_address) -> None:
        """A client that went away is none of our business."""


class Stub:
    """A server of OpenAI's chat API.

    `reply(body)` gives the text of the answer, or (status, headers, body bytes), or how to misbehave. `asked` are the
    bodies and `headers` the headers that came, `answered` the prompts that got an answer.
    """

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
                reply = stub.reply(body) if self.path in PATHS else (404, {}, b"no such path")
                if reply == HANG:
                    stub.release.wait(LONGEST)
                if reply in (CUT, HANG):
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                status, headers, content = reply if isinstance(reply, tuple) else (200, {}, completion(reply))
                self.send_response(status)
                for name, value in {"content-length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
                if status == 200:
                    asked = (
                        body["messages"][-1]["content"] if "messages" in body else body.get("input", body.get("state"))
                    )
                    stub.answered.append(asked)

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
