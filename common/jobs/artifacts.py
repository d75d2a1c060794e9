"""Downloads of what a job left: the one way from a requested path to a file, and the answer with it."""

from __future__ import annotations

import mimetypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import FileResponse, Response

NEVER_CHANGES = "private, max-age=31536000, immutable"


def locate(folder: Path, artifacts: Sequence[dict[str, Any]], path: str) -> tuple[Path, dict[str, Any]] | None:
    """(file, its entry) of a path that is on the list, lies in the folder, and is the file it was; else None.

    A path on the list has no `..` and no link in it, since the worker walked there; but somebody may have put a link
    in a file's place since then.
    """
    entry = next((entry for entry in artifacts if entry["path"] == path), None)
    if entry is None:
        return None
    root = os.path.realpath(folder)
    file = os.path.join(root, path)
    if os.path.realpath(file) != file or os.path.commonpath([root, file]) != root:
        return None
    if not os.path.isfile(file) or os.path.getsize(file) != entry["bytes"]:
        return None
    return Path(file), entry


def answer(request: Request, file: Path, entry: dict[str, Any]) -> Response:
    """The file, or the range of it that was asked for, under its SHA-256 as ETag; 304 to one who has it."""
    headers = {"ETag": f'"{entry["sha256"]}"', "Cache-Control": NEVER_CHANGES, "X-Content-Type-Options": "nosniff"}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if headers["ETag"] in known or "*" in known:
        return Response(status_code=304, headers=headers)
    kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    return FileResponse(file, media_type=kind, filename=file.name, headers=headers)
