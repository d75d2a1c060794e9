"""OpenAI's `/v1/files`, and the same upload at `/files` for everybody else."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, Field

from common.jobs import files
from common.jobs.service import Service
from common.web import app as web
from common.web import multipart
from common.web.app import Problem

SENTENCES = {
    404: "No such file",
    409: "A job that has not ended needs the file",
    422: "A field is missing or wrong, or a row of the file is; the message names its line",
}
UPLOADS = ("/files", "/v1/files")  # where bodies are streamed
ANCHOR = "created_at"  # what a file's time is counted from
FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "JSONL, JSON, CSV, Parquet or text"},
        "purpose": {"type": "string", "enum": [files.FINE_TUNE], "default": files.FINE_TUNE},
        "expires_after[anchor]": {"type": "string", "enum": [ANCHOR]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
    },
}


class FileObject(BaseModel):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: str
    status_details: str | None = Field(description="Keys of its rows that are not read")
    sha256: str
    rows: int | None = Field(description="None of running text and of a file of results")


class FileList(BaseModel):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    id: str
    object: Literal["file"]
    deleted: bool


def responses(*statuses: int) -> dict[int, dict[str, Any]]:
    return web.responses(*statuses, own=SENTENCES)


def page_of(entries: list[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """OpenAI's list: those that follow the entry of id `after`. Raises Problem 404 where there is none."""
    start = 0
    if after is not None:
        start = next((number for number, entry in enumerate(entries, 1) if entry["id"] == after), 0)
        if not start:
            raise Problem(404, "after: there is no such entry", "after")
    shown = entries[start : start + limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(entries) > start + limit,
    }


def add_files(router: APIRouter, service: Service) -> None:
    """The routes."""
    store = service.files
    body = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}}

    async def upload(request: Request) -> Response:
        """Send a file of rows, as a form. It is streamed to the disk, and every row of it is checked."""
        refuse_other_sites(request)
        await asyncio.to_thread(service.delete_expired_files)
        incoming = await asyncio.to_thread(store.receive)
        try:
            form = await multipart.receive(request, "file", incoming.write)
            purpose, expires = purpose_of(form), expiry_of(form)
            file = await asyncio.to_thread(incoming.keep, form.filename, purpose, expires)
        finally:
            await asyncio.to_thread(incoming.close)
        return JSONResponse(files.as_object(file))

    for path in UPLOADS:
        router.post(path, response_model=FileObject, responses=responses(422, 503), openapi_extra=body)(upload)

    @router.get("/v1/files", response_model=FileList, responses=responses(404, 422))
    def list_files(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> Response:
        """The files, the newest first unless `order` says otherwise."""
        stored = [files.as_object(file) for file in store.files() if purpose in (None, file.purpose)]
        return JSONResponse(page_of(stored if order == "asc" else stored[::-1], after, limit))

    @router.get("/v1/files/{file_id}", response_model=FileObject, responses=responses(404))
    def retrieve(file_id: str) -> Response:
        """What is known of a file."""
        return JSONResponse(files.as_object(service.file(file_id)))

    @router.get(
        "/v1/files/{file_id}/content",
        response_class=Response,
        responses={200: {"content": {"application/octet-stream": {}}, "description": "As it was sent"}}
        | {206: {"content": {"application/octet-stream": {}}, "description": "The range that was asked for"}}
        | {416: {"description": "The file has no such range"}}
        | responses(404),
    )
    def content(file_id: str) -> Response:
        """The file, byte for byte."""
        file = service.file(file_id)
        headers = {"ETag": f'"{file.sha256}"', "X-Content-Type-Options": "nosniff"}
        return FileResponse(
            store.path(file), media_type="application/octet-stream", filename=file.filename, headers=headers
        )

    @router.delete("/v1/files/{file_id}", response_model=Deleted, responses=responses(404, 409))
    def delete(file_id: str) -> Response:
        """Delete a file that no job waits for."""
        service.delete_file(file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})


def refuse_other_sites(request: Request) -> None:
    """A form needs no leave of the browser, so a page elsewhere could send one in its reader's name.

    Raises:
        Problem: 403.
    """
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise Problem(403, "the page of another site may send no files here")


def purpose_of(form: multipart.Form) -> str:
    """Raises Problem 422 for a purpose that files have no use for here."""
    purpose = form.fields.get("purpose", files.FINE_TUNE)
    if purpose != files.FINE_TUNE:
        raise Problem(422, f"purpose: must be {files.FINE_TUNE}; files are for trainings here", "purpose")
    return purpose


def expiry_of(form: multipart.Form) -> float | None:
    """When the file goes, in seconds since 1970. Raises Problem 422."""
    anchor, seconds = (form.fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor not in (None, ANCHOR):
        raise Problem(422, f"expires_after: the anchor must be {ANCHOR}", "expires_after")
    if anchor is None and seconds is None:
        return None
    if not (seconds and re.fullmatch("[0-9]{4,7}", seconds) and 3600 <= int(seconds) <= 2_592_000):
        raise Problem(422, "expires_after: seconds must be between 3,600 and 2,592,000", "expires_after")
    return time.time() + int(seconds)
