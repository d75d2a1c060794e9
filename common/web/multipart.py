"""multipart/form-data as it arrives: small fields into memory, one file to whoever takes its bytes.

Starlette's own form parser writes every file to the folder for temporary ones first, which may be memory, and knows no
limit of its size.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from common.web.app import DRAIN, Problem

MAX_FIELDS = 1 << 16  # bytes of all that is no file: headers, names, values
STALL_SECONDS = 60.0  # that a body may stand still, all in all,
SLOWEST = 10_000  # beside a second for so many bytes


class Form:
    """The state of one form.

    Args:
        name: of the field that is the file.
        write: takes the file's bytes, piece by piece.

    Attributes:
        fields: {name: text} of what is no file.
        filename: as the client calls the file; None before it has come.
    """

    def __init__(self, boundary: bytes, name: str, write: Callable[[bytes], None]) -> None:
        self.name, self.write = name, write
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._held = 0
        self._header: list[bytes] = [b"", b""]
        self._disposition = b""
        self._field, self._value, self._is_file = "", b"", False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._add(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._add(1, data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._open,
                "on_part_data": lambda data, start, end: self._take(data[start:end]),
                "on_part_end": self._close,
                "on_end": self._finish,
            },
        )
        self.complete = False

    def feed(self, chunk: bytes) -> None:
        """The next piece of the body. Raises Problem 400, and what `write` raises."""
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            raise Problem(400, f"the body is no multipart/form-data ({error})") from error

    def _begin(self) -> None:
        self._header, self._disposition, self._value = [b"", b""], b"", b""

    def _hold(self, data: bytes) -> bytes:
        self._held += len(data)
        if self._held > MAX_FIELDS:
            raise Problem(413, f"the fields beside the file are larger than {MAX_FIELDS:,} bytes; send less")
        return data

    def _add(self, part: int, data: bytes) -> None:
        self._header[part] += self._hold(data)

    def _end_header(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = self._header[1]
        self._header = [b"", b""]

    def _open(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._field = options.get(b"name", b"").decode(errors="replace")
        self._is_file = self._field == self.name
        if self._is_file:
            if self.filename is not None:
                raise Problem(422, f"{self.name}: send one file in a request", self.name)
            self.filename = options.get(b"filename", b"").decode(errors="replace")

    def _take(self, data: bytes) -> None:
        if self._is_file:
            self.write(data)
        else:
            self._value += self._hold(data)

    def _close(self) -> None:
        if not self._is_file:
            self.fields[self._field] = self._value.decode(errors="replace")

    def _finish(self) -> None:
        self.complete = True


async def receive(request: Request, name: str, write: Callable[[bytes], None]) -> Form:
    """Read a form, whose file's bytes go to `write` in a thread.

    Raises:
        Problem: 400 for a body that is none or was cut off, 408 for one that comes too slowly, 422 without a file,
            and what `write` raises, after a part of what is left has been read, so that the client sees the answer.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise Problem(422, f"{name}: send a form (multipart/form-data) with the file in it", name)
    form = Form(options[b"boundary"], name, write)
    stream, started, received = request.stream(), time.monotonic(), 0
    try:
        while True:
            left = started + STALL_SECONDS + received / SLOWEST - time.monotonic()
            async with asyncio.timeout(left):
                chunk = await anext(stream, None)
            if chunk is None:
                break
            received += len(chunk)
            await asyncio.to_thread(form.feed, chunk)
    except TimeoutError:
        raise closing(Problem(408, "the file comes too slowly; send it again")) from None
    except ClientDisconnect:
        raise Problem(400, "the upload was cut off; send it again") from None
    except Problem as problem:
        await drain(stream)
        raise closing(problem) from None
    if not form.complete:
        raise Problem(400, "the form has no end; send it again")
    if form.filename is None:
        raise Problem(422, f"{name}: the form has no file of this name", name)
    return form


def closing(problem: Problem) -> Problem:
    """The same, with which the connection ends: what else it brings belongs to a refused body."""
    problem.headers = {**(problem.headers or {}), "Connection": "close"}
    return problem


async def drain(stream) -> None:
    """Read and forget some of a refused body, or its client would not see why."""
    read = 0
    try:
        async with asyncio.timeout(STALL_SECONDS):
            async for chunk in stream:
                read += len(chunk)
                if read > DRAIN:
                    return
    except (TimeoutError, ClientDisconnect):
        return
