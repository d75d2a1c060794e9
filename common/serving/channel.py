"""Messages between the server and a model's process (see `messages`), pickled, over a pair of sockets.

Both ends are this program, started by one another; nothing of a client's is ever unpickled.
"""

from __future__ import annotations

import pickle
import select
import socket
import struct
from collections.abc import Iterator
from typing import Any

HEAD = struct.Struct("!Q")  # the length of what follows
CHUNK = 1 << 18  # bytes read at a time


def pack(message: Any) -> bytes:
    """A message as it travels."""
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return HEAD.pack(len(body)) + body


class Unpacker:
    """Bytes, as they arrive, to messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that `data` completes."""
        self._buffer += data
        while len(self._buffer) >= HEAD.size:
            (length,) = HEAD.unpack_from(self._buffer)
            if len(self._buffer) < HEAD.size + length:
                return
            body = bytes(memoryview(self._buffer)[HEAD.size : HEAD.size + length])
            del self._buffer[: HEAD.size + length]
            yield pickle.loads(body)


class Channel:
    """The end of a process that does one thing after the other; the server's is in `common.serving.model_process`."""

    def __init__(self, end: socket.socket) -> None:
        self._end, self._unpacker = end, Unpacker()

    def send(self, message: Any) -> None:
        """Raises BrokenPipeError or ConnectionResetError where nobody listens any more."""
        self._end.sendall(pack(message))

    def receive(self, wait: float | None) -> Iterator[Any]:
        """What has arrived; waits for it up to `wait` seconds, None without end.

        Raises:
            EOFError: the other end is gone.
        """
        for message in self._unpacker.feed(b""):  # left by a caller that wanted no more
            wait = 0.0
            yield message
        while select.select([self._end], [], [], wait)[0]:
            data = self._end.recv(CHUNK)
            if not data:
                raise EOFError
            yield from self._unpacker.feed(data)
            wait = 0.0
