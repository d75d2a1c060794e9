"""Connections that bring no request, half of one, or one very slowly, take nobody else's place."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from fastapi import FastAPI, Request
from support.http_server import Client, run_app
from support.processes import LONGEST, wait_for

from common.web import app as web
from common.web import connections
from common.web.app import Guard, WebMetrics

pytestmark = pytest.mark.processes


@pytest.fixture
def client() -> Iterator[Client]:
    app = FastAPI()
    web.add_error_handlers(app)

    @app.post("/echo")
    async def echo(request: Request) -> str:
        return (await request.body()).decode()

    @app.get("/healthz")
    async def alive() -> str:
        return "alive"

    metrics = WebMetrics()
    app.add_middleware(Guard, metrics=metrics, max_body_bytes=1000, api_key=None, open_paths=frozenset())
    with run_app(app) as (_, port):
        yield Client(port)


def connect(client: Client, text: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=LONGEST)
    connection.sendall(text)
    return connection


def received(connection: socket.socket, end: bytes) -> bytes:
    """What comes, up to `end`: head and body may come in pieces."""
    text = b""
    while end not in text and (part := connection.recv(4000)):
        text += part
    return text


def is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_idle_connections_leave_the_server_reachable(client, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 2.0)
    monkeypatch.setattr(connections, "MAX_INCOMPLETE", 100)
    idle = [connect(client) for _ in range(300)]
    assert client.ask("GET", "/healthz")[0] == 200
    wait_for(lambda: sum(map(is_closed, idle)) >= 300 - connections.MAX_INCOMPLETE)  # the oldest
    wait_for(lambda: all(map(is_closed, idle)))
    assert connections.PatientProtocol.incomplete == {}


@pytest.mark.parametrize("answered", [False, True])
def test_half_a_head_is_not_waited_for(client, monkeypatch, answered):
    """Nor after a request that was answered, nor when more of it trickles in."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.6)
    connection = connect(client)
    if answered:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in connection.recv(1000)
    connection.sendall(b"GET /healthz HTTP/1.1\r\n")
    started = time.monotonic()
    while not is_closed(connection):
        assert time.monotonic() - started < LONGEST
        time.sleep(0.1)
        try:
            connection.sendall(b"X: 1\r\n")
        except OSError:
            break


def test_half_a_body_is_refused(client, monkeypatch):
    monkeypatch.setattr(web, "BODY_SECONDS", 0.4)
    connection = connect(client, b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nabc")
    answer = received(connection, b"send less")
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"the body did not arrive within 0.4 s; send it faster, or send less" in answer


def test_half_bodies_of_one_client_are_bounded(client, monkeypatch):
    monkeypatch.setattr(connections, "MAX_INCOMPLETE", 5)
    half = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\na"
    oldest, *others = [connect(client, half) for _ in range(6)]
    wait_for(lambda: is_closed(oldest))
    assert not any(map(is_closed, others))
    for connection in others:
        connection.setblocking(True)
        connection.sendall(b"bc")
        assert b"200 OK" in connection.recv(4000)  # its body may come in another piece
    assert connections.PatientProtocol.incomplete == {}


def test_requests_in_time_are_answered(client, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.5)
    connection = connect(client)
    parts = (b"POST /echo HTTP/1.1\r\nHost: localhost\r\n", b"Content-Length: 3\r\n\r\na", b"bc")
    for part, pause in zip(parts, (0.1, 1.6, 0), strict=True):  # the body comes after the time for the head
        connection.sendall(part)
        time.sleep(pause)
    assert received(connection, b'"abc"').endswith(b'"abc"')
