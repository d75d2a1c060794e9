"""Schemas of requests, checked in processes that are ended when one takes them too long.

Nothing of a client's schema is worked on in the server's own process: a small schema can be made to take for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections import OrderedDict
from typing import Any

from common import processes
from common.serving.model_process import QueueFull

SECONDS = 5.0  # that a schema may take
START_SECONDS = 60.0  # that the process may take to start and answer for the first time
WORKERS = 2
MAX_WAITING = 16  # checks; beyond, further ones are refused
REMEMBERED = 1024  # schemas whose answer is known


class SchemaChecks:
    """Whether decoding can follow a schema, for the event loop's thread alone.

    Args:
        command: of the process that checks; see `common.generation.schema_worker`.
        seconds: that it may take for one schema.
    """

    def __init__(self, command: list[str] | None = None, seconds: float = SECONDS) -> None:
        default = processes.module_command("common.generation.schema_worker", str(os.getpid()))
        self.command, self.seconds = command or default, seconds
        self.late = f"the schema takes longer than {seconds:g} s to check; make it smaller or simpler"
        self._known: OrderedDict[bytes, str | None] = OrderedDict()
        self._checking: dict[bytes, asyncio.Task[str | None]] = {}
        self._idle: list[asyncio.subprocess.Process] = []
        self._free = asyncio.Semaphore(WORKERS)

    async def fault(self, schema: Any) -> str | None:
        """Why decoding cannot follow a schema, in one sentence; None where it can.

        Raises:
            QueueFull: too many schemas wait to be checked.
        """
        line = json.dumps({"schema": schema}).encode() + b"\n"
        key = hashlib.sha256(line).digest()
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        if key not in self._checking:
            if len(self._checking) >= MAX_WAITING:
                raise QueueFull
            self._checking[key] = asyncio.create_task(self._check(key, line))
        return await asyncio.shield(self._checking[key])  # others may wait for it when one client goes away

    async def _check(self, key: bytes, line: bytes) -> str | None:
        try:
            async with self._free:
                fault = await self._ask(line)
            self._known[key] = fault
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
            return fault
        finally:
            del self._checking[key]

    async def _ask(self, line: bytes) -> str | None:
        """What a process says of a request's line."""
        if self._idle:
            worker, seconds = self._idle.pop(), self.seconds
        else:
            worker, seconds = await self._start(), START_SECONDS
        healthy = False
        try:
            if seconds == START_SECONDS:  # its imports take a while, which are not the schema's
                await asyncio.wait_for(self._answer(worker, b'{"schema": true}\n'), seconds)
            answer = await asyncio.wait_for(self._answer(worker, line), self.seconds)
            healthy = bool(answer)
            return json.loads(answer)["error"] if answer else "the schema ends the process that checks it; simplify it"
        except TimeoutError:
            return self.late
        except (BrokenPipeError, ConnectionResetError):
            return "the schema ends the process that checks it; simplify it"
        finally:
            if healthy:
                self._idle.append(worker)
            else:
                await _end(worker)

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self.command,
            env=processes.module_environment(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal reaches the server alone
        )

    async def _answer(self, worker: asyncio.subprocess.Process, line: bytes) -> bytes:
        worker.stdin.write(line)
        await worker.stdin.drain()
        return await worker.stdout.readline()

    async def close(self) -> None:
        """End the processes; checks that are under way fail."""
        for task in list(self._checking.values()):
            task.cancel()
        await asyncio.gather(*self._checking.values(), return_exceptions=True)
        while self._idle:
            await _end(self._idle.pop())


async def _end(worker: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        worker.kill()
    await worker.wait()
