"""Models as the server's event loop sees them: a process for each base, requests to it, answers that come back.

What happens in such a process is in `adapter_host`. Everything here is for the event loop's thread alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import subprocess
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from common import processes
from common.cli import log
from common.serving.batch_queue import QueuedRequest
from common.serving.channel import Unpacker, pack
from common.serving.messages import (
    Answers,
    Broken,
    Close,
    Encoder,
    EncodesWith,
    HostSettings,
    KeepVersions,
    Loaded,
    Start,
    State,
    Taken,
    Text,
    Unusable,
    Withdraw,
)
from common.serving.run_registry import Version, base_key

RETRY = 10.0  # seconds until a base that could not be loaded is tried again
CLOSING = 30.0  # seconds that a process has for what it has accepted when the server stops
MAX_ENCODED = 20_000  # characters of a request whose prompts are encoded here
MAX_BACKLOG = 64 << 20  # bytes of requests that a model's process has not read yet; beyond, the queue counts as full


class QueueFull(Exception):
    """No room for another request."""


class Gone(Exception):
    """The model's process has ended before it answered; it can be started again."""


def launch(end: socket.socket) -> subprocess.Popen:
    """Start a model's process at the other end of `end`; it ends when that is closed, or when this process ends.

    It has a session of its own, so that Ctrl-C
    in a terminal reaches the server alone, which has answers to wait for.
    """
    return subprocess.Popen(
        processes.module_command("common.serving.adapter_host", str(end.fileno()), str(os.getpid())),
        env=processes.module_environment(),
        pass_fds=[end.fileno()],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


@dataclass(eq=False)
class Pending:
    """A request whose answer is waited for.

    Attributes:
        answer: set to what the model's process makes of it, an exception included.
        emit: called with the parts of an answer that is sent as it is written.
        waits: in the queue; else it is being worked on.
    """

    queued: QueuedRequest
    answer: asyncio.Future
    emit: Callable[[str], None] | None
    waits: bool = True


class ModelProcess(asyncio.Protocol):
    """A process with one base model.

    Args:
        base: folder or Hub id.
        adapters: about how many there will be on it.
        on_batch: called with the key and the rows of each batch that is done, or of which a text is.
        on_loaded: called for each thing that was loaded.
        after: a process that is closing; its memory is waited for.

    Attributes:
        rows: that wait.
        busy: requests that are being worked on.
        broken: why the base cannot be loaded, or that its process has ended over it.
    """

    def __init__(
        self,
        base: str,
        settings: HostSettings,
        adapters: int,
        *,
        on_batch: Callable[[Hashable, int], None],
        on_loaded: Callable[[Loaded], None],
        after: ModelProcess | None = None,
    ) -> None:
        self.base, self.settings = base, settings
        self.on_batch, self.on_loaded = on_batch, on_loaded
        self.rows = self.busy = 0
        self.loaded = False
        self.state = State()
        self.broken: Unusable | Gone | None = None
        self.broken_since = -math.inf
        self.process: Any = None
        self._closing = self._killed = False
        self._silent = False  # it was ended because it did not answer
        self._owing: float | None = None  # since when it has been silent though it owes an answer
        self._numbers = 0
        self._pending: dict[int, Pending] = {}
        self._kept_versions: dict[str, list[Version]] = {}  # of each run, as the process knows them
        self._encoders: dict[int, Callable[[str], list[int] | None]] = {}
        self._encodes: dict[Version, int] = {}  # which of them does for a version
        self._unpacker = Unpacker()
        self._transport: asyncio.Transport | None = None
        self._unsent = [pack(Start(base, settings, adapters))]
        self._lost = asyncio.Event()
        self.closed = asyncio.ensure_future(self._run(after))

    # What the server does with it.

    def put(
        self,
        version: Version,
        work: Any,
        payload: Any,
        *,
        rows: int = 1,
        tokens: int = 0,
        emit: Callable[[str], None] | None = None,
        versions: Sequence[Version] = (),
    ) -> Pending:
        """Hand a request in.

        Args:
            versions: those of the version's run that may stay loaded.

        Raises:
            QueueFull: more rows wait than MAX_QUEUE, or more bytes than are reasonable.
            Unusable: the base could not be loaded.
            Gone: its process has just ended.
        """
        if self.closed.done():
            reason = self.broken or Gone(f"the process of {self.base} has ended; send the request again")
            raise type(reason)(str(reason))  # a new one: each raise of one exception would lengthen its traceback
        if self.full():
            raise QueueFull
        if self._kept_versions.get(version.name) != (current := [*versions]):
            self._kept_versions[version.name] = current
            for old in [old for old in self._encodes if old.name == version.name and old not in current]:
                del self._encodes[old]
            self._send(KeepVersions(version.name, current))
        self._numbers += 1
        queued = QueuedRequest(self._numbers, (version, work), payload, rows, tokens, work.urgent)
        pending = Pending(queued, asyncio.get_running_loop().create_future(), emit)
        self._pending[queued.number] = pending
        self.rows += rows
        self._owing = self._owing or time.monotonic()
        self._send(queued)
        return pending

    def withdraw(self, pending: Pending) -> None:
        """Give up on a request: its place is free at once if it still waits, else the worker stops when it can."""
        if self._pending.pop(pending.queued.number, None):
            self._leave_queue(pending)
            self._send(Withdraw(pending.queued.number))

    def full(self) -> bool:
        """Whether there is no room for another request."""
        backlog = self._transport.get_write_buffer_size() if self._transport else sum(map(len, self._unsent))
        return self.rows >= self.settings.max_queue or backlog > MAX_BACKLOG

    def encode(self, version: Version, prompts: Sequence[str]) -> list[str | list[int]]:
        """Each prompt as token ids, so that the model's process need not, where this process can; else as it is.

        Only of a small request that there is room for: the event loop does nothing else meanwhile.
        """
        encode = self._encoders.get(self._encodes.get(version))
        if encode is None or sum(map(len, prompts)) > MAX_ENCODED or self.full():
            return list(prompts)
        return [encode(prompt) or prompt for prompt in prompts]

    def close(self) -> None:
        """Take no more requests; those that were accepted are still done. `closed` is done at the process's end."""
        self._closing = True
        self._owing = self._owing or time.monotonic()  # its end
        self._send(Close())

    def kill(self) -> None:
        """End the process at once, whatever it does; one that has not been started yet never is."""
        self._killed = True
        if self.process and not self.closed.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)

    def end_if_silent(self, seconds: float) -> None:
        """End the process where it has owed an answer, and has shown no sign of life, for so long.

        One that loads its base is left alone: that is a single step, and can take long.
        """
        if self.loaded and self._owing is not None and time.monotonic() - self._owing > seconds:
            self._silent = True
            self.kill()

    # What comes from the process.

    def receive(self, message: Any) -> None:
        """One message of the process."""
        self._receive(message)
        self._owing = time.monotonic() if self.busy or self._pending or self._closing else None

    def _receive(self, message: Any) -> None:
        match message:
            case Answers():
                self.on_answers(message)
            case Taken(numbers):
                self.busy += len(numbers)
                for number in numbers:
                    if pending := self._pending.get(number):
                        self._leave_queue(pending)
            case Text(number, text):
                if (pending := self._pending.get(number)) and pending.emit:
                    pending.emit(text)
            case State():
                self.state, self.loaded = message, True
            case Loaded():
                self.on_loaded(message)
            case Encoder(number, encoder):
                self._encoders[number] = encoder.load()  # a third of a second for 150,000 tokens, once
            case EncodesWith(version, number):
                self._encodes[version] = number
            case Broken(reason):
                self.on_broken(Unusable(reason))

    def on_answers(self, message: Answers) -> None:
        self.busy -= len(message.numbers)
        answered = [self._pending.pop(number, None) for number in message.numbers]
        if waited_for := [pending for pending in answered if pending]:
            self.on_batch(waited_for[0].queued.key, sum(pending.queued.rows for pending in waited_for) + message.beside)
        for pending, answer in zip(answered, message.answers, strict=True):
            if pending and not pending.answer.done():
                pending.answer.set_result(answer)

    def on_broken(self, reason: Unusable | Gone) -> None:
        self.broken, self.broken_since = reason, time.monotonic()
        if self._transport:
            self._transport.close()  # which it waits for, so that this message is not lost

    # asyncio's side of the sockets.

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        transport.write(b"".join(self._unsent))
        self._unsent.clear()

    def data_received(self, data: bytes) -> None:
        for message in self._unpacker.feed(data):
            self.receive(message)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost.set()

    def _send(self, message: Any) -> None:
        if self._lost.is_set() or (self._transport and self._transport.is_closing()):
            return  # the process has ended; `_run` answers for it
        if self._transport:
            self._transport.write(pack(message))
        else:
            self._unsent.append(pack(message))

    def _leave_queue(self, pending: Pending) -> None:
        self.rows -= pending.queued.rows if pending.waits else 0
        pending.waits = False

    async def _run(self, after: ModelProcess | None) -> None:
        """The life of the process, from its start to the answers that it owes at its end."""
        if after:
            await asyncio.wait([after.closed])
        reason = Gone(f"the process of {self.base} could not be started")
        try:
            if self._killed:
                return
            ours, theirs = socket.socketpair()
            with contextlib.ExitStack() as unless_connected:
                unless_connected.callback(ours.close)
                with theirs:
                    self.process = launch(theirs)
                unless_connected.pop_all()
            await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=ours)
            await self._lost.wait()
            code = await asyncio.to_thread(self.process.wait)
            reason = self.broken or Gone(self._ending(code))
        except OSError as error:
            reason = Gone(f"the process of {self.base} could not be started ({error.strerror})")
        finally:
            if not (self.loaded or self.broken or self._closing):  # it ended while it was loading: not at once again
                self.on_broken(reason)
            self.loaded, self.state = False, State()
            if self._pending:
                log(str(reason))
            for pending in self._pending.values():
                self._leave_queue(pending)
                if not pending.answer.done():
                    pending.answer.set_result(reason)
            self._pending.clear()
            self.busy, self._owing = 0, None

    def _ending(self, code: int | None) -> str:
        """How the process ended, in words."""
        how = f"code {code}"
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                how = signal.Signals(-code).name
            how += ", as where memory runs out" if code == -signal.SIGKILL else ""
        ended = "did not answer and was ended" if self._silent else f"ended ({how})"
        return f"the process of {self.base} {ended}; the next request starts it again"


