"""Processes that do for the server what can take for ever, and are ended when it does.

Nothing of a client's schema or document that takes more than one pass is worked on in the server's own process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from typing import Any

from common import processes
from common.serving.model_process import QueueFull

SECONDS = 5.0  # that a request may take
START_SECONDS = 60.0  # that a process may take to start and answer for the first time
WORKERS = 2
MAX_WAITING = 16  # requests; beyond, further ones are refused
MOST_BYTES = 256 << 20  # of one answer


class HelperEnded(Exception):
    """The process ended before it answered."""


class NotStarted(QueueFull):
    """No process could be started in time: a matter of the machine at this moment, not of the request."""


class Helpers:
    """At most `WORKERS` processes of one kind, for the event loop's thread alone.

    Args:
        module: whose process answers lines (see `processes.answer_lines`).
        greeting: a request that it answers at once; its imports take a while, which are not the first client's.
        seconds: that it may take for one request.

    Attributes:
        command: of the process.
    """

    def __init__(self, module: str, greeting: Any, seconds: float = SECONDS) -> None:
        self.command, self.seconds = processes.module_command(module, str(os.getpid())), seconds
        self.greeting = greeting
        self._idle: list[asyncio.subprocess.Process] = []
        self._free = asyncio.Semaphore(WORKERS)
        self._asked: set[asyncio.Task] = set()

    async def ask(self, request: Any) -> Any:
        """What a process answers.

        Raises:
            QueueFull: too many requests wait, or no process could be started in time (`NotStarted`).
            TimeoutError: it took longer than `seconds`, and was ended.
            HelperEnded: it ended without an answer.
        """
        if len(self._asked) >= MAX_WAITING:
            raise QueueFull
        task = asyncio.create_task(self._ask(_line(request)))
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)
        return await task

    async def _ask(self, line: bytes) -> Any:
        async with self._free:
            worker = self._idle.pop() if self._idle else await self._start()
            answer = b""
            try:
                answer = await asyncio.wait_for(_answer(worker, line), self.seconds)
            finally:
                if answer:
                    self._idle.append(worker)
                else:
                    await _end(worker)
            if not answer:
                raise HelperEnded
            return json.loads(answer)

    async def _start(self) -> asyncio.subprocess.Process:
        """A process that has answered its greeting. Raises NotStarted."""
        worker = await asyncio.create_subprocess_exec(
            *self.command,
            env=processes.module_environment(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal reaches the server alone
            limit=MOST_BYTES,
        )
        greeted = b""
        try:
            greeted = await asyncio.wait_for(_answer(worker, _line(self.greeting)), START_SECONDS)
        except TimeoutError:
            raise NotStarted from None
        finally:
            if not greeted:
                await _end(worker)
        if not greeted:
            raise NotStarted
        return worker

    async def close(self) -> None:
        """End the processes; requests that are under way fail."""
        for task in list(self._asked):
            task.cancel()
        await asyncio.gather(*self._asked, return_exceptions=True)
        while self._idle:
            await _end(self._idle.pop())


def _line(request: Any) -> bytes:
    return json.dumps(request).encode() + b"\n"


async def _answer(worker: asyncio.subprocess.Process, line: bytes) -> bytes:
    """The line that a process answers; empty where it has ended."""
    try:
        worker.stdin.write(line)
        await worker.stdin.drain()
    except (BrokenPipeError, ConnectionResetError):
        return b""
    return await worker.stdout.readline()


async def _end(worker: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        worker.kill()
    await worker.wait()
