"""Connections that bring no request: dropped after a while, and when one client has too many.

uvicorn waits for ever for the head of a request. `PatientProtocol` waits for some seconds; also

    uvicorn serve_creditmix:app --http common.web.connections:PatientProtocol

The body is waited for by `common.web.app.Guard`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_SECONDS = 10.0  # that a client has for the line and the headers of a request
MAX_INCOMPLETE = 500  # connections of one client, perhaps a proxy of many, that have not brought a whole request yet


class PatientProtocol(AutoHTTPProtocol):
    """uvicorn's protocol with a time limit for the head of a request, and a bound of connections without a request."""

    incomplete: dict[tuple[int, str], dict[PatientProtocol, None]] = {}  # noqa: RUF012 (by event loop and address)

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait_for_head()  # of the first request, or of the next one
        elif self.cycle.more_body:
            self._stop_timer()  # it counts on, among those that are incomplete
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self._timer is not None:  # it counts from the first byte: one that trickles in gains no time
            return
        self._timer = self.loop.call_later(HEAD_SECONDS, self._drop)
        waiting = self.incomplete.setdefault(self._client_key(), {})
        waiting[self] = None
        if len(waiting) > MAX_INCOMPLETE:
            next(iter(waiting))._drop()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_waiting(self) -> None:
        self._stop_timer()
        waiting = self.incomplete.get(self._client_key(), {})
        waiting.pop(self, None)
        if not waiting:
            self.incomplete.pop(self._client_key(), None)

    def _drop(self) -> None:
        self._stop_waiting()
        self.transport.abort()

    def _client_key(self) -> tuple[int, Any]:
        return id(self.loop), self.client[0] if self.client else None