class Models:
    """The bases in memory, at most `most`; the least recently used leaves first.

    Args:
        start: makes the process of a base, once another one that is closing has ended.
    """

    def __init__(self, most: int, start: Callable[[str, ModelProcess | None], ModelProcess]) -> None:
        self.most, self._start = most, start
        self._processes: OrderedDict[str, ModelProcess] = OrderedDict()
        self._leaving: list[ModelProcess] = []

    def get(self, base: str) -> ModelProcess:
        """The process of a base; started where there is none, where it has ended, or failed to load a while ago."""
        key = base_key(base)
        process = self._processes.pop(key, None)
        leaving = None
        if process is None or (process.closed.done() and time.monotonic() - process.broken_since > RETRY):
            if process is None and len(self._processes) >= self.most:
                going = min(
                    self._processes, key=lambda other: not self._processes[other].closed.done()
                )  # one that ended
                leaving = self._processes.pop(going)
                log(f"the base {leaving.base} leaves memory to make room for {base}")
                leaving.close()
                self._leaving.append(leaving)
            process = self._start(base, leaving)
        self._processes[key] = process
        return process

    def base_hash(self, base: str) -> str | None:
        """The fingerprint of a base that is in memory."""
        process = self._processes.get(base_key(base))
        return process.state.base_hash if process else None

    def all(self) -> list[ModelProcess]:
        """The processes there are, the least recently used first; some may still be loading."""
        return list(self._processes.values())

    def running(self) -> list[ModelProcess]:
        """Those that have not ended: of `all`, and those that are leaving, whose memory others wait for."""
        self._leaving = [process for process in self._leaving if not process.closed.done()]
        return [*self._leaving, *(process for process in self.all() if not process.closed.done())]

    async def close(self) -> None:
        """Finish what was accepted and stop; nobody waits for what still loads, or hangs."""
        processes = self.running()
        for process in processes:
            process.close() if process.loaded else process.kill()
        if processes:
            _, hanging = await asyncio.wait([process.closed for process in processes], timeout=CLOSING)
            for process in processes if hanging else ():
                process.kill()
            await asyncio.wait([process.closed for process in processes])
