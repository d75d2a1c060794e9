"""Schemas of requests, checked in processes that are ended when one takes them too long (see `helpers`)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections import OrderedDict
from typing import Any

from common.serving.helpers import HelperEnded, Helpers

REMEMBERED = 1024  # schemas whose answer is known
BRIEFLY = 60.0  # seconds for which an answer is known that a busy moment may have caused


class SchemaChecks:
    """Whether decoding can follow a schema, for the event loop's thread alone."""

    def __init__(self, helpers: Helpers | None = None) -> None:
        self.helpers = helpers or Helpers("common.generation.schema_worker", {"schema": True})
        self._known: OrderedDict[bytes, tuple[float, str | None]] = OrderedDict()  # and until when
        self._checking: dict[bytes, asyncio.Task[str | None]] = {}

    async def fault(self, schema: Any) -> str | None:
        """Why decoding cannot follow a schema, in one sentence; None where it can.

        Raises:
            QueueFull: too many schemas wait to be checked, or no process for it could be started in time.
        """
        try:
            key = hashlib.sha256(json.dumps(schema, allow_nan=False).encode()).digest()
        except ValueError:
            return "the schema holds a number that is not finite, which JSON has none of; give finite ones"
        until, fault = self._known.get(key, (-math.inf, None))
        if time.monotonic() < until:
            self._known.move_to_end(key)
            return fault
        if key not in self._checking:
            self._checking[key] = asyncio.create_task(self._check(key, schema))
        return await asyncio.shield(self._checking[key])  # others may wait for it when one client goes away

    async def _check(self, key: bytes, schema: Any) -> str | None:
        lasts = BRIEFLY
        try:
            fault = (await self.helpers.ask({"schema": schema}))["error"]
            lasts = math.inf
        except TimeoutError:
            fault = f"the schema takes longer than {self.helpers.seconds:g} s to check; make it smaller or simpler"
        except HelperEnded:
            fault = "the schema ends the process that checks it; simplify it"
        finally:
            del self._checking[key]
        self._known[key] = time.monotonic() + lasts, fault
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return fault

    async def close(self) -> None:
        """End the processes; checks that are under way fail."""
        await self.helpers.close()
        await asyncio.gather(*self._checking.values(), return_exceptions=True)
