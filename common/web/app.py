"""What the servers share: request ids, API key, body limit, one shape of error, page, health, Prometheus.

`Guard` is one plain ASGI layer around the application. An error's body is `{"error": {"message", "type", "param",
"request_id"}}`, the shape of OpenAI's, so that their clients show the message.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hmac
import ipaddress
import itertools
import os
import re
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from common.cli import UserError, log
from common.web import docs_pages

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")  # what is taken over from a client; anything else is replaced
DRAIN = 32 << 20  # bytes of a refused body that are read, so that the client gets to see the answer
BODY_SECONDS = 60.0  # that the body of a request may take to arrive
INCLUDED = re.compile(r"^/\* (\w+\.(?:css|js)) \*/\n", re.MULTILINE)
MAX_FAULTS = 5  # of a body that breaks many rules, as many are named
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # buckets of every latency

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Refusal(enum.Enum):
    """Why a body was not taken."""

    TOO_LARGE = enum.auto()
    TOO_SLOW = enum.auto()


TOO_LARGE, TOO_SLOW = Refusal.TOO_LARGE, Refusal.TOO_SLOW


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    request_id: str


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class Problem(HTTPException):
    """An answer of `status` with one sentence; `param` names the field that is to blame.

    Args:
        retry_after: seconds, for the header of that name.
    """

    def __init__(self, status: int, message: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(status, message, {"Retry-After": str(retry_after)} if retry_after else None)
        self.param = param


def error_types(status: int) -> str:
    """OpenAI's name for the kind of an error."""
    if status in (401, 403):
        return "authentication_error"
    if status == 404:
        return "not_found_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def error_response(request_id: str, status: int, message: str, param: str | None = None, headers=None) -> JSONResponse:
    """The one shape of an error; half a character of a request that it quotes is replaced, as UTF-8 has none."""
    message, param = (text and text.encode(errors="replace").decode() for text in (message, param))
    detail = {"message": message, "type": error_types(status), "param": param, "request_id": request_id}
    return JSONResponse({"error": detail}, status, headers)


def responses(*statuses: int, own: Mapping[int, str] | None = None) -> dict[int, dict[str, Any]]:
    """For a route's `responses`: the errors it may answer with, beside those that `Guard` gives.

    Args:
        own: what a status means on this server, where that is not what it means on the inference server.
    """
    sentences = {
        404: "No such run or base; the message lists those there are",
        409: "The model on the disk cannot be used",
        422: "A field is missing or wrong; `param` names it",
        503: "The queue is full or the server is stopping; try again after `Retry-After` seconds",
        504: "The time limit of a request has passed",
    }
    sentences |= own or {}
    return {status: {"model": ErrorBody, "description": sentences[status]} for status in statuses}


ALWAYS = {
    400: {"model": ErrorBody, "description": "The body is not JSON"},
    401: {"model": ErrorBody, "description": "The API key is missing or wrong"},
    403: {"model": ErrorBody, "description": "No API key is set, and the Host header is none of ALLOWED_HOSTS"},
    408: {"model": ErrorBody, "description": "The body did not arrive in time"},
    413: {"model": ErrorBody, "description": "The body is too large"},
    500: {"model": ErrorBody, "description": "A fault of the server; its log names it under the request id"},
}


def request_id(request: Request) -> str:
    """The id of a request: the client's own `X-Request-ID`, where it is a plain one, else a new one."""
    return request.scope["state"]["request_id"]


OF_THE_SERVER = ("/healthz", "/readyz", "/metrics")  # asked for without a server's prefix


def open_paths(prefix: str = "") -> frozenset[str]:
    """Paths that need no API key: the page (it asks for the key), the API's description, health."""
    public = ("/", "/favicon.ico", "/openapi.json")
    return frozenset(("/healthz", "/readyz", *(prefix + path for path in public), *docs_pages.paths(prefix)))


def add_about(app: FastAPI, metrics: WebMetrics, page: Path, prefix: str = "") -> None:
    """The routes that every server has: its page at `prefix`/, pages on its API, /healthz, /metrics."""
    content = whole_page(page)
    docs_pages.add_docs_pages(app, prefix)

    @app.get(f"{prefix}/", response_class=HTMLResponse, include_in_schema=False)
    async def the_page() -> Response:
        return HTMLResponse(content, headers=PAGE_HEADERS)

    @app.get(f"{prefix}/favicon.ico", include_in_schema=False)
    async def favicon() -> Response:
        return Response(status_code=204)

    @app.get("/healthz")
    async def alive() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Prometheus' text format."""
        return metrics.page()


