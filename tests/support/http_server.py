"""Ports, an application on one of its own in a thread of this process, and a client that talks to it."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from support.processes import LONGEST

_tries = itertools.count(os.getpid())


def free_port() -> int:
    """A port for a server that is started with its number.

    It is below those that Linux gives to whoever asks for any, and each worker of pytest has a range of its own: until
    the server listens, nobody else does.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 10_000 + 1000 * (worker % 20) + next(_tries) % 1000
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


class Client:
    """Requests to a server on this machine."""

    def __init__(self, port: int) -> None:
        self.port = port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONGEST)

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """(status, JSON or text, headers); `body` as JSON unless it is bytes."""
        connection = self.connect()
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, sent, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        received = dict(answer.getheaders())
        is_json = answer.getheader("content-type", "").startswith("application/json")
        return answer.status, json.loads(content) if is_json else content.decode(), received

    def post(self, path: str, body: Any) -> Any:
        """The answer to a request that must succeed."""
        status, answer, _ = self.ask("POST", path, body)
        assert status == 200, answer
        return answer

    def refused(self, status: int, path: str, body: Any, method: str = "POST") -> str:
        """The message of an error of this status, in the one shape of errors."""
        answered, answer, headers = self.ask(method, path, body)
        assert answered == status, answer
        assert set(answer["error"]) == {"message", "type", "param", "request_id"}
        assert answer["error"]["request_id"] == headers["x-request-id"]
        return answer["error"]["message"]


@contextlib.contextmanager
def run_app(app) -> Iterator[tuple[Any, int]]:
    """(uvicorn's server, its port) of an application; stopped at the end as by a signal."""
    import uvicorn

    from common.web.connections import PatientProtocol

    config = uvicorn.Config(
        app, port=0, log_level="warning", access_log=False, http=PatientProtocol, timeout_keep_alive=LONGEST
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        yield server, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(LONGEST)
    assert not thread.is_alive()
