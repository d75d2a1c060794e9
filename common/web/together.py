"""Two applications behind one port, for clients that know one address: each keeps its guard, its life and its paths."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount

from common.web.app import OF_THE_SERVER, Receive, Scope, Send


def together(main: FastAPI, other: FastAPI, prefix: str, moved: Sequence[str]) -> Starlette:
    """One application of two.

    Args:
        other: whose paths all begin with `prefix`; what it has without (`OF_THE_SERVER`) is asked for under it, too.
        moved: paths that are asked for without the prefix, and are the other's, with all that is below them; of one
            like "DELETE /v1/models" only what is asked for with that method.
    """

    ways = [(method, path) for method, _, path in (way.rpartition(" ") for way in moved)]
    own = {prefix + path: path for path in OF_THE_SERVER}

    def is_below(path: str, *parents: str) -> bool:
        return any(path == parent or path.startswith(f"{parent}/") for parent in parents)

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in own:
            await other({**scope, "path": own[path], "raw_path": own[path].encode()}, receive, send)
        elif is_below(path, *(parent for method, parent in ways if method in ("", scope.get("method")))):
            raw = prefix.encode() + scope.get("raw_path", path.encode())
            await other({**scope, "path": prefix + path, "raw_path": raw}, receive, send)
        else:
            await (other if is_below(path, prefix) else main)(scope, receive, send)

    @asynccontextmanager
    async def lives(app: Starlette) -> AsyncIterator[None]:
        async with main.router.lifespan_context(main), other.router.lifespan_context(other):
            yield

    return Starlette(routes=[Mount("", app=dispatch)], lifespan=lives)
