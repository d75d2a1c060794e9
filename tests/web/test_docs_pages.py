"""The pages on an API's description need nothing from elsewhere."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from support.http_server import Client, run_app
from support.pages import new_page

from common.web import app as web
from common.web import docs_pages
from common.web.app import Guard, WebMetrics

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    app = FastAPI(title="An API", docs_url=None, redoc_url=None, openapi_url="/v1/openapi.json")
    docs_pages.add_docs_pages(app, "/v1")

    @app.get("/v1/things", summary="List all things")
    async def things() -> list[str]:
        return []

    metrics, paths = WebMetrics(), web.open_paths("/v1")
    app.add_middleware(Guard, metrics=metrics, max_body_bytes=1000, api_key="key", open_paths=paths)
    with run_app(app) as (_, port):
        yield Client(port)


@pytest.mark.parametrize("path", docs_pages.paths("/v1"))
def test_they_are_here_and_need_no_key(client, path):
    status, content, headers = client.ask("GET", path)
    assert (status, len(content) > 300) == (200, True)
    if path in ("/v1/docs", "/v1/redoc"):
        assert "connect-src 'self'" in headers["content-security-policy"]
        assert re.findall(r'(?:src|href)="(?!/v1/)', content) == []
    else:
        status, _, headers = client.ask("GET", path, headers={"Accept-Encoding": "br"})
        assert "content-encoding" not in headers


def test_assets_are_sent_compressed(client):
    connection = client.connect()
    connection.request("GET", "/v1/assets/swagger-ui.css", headers={"Accept-Encoding": "gzip"})
    answer = connection.getresponse()
    assert answer.getheader("content-encoding") == "gzip"
    assert b"swagger-ui" in gzip.decompress(answer.read())


@pytest.mark.parametrize("path", ["/v1/docs", "/v1/redoc"])
def test_they_show_the_api_offline(client, browser, path):
    page = new_page(browser)
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(client.url + path)
    page.get_by_text("List all things").first.wait_for()
    assert [url for url in asked if not url.startswith((client.url, "data:", "blob:"))] == []
    assert faults == []
    page.close()
