"""Messages between the server and a model's process: whole, in order, however the bytes arrive."""

from __future__ import annotations

import itertools
import socket

import pytest

from common.serving.channel import Channel, Unpacker, pack

MESSAGES = [("job", {"rows": [1.5, None, "é"]}), ("close",), ("text", 7, "x" * 100_000)]


@pytest.mark.parametrize("size", [1, 7, 10_000, 1 << 20])
def test_messages_survive_any_cuts(size):
    data = b"".join(pack(message) for message in MESSAGES)
    unpacker = Unpacker()
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    assert [message for part in parts for message in unpacker.feed(part)] == MESSAGES


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), theirs


def test_all_that_has_arrived_is_read_at_once(ends):
    channel, other = ends
    assert list(channel.receive(0)) == []
    for message in MESSAGES[:2]:
        other.sendall(pack(message))
    assert list(channel.receive(None)) == MESSAGES[:2]
    channel.send(("done", [1]))
    assert list(Unpacker().feed(other.recv(1000))) == [("done", [1])]


def test_what_a_reader_leaves_is_there_for_the_next(ends):
    """Else a job that came along with the start would wait for the next message."""
    channel, other = ends
    other.sendall(b"".join(pack(("job", number)) for number in range(3)))
    assert next(channel.receive(None)) == ("job", 0)
    assert list(itertools.islice(channel.receive(None), 2)) == [("job", 1), ("job", 2)]


def test_an_end_that_is_gone_is_said(ends):
    channel, other = ends
    other.close()
    with pytest.raises(EOFError):
        list(channel.receive(None))
    with pytest.raises(OSError, match="Broken pipe"):
        channel.send(("done",))
