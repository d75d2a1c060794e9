"""The pages on an API's description, /docs (Swagger UI) and /redoc, without anything from elsewhere.

Both programs lie in assets/, as their makers publish them, compressed: swagger-ui-dist 5.35.0 (Apache-2.0) and
redoc 2.5.4 (MIT), without the address of a picture that its page would load from its maker.
"""

from __future__ import annotations

import gzip
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import Response

ASSETS = Path(__file__).with_name("assets")
KINDS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "redoc.standalone.js": "text/javascript",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self' 'unsafe-inline'; script-src 'self' "
    "'unsafe-inline'; connect-src 'self'; img-src 'self' data:; font-src data:; worker-src blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}


def paths(prefix: str = "") -> list[str]:
    """What is served here."""
    return [f"{prefix}/docs", f"{prefix}/redoc", *(f"{prefix}/assets/{name}" for name in KINDS)]


def add_docs_pages(app: FastAPI, prefix: str = "") -> None:
    """The routes of `paths`; `app` must have been made without its own."""

    @app.get(f"{prefix}/docs", include_in_schema=False)
    async def swagger_ui() -> Response:
        page = get_swagger_ui_html(
            openapi_url=app.openapi_url,
            title=app.title,
            swagger_js_url=f"{prefix}/assets/swagger-ui-bundle.js",
            swagger_css_url=f"{prefix}/assets/swagger-ui.css",
            swagger_favicon_url=f"{prefix}/favicon.ico",
        )
        page.headers.update(HEADERS)
        return page

    @app.get(f"{prefix}/redoc", include_in_schema=False)
    async def redoc() -> Response:
        page = get_redoc_html(
            openapi_url=app.openapi_url,
            title=app.title,
            redoc_js_url=f"{prefix}/assets/redoc.standalone.js",
            redoc_favicon_url=f"{prefix}/favicon.ico",
            with_google_fonts=False,
        )
        page.headers.update(HEADERS)
        return page

    for name, kind in KINDS.items():
        app.get(f"{prefix}/assets/{name}", include_in_schema=False)(_asset(name, kind))


def _asset(name: str, kind: str):
    compressed = (ASSETS / f"{name}.gz").read_bytes()

    async def asset(request: Request) -> Response:
        headers = {"Cache-Control": "public, max-age=86400", "Vary": "Accept-Encoding"}
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(compressed, media_type=kind, headers=headers | {"Content-Encoding": "gzip"})
        return Response(gzip.decompress(compressed), media_type=kind, headers=headers)

    return asset
