"""What the server and a model's process say to each other; `channel` carries it.

To the process: `Start` first, then `QueuedRequest`, `Withdraw`, `KeepVersions`, `Close`. From it: `Broken`, `State`,
`Loaded`, `Taken`, `Text`, `Encoder`, `EncodesWith`, `Answers`, `Beat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.cli import UserError
from common.models.tokenizers import PromptEncoder
from common.serving.run_registry import Version
from common.tasks.ranking.task import LabelTask


class Unusable(UserError):
    """The model on the disk cannot be loaded or used; no fault of a request."""


class Abandoned(Exception):
    """Nobody waits for the batch any more."""


class Fault(Exception):
    """A programming error in a model's process; its text is the traceback there."""


@dataclass(frozen=True)
class HostSettings:
    """How models are loaded and batched.

    Attributes:
        max_batch_tokens: of a forward pass.
        max_wait: seconds that a batch short of its budget waits for company.
        max_queue: rows that may wait.
        task: the label task.
        num_null_prompts: how many of the task's null inputs make a prior; None for all.
        runs_dir: folder of the runs.
        load_in_4bit: "auto", "on" or "off".
        auto_fit: where memory is short, take a smaller batch or 4 bits, and say so.
    """

    max_batch_tokens: int
    max_wait: float
    max_queue: int
    task: LabelTask
    num_null_prompts: int | None
    runs_dir: str
    load_in_4bit: str = "auto"
    auto_fit: bool = False


# To a model's process.


@dataclass(frozen=True)
class Start:
    """What to load.

    Attributes:
        base: folder or Hub id.
        adapters: about how many there will be on it, to tell whether the memory is enough.
    """

    base: str
    settings: HostSettings
    adapters: int


@dataclass(frozen=True)
class Withdraw:
    """Nobody waits any more for the request with this number."""

    number: int


@dataclass(frozen=True)
class KeepVersions:
    """Which versions of a run may stay loaded."""

    name: str
    versions: list[Version]


@dataclass(frozen=True)
class Close:
    """Answer what was accepted, then end."""


# From a model's process.


@dataclass(frozen=True)
class Broken:
    """Why the base cannot be loaded. The process ends once the server has closed the channel."""

    reason: str


@dataclass(frozen=True)
class State:
    """What is loaded, sent whenever it changes.

    Attributes:
        base_hash: `adapters.fingerprint` of the base; None while it is not loaded, and for an export.
        views: the versions that are loaded, and whether their prior is known.
        gpu_bytes: what torch has allocated.
    """

    base_hash: str | None = None
    views: dict[Version, bool] = field(default_factory=dict)
    gpu_bytes: int = 0


@dataclass(frozen=True)
class Loaded:
    """How long it took to load something; `kind` is "base", "adapter" or "prior"."""

    kind: str
    name: str
    seconds: float


@dataclass(frozen=True)
class Beat:
    """The process is alive: sent now and then in the middle of its work, and for every `Withdraw`."""


@dataclass(frozen=True)
class Taken:
    """The requests with these numbers are being worked on as one batch."""

    numbers: list[int]


@dataclass(frozen=True)
class Text:
    """A part of the answer to the request with this number, as it is written."""

    number: int
    text: str


@dataclass(frozen=True)
class Encoder:
    """A way to make prompts tokens, under a number of its own."""

    number: int
    encoder: PromptEncoder


@dataclass(frozen=True)
class EncodesWith:
    """Which encoder makes a version's prompts tokens."""

    version: Version
    number: int


@dataclass(frozen=True)
class Answers:
    """The answers to a batch, or to some of it, in the order of its numbers; an answer can be an exception.

    Attributes:
        beside: how many other requests were worked on with them.
    """

    numbers: list[int]
    answers: Sequence[Any]
    beside: int = 0
