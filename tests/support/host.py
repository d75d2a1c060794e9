"""A model's process without a process: its host, and a channel that has all messages at once."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from common.serving.adapter_host import Host
from common.serving.batch_queue import QueuedRequest
from common.serving.messages import Answers, Close, HostSettings


class Messages:
    """A channel without another end: `coming` is received, what is sent is kept."""

    def __init__(self, *coming) -> None:
        self.coming, self.sent = list(coming), []

    def send(self, message) -> None:
        self.sent.append(message)

    def receive(self, wait):
        coming, self.coming = self.coming, []
        return iter(coming)

    def last(self, kind: type):
        return next(message for message in reversed(self.sent) if isinstance(message, kind))

    @property
    def answers(self) -> list:
        """The answers in the order in which they were sent."""
        return [answer for message in self.sent if isinstance(message, Answers) for answer in message.answers]

    @property
    def answers_by_number(self) -> dict[int, Any]:
        """The answers by the numbers of their requests."""
        sent = [message for message in self.sent if isinstance(message, Answers)]
        return {
            number: answer for message in sent for number, answer in zip(message.numbers, message.answers, strict=True)
        }


def serve_requests(
    base: str, settings: HostSettings, requests: Sequence[tuple[tuple, Any]], adapters: int = 3
) -> Messages:
    """The messages of a host that gets requests, as (key, payload) and numbered from 0, and is closed."""
    queued = [QueuedRequest(number, key, payload) for number, (key, payload) in enumerate(requests)]
    messages = Messages(*queued, Close())
    Host(base, settings, adapters, messages).serve()
    gc.unfreeze()  # it is not alone in this process
    return messages