def whole_page(page: Path) -> str:
    """A page with the style sheets and scripts that it names, `/* NAME */` on a line, from beside it or from here."""

    def text(named: re.Match[str]) -> str:
        places = (folder / named[1] for folder in (page.parent, Path(__file__).parent))
        return next(file for file in places if file.is_file()).read_text(encoding="utf-8")

    return INCLUDED.sub(text, page.read_text(encoding="utf-8"))


class WebMetrics:
    """Requests and their latency by route, in a registry of their own (one per application)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("http_requests", "Answered requests.", ("route", "status"), registry=self.registry)
        self.seconds = Histogram(
            "http_request_seconds", "From request to answer.", ("route",), buckets=SECONDS, registry=self.registry
        )
        self._children: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    def observe(self, route: str, status: int, seconds: float) -> None:
        key = (route, status)
        if key not in self._children:  # looking a child up costs more than counting in it
            self._children[key] = (self.requests.labels(route, status), self.seconds.labels(route))
        counter, histogram = self._children[key]
        counter.inc()
        histogram.observe(seconds)

    def page(self) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


class Guard:
    """ASGI layer: gives the request its id, asks for the API key, bounds the body, turns an exception into a 500.

    The body is read here, within its limit, before the application runs: an exception from within `receive` would be
    taken for a broken body there. A large one is for `common.web.multipart` to read.

    Args:
        api_key: None lets everybody in who asks for a name in `hosts`, or for an address: a page elsewhere, to whose
            own name an attacker has given this machine's address, may not speak for its reader.
        open_paths: paths that need no key.
        streamed_paths: paths whose POST reads its body itself, within bounds of its own.
        hosts: names by which the server may be asked for; "*" for any.
        body_limits: bytes of a body by path, where that is not `max_body_bytes`.
    """

    def __init__(
        self,
        app,
        *,
        metrics: WebMetrics,
        max_body_bytes: int,
        api_key: str | None,
        open_paths: frozenset[str],
        streamed_paths: frozenset[str] = frozenset(),
        hosts: Sequence[str] = (),
        body_limits: Mapping[str, int] | None = None,
    ) -> None:
        self.body_limits = body_limits or {}
        self.app, self.metrics, self.max_body_bytes, self.open_paths = app, metrics, max_body_bytes, open_paths
        self.streamed_paths = streamed_paths
        self.api_key = api_key.encode() if api_key else None
        self.hosts = {"localhost", *hosts}
        self.first_part, self.numbers = secrets.token_hex(4).encode(), itertools.count(1)  # of the ids given here

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        own_id = given if REQUEST_ID.fullmatch(given) else b"%s-%x" % (self.first_part, next(self.numbers))
        scope.setdefault("state", {})["request_id"] = own_id.decode()
        limit = self.body_limits.get(scope["path"], self.max_body_bytes)
        status = 0

        async def send_with_id(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", own_id)]
            await send(message)

        async def refuse(status: int, message: str, **more) -> None:
            await error_response(own_id.decode(), status, message, **more)(scope, receive, send_with_id)

        try:
            if not self._may_pass(scope["path"], headers):
                challenge = {"WWW-Authenticate": "Bearer"}
                await refuse(401, "send the API key as `Authorization: Bearer KEY`", headers=challenge)
            elif not (scope["path"] in self.open_paths or self._is_asked_for(headers)):
                unnamed = (
                    "without an API_KEY this server answers to localhost and addresses; set ALLOWED_HOSTS or API_KEY"
                )
                await refuse(403, unnamed)
            elif scope["method"] == "POST" and scope["path"] in self.streamed_paths:
                await self.app(scope, receive, send_with_id)
            elif (body := await self._read_in_time(headers, receive, limit)) is TOO_SLOW:
                late = f"the body did not arrive within {BODY_SECONDS:g} s; send it faster, or send less"
                await refuse(408, late, headers={"Connection": "close"})
            elif body is TOO_LARGE:
                too_large = f"the body is larger than {limit:,} bytes; send less in one request"
                await refuse(413, too_large, headers={"Connection": "close"})
            else:
                pending = [{"type": "http.request", "body": body, "more_body": False}]

                async def replay() -> dict[str, Any]:
                    return pending.pop() if pending else await receive()

                await self.app(scope, replay, send_with_id)
        except Exception:
            log(f"request {own_id.decode()} failed:\n{traceback.format_exc()}")
            if status:
                raise  # the answer has begun: uvicorn cuts the connection
            await refuse(500, "the server failed; its log names the reason under this request id")
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "unmatched")
            self.metrics.observe(route, status, seconds)
            if status >= 400 and status != 503:  # a busy or starting server must not fill its log
                log(f"request {own_id.decode()}: {scope['method']} {route} {status} in {1000 * seconds:.1f} ms")

    def _may_pass(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self.api_key is None or path in self.open_paths:
            return True
        given = headers.get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.api_key)

    def _is_asked_for(self, headers: dict[bytes, bytes]) -> bool:
        """Whether the Host header names this server."""
        if self.api_key is not None or "*" in self.hosts:
            return True
        host = headers.get(b"host", b"").decode("latin-1").strip().lower()
        name = host.partition("]")[0][1:] if host.startswith("[") else host.partition(":")[0]
        if name in self.hosts:
            return True
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)
            return True
        return not host  # of HTTP/1.0, which no browser sends

    async def _read_in_time(self, headers: dict[bytes, bytes], receive: Receive, limit: int) -> bytes | Refusal:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return await self._read(headers, receive, limit)
        except TimeoutError:
            return TOO_SLOW

    async def _read(self, headers: dict[bytes, bytes], receive: Receive, limit: int) -> bytes | Refusal:
        """The whole body, unless it is too large (a part of it is read, or the client would not see the answer)."""
        chunks, size, more = [], 0, True
        length = headers.get(b"content-length", b"")
        too_large = length.isdigit() and int(length) > limit
        while more and size <= DRAIN:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            size += len(message.get("body", b""))
            too_large = too_large or size > limit
            if not too_large:
                chunks.append(message.get("body", b""))
            more = message.get("more_body", False)
        return TOO_LARGE if too_large else b"".join(chunks)


def add_error_handlers(app: FastAPI) -> None:
    """Every error of `app` in the one shape."""

    @app.exception_handler(HTTPException)
    async def on_problem(request: Request, error: HTTPException) -> Response:
        return error_response(
            request_id(request), error.status_code, str(error.detail), getattr(error, "param", None), error.headers
        )

    @app.exception_handler(RequestValidationError)
    async def on_validation(request: Request, error: RequestValidationError) -> Response:
        if error.body is not None and isinstance(error.body, bytes):
            return error_response(
                request_id(request),
                422,
                "send the body as JSON, with the header Content-Type: application/json",
                "body",
            )
        faults = []
        for fault in error.errors()[:MAX_FAULTS]:
            if fault["type"] == "json_invalid":
                return error_response(request_id(request), 400, "the body is not JSON")
            where = [str(part) for part in fault["loc"] if part not in ("body", "path", "query")]
            faults.append((".".join(where) or "body", fault["msg"]))
        message = "; ".join(f"{field}: {reason}" for field, reason in faults)
        return error_response(request_id(request), 422, message, faults[0][0])


class Environment:
    """Settings from environment variables, each checked as it is read.

    Raises (all of its methods):
        UserError: a value that is not of its kind.
    """

    def text(self, name: str, default: str | None = None) -> str | None:
        """A text; set but empty counts as not set."""
        return os.environ.get(name) or default

    def number(self, name: str, default: float, least: float = 0) -> float:
        text = self.text(name)
        try:
            value = default if text is None else float(text)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf"):
            raise UserError(f"{name}={text} is not a number of at least {least:g}; set it to one or unset it")
        return value

    def whole(self, name: str, default: int, least: int = 1) -> int:
        value = self.number(name, default, least)
        if value != int(value):
            raise UserError(f"{name}={value:g} is not a whole number; set it to one or unset it")
        return int(value)

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """One of `choices`; the first where nothing is set."""
        value = self.text(name, choices[0])
        if value not in choices:
            raise UserError(f"{name}={value} is none of {', '.join(choices)}; set it to one or unset it")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """A comma-separated list, in lower case."""
        return tuple(part.strip().lower() for part in (self.text(name) or "").split(",") if part.strip())

    def switch(self, name: str) -> bool:
        """Off unless set to something else than 0, false, no or off."""
        return (self.text(name) or "0").lower() not in ("0", "false", "no", "off")
