"""Two applications behind one port."""

from __future__ import annotations

from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from common.web.together import together


def application(name: str, path: str, log: list[str]) -> FastAPI:
    """Says its name under `path` and all that is below."""

    @asynccontextmanager
    async def lifespan(app):
        log.append(f"{name} begins")
        yield
        log.append(f"{name} ends")

    app = FastAPI(lifespan=lifespan)

    @app.get("/readyz")
    def ready() -> list[str]:
        return [name, "ready"]

    @app.delete(path + "/{rest:path}")
    @app.get(path + "/{rest:path}")
    def answer(rest: str, request: Request) -> list[str]:
        return [name, rest, request.url.query]

    return app


def test_each_has_its_paths_and_its_life():
    log: list[str] = []
    one, other = application("one", "", log), application("other", "/training", log)
    with TestClient(together(one, other, "/training", ["/v1/files", "DELETE /v1/models"])) as client:
        assert log == ["one begins", "other begins"]
        for path, name, rest in (
            ("/", "one", ""),
            ("/v1/chat", "one", "v1/chat"),
            ("/v1/files", "other", "v1/files"),
            ("/v1/files/a%20b", "other", "v1/files/a b"),
            ("/v1/filesystem", "one", "v1/filesystem"),
            ("/training/jobs", "other", "jobs"),
            ("/trainings", "one", "trainings"),
        ):
            assert client.get(f"{path}?a=1").json() == [name, rest, "a=1"]
        assert client.get("/v1/models/a").json()[0] == "one"
        assert client.delete("/v1/models/a").json()[:2] == ["other", "v1/models/a"]
        assert client.delete("/v1/modelsets/a").json()[0] == "one"
        assert client.get("/readyz").json() == ["one", "ready"]
        assert client.get("/training/readyz").json() == ["other", "ready"]  # which it has without its prefix
        assert client.get("/training/readyz/x").json()[:2] == ["other", "readyz/x"]
    assert log[2:] == ["other ends", "one ends"]
