"""Where jobs run, as the runner sees it: what every backend can do, and what it says of a job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from common.jobs.store import Job

GONE = "gone"  # of a job: nothing is at work on it, and nothing was heard of its end


@dataclass(frozen=True)
class Device:
    """What a job runs on.

    Attributes:
        cuda: whether it is a card.
        size: bytes of its memory; None where they are not known.
    """

    cuda: bool
    size: int | None


@dataclass(frozen=True)
class Ended:
    """How an attempt at a job ended.

    Attributes:
        state: succeeded, failed or cancelled.
        error: {"reason", "exit_code", "log"} of one that failed.
        artifacts: {"path", "bytes", "sha256"} of each file that it left.
    """

    state: str
    error: dict[str, Any] | None = None
    artifacts: list[dict[str, Any]] = field(default_factory=list)


class Backend(Protocol):
    """A machine or a cluster that runs jobs.

    Attributes:
        first_state: of a job that has just been handed over: running, or queued where a cluster decides.
        device: what one job gets.
    """

    first_state: str
    device: Device

    def start(self, job: Job) -> None:
        """Begin an attempt, or go on with the one that was begun. Raises OSError where that is not possible."""
        ...

    def look(self, job: Job) -> str | Ended:
        """QUEUED, RUNNING, GONE, or how the attempt ended."""
        ...

    def stop(self, job: Job) -> None:
        """Ask the job to stop; called again until it has ended."""
        ...

    def forget(self, job: Job) -> None:
        """After a job has ended: nothing that it started goes on."""
        ...

    def close(self) -> None:
        """The server stops; jobs go on."""
        ...
