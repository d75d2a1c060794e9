"""Exports that nobody has compared with their run (`export_model.py --no_proof`): what their files say of it.

A GGUF and an ONNX file say it in their own metadata, and every export in its export.json.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from common.cli import log
from common.models import gguf_import
from common.models.gguf_file import UNPROVEN_KEY

RECORD_KEY = "unproven"  # of export.json


def is_unproven(folder: str | Path) -> bool:
    """Whether a model folder is an export without a proof, or was made of a GGUF that is one.

    Of an ONNX file that has lost its export.json its own session knows (`OnnxModel.unproven`).
    """
    for name in (gguf_import.EXPORT_RECORD, gguf_import.ORIGIN):
        if _record(Path(folder) / name).get(RECORD_KEY) is True:
            return True
    return False


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def warn_of(folder: str | Path, unproven: bool | None = None) -> None:
    """Say once in a process that an export has no proof.

    Args:
        unproven: whether it has none, where that is known; None: as its folder says.
    """
    if is_unproven(folder) if unproven is None else unproven:
        _say(str(folder))


@functools.cache
def _say(folder: str) -> None:
    log(
        f"{folder} is unproven: it was exported with --no_proof, and nobody has compared its answers with the run's; "
        f"{UNPROVEN_KEY} in the file says so"
    )
