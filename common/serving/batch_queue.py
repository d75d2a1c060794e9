"""A queue that hands its requests out in batches: those that may share a forward pass leave together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class QueuedRequest:
    """A request on its way to a model.

    Attributes:
        number: no other request to its process has it.
        key: (version, work); requests with equal keys may share a batch.
        payload: what the worker needs.
        rows: how many it takes of the queue.
        tokens: about how much of a batch's budget it takes.
        urgent: may be taken while the worker is in the middle of something longer.
        arrived: by the machine's monotonic clock, which all its processes share.
        abandoned: nobody waits for its answer any more.
        sent: so many characters of its answer have left as they came, and do not once more when it is tried again.
    """

    number: int
    key: Hashable
    payload: Any
    rows: int = 1
    tokens: int = 0
    urgent: bool = True
    arrived: float = field(default_factory=time.monotonic)
    abandoned: bool = False
    sent: int = 0


class BatchQueue:
    """First come, first served by the oldest request; everything with its key comes along, up to a token budget.

    Where those with its key are less than half a forward pass, and others wait that may share their batch, it is one
    pass of those that came first, whatever their key.

    For one thread alone: the worker fills it between two batches and, while it writes a text, between two tokens.

    Args:
        max_batch_tokens: of a batch; one request always goes.
        max_wait: seconds that a batch short of its budget waits for company.
        kin: requests may share a batch whose keys it makes the same; by default those with equal keys.

    Attributes:
        pass_tokens: of a batch of several keys.
    """

    def __init__(
        self, max_batch_tokens: int, max_wait: float = 0.0, kin: Callable[[Hashable], Hashable] = lambda key: key
    ) -> None:
        self.max_batch_tokens, self.max_wait, self._kin = max_batch_tokens, max_wait, kin
        self.pass_tokens = max_batch_tokens
        self._lanes: dict[Hashable, deque[QueuedRequest]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def put(self, request: QueuedRequest) -> None:
        self._lanes.setdefault(request.key, deque()).append(request)

    def withdraw(self, number: int) -> bool:
        """Take a request out that nobody waits for any more; False where it is not here."""
        for key, lane in self._lanes.items():
            for request in lane:
                if request.number == number:
                    lane.remove(request)
                    self._tidy(key)
                    return True
        return False

    def due(self) -> float | None:
        """Seconds until the next batch is to leave, 0 for at once; None where nothing waits."""
        lane = self._oldest()
        if lane is None:
            return None
        if not self.max_wait:
            return 0.0
        lanes = self._kindred(lane)
        if sum(request.tokens for lane in lanes for request in lane) >= self._most(lanes):
            return 0.0
        return max(0.0, lane[0].arrived + self.max_wait - time.monotonic())

    def take(self, *, urgent: bool = False) -> list[QueuedRequest]:
        """The next batch, or the next of `urgent` ones alone; empty when there is none."""
        lane = self._oldest((lambda request: request.urgent) if urgent else lambda request: True)
        if lane is None:
            return []
        lanes = self._kindred(lane)
        batch, room = [], self._most(lanes)
        while lanes:
            lane = min(lanes, key=lambda lane: lane[0].arrived)
            if batch and lane[0].tokens > room:
                break
            room -= lane[0].tokens
            batch.append(lane.popleft())
            self._tidy(batch[-1].key)
            lanes = [lane for lane in lanes if lane]
        return batch

    def join(self, key: Hashable, room: int) -> list[QueuedRequest]:
        """Requests that may enter a batch which is being worked on, as kin of a key in it, up to so many tokens.

        None once a request waits that came before them and needs a batch of its own: it has its turn when this one has
        ended.
        """
        joining: list[QueuedRequest] = []
        while lane := self._oldest(lambda request: not request.urgent):
            if lane[0].tokens > room or self._kin(lane[0].key) != self._kin(key):
                break
            room -= lane[0].tokens
            joining.append(lane.popleft())
            self._tidy(joining[-1].key)
        return joining

    def _kindred(self, lane: deque[QueuedRequest]) -> list[deque[QueuedRequest]]:
        """The lanes that are to share a batch with this one, itself included; a pass that is half full by itself gains
        nothing by company."""
        if 2 * sum(request.tokens for request in lane) >= self.pass_tokens:
            return [lane]
        kin = self._kin(lane[0].key)
        return [other for key, other in self._lanes.items() if other is lane or self._kin(key) == kin]

    def _most(self, lanes: list[deque[QueuedRequest]]) -> int:
        """Tokens of a batch of these lanes."""
        return self.max_batch_tokens if len(lanes) == 1 else self.pass_tokens

    def _oldest(self, fits: Callable[[QueuedRequest], bool] = lambda request: True) -> deque[QueuedRequest] | None:
        lanes = [lane for lane in self._lanes.values() if fits(lane[0])]
        return min(lanes, key=lambda lane: lane[0].arrived) if lanes else None

    def _tidy(self, key: Hashable) -> None:
        if not self._lanes[key]:
            del self._lanes[key]
