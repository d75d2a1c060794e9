"""A model's process from the inside, in the test's own process: messages in, messages out."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from common.serving.adapter_host import Host
from common.serving.batch_queue import QueuedRequest
from common.serving.messages import Answers, Close, HostSettings


class Messages:
    """A channel without another end: all messages come at once, and what is sent is kept."""

    def __init__(self, *coming) -> None:
        self.coming, self.sent = list(coming), []

    def send(self, message) -> None:
        self.sent.append(message)

    def receive(self, wait):
        coming, self.coming = self.coming, []
        return iter(coming)

    def last(self, kind: type):
        return next(message for message in reversed(self.sent) if isinstance(message, kind))

    def numbered(self) -> list[tuple[int, Any]]:
        """(number of the request, answer) in the order in which they were sent."""
        batches = [message for message in self.sent if isinstance(message, Answers)]
        return [pair for batch in batches for pair in zip(batch.numbers, batch.answers, strict=True)]

    def answers(self) -> list[Any]:
        """In the order in which they were sent."""
        return [answer for _, answer in self.numbered()]


def answers_to(host: Host, requests: Sequence[QueuedRequest], later: dict[int, list] | None = None) -> dict[int, Any]:
    """The answers by number, to what waits at once and to what comes later.

    Args:
        later: what comes once it was looked so many times.
    """
    host.channel = Later()
    host.channel.later = later or {}
    for request in requests:
        host.queue.put(request)
    while host.queue:
        host.begin(host.queue.take())
    return dict(host.channel.numbered())


class Later(Messages):
    """What comes once it was looked so many times."""

    def __init__(self) -> None:
        super().__init__()
        self.later, self.looks = {}, 0

    def receive(self, wait):
        self.looks += 1
        self.coming += self.later.pop(self.looks, [])
        return super().receive(wait)


def run_host(base: str, settings: HostSettings, asked: Sequence[tuple[Any, Any]], adapters: int = 3) -> Messages:
    """The messages of a process that is asked all at once, and closed.

    Args:
        asked: (key, payload) of each request.
    """
    requests = [
        QueuedRequest(number, key, payload, urgent=key[1].urgent) for number, (key, payload) in enumerate(asked)
    ]
    messages = Messages(*requests, Close())
    Host(base, settings, adapters, messages).serve()
    gc.unfreeze()  # it is not alone in this process
    return messages
