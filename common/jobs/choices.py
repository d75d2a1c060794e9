"""What a job may be given: models and data that are in reach, and the defaults of each method's settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.jobs.checks import Reach
from common.jobs.folder import CHECKPOINTS
from common.jobs.request import METHODS, Planner, described
from common.models import adapters

DATA = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".jsonl.gz", ".csv.gz", ".json.gz")
OF_RUNS = {"config.json", "run.json", "task.json", "tokenizer.json", "tokenizer_config.json"}  # no data
DEPTH, MOST_FOLDERS, MOST = 4, 2000, 200


def choices(reach: Reach, planner: Planner) -> dict[str, Any]:
    """{"models": [path], "data": [{"path", "bytes"}], "defaults": {method: {setting: default}}}; blocking.

    Paths are as a request may name them, the newest first, of each kind at most `MOST`.
    """
    models, data = [], []
    for folder, files in _folders(reach):
        if "config.json" in files or adapters.is_adapter(folder):
            models.append(folder)
            continue
        models += [folder / name for name in files if name.endswith(".gguf")]
        data += [folder / name for name in files if name.endswith(DATA) and name not in OF_RUNS]
    newest = sorted(data, key=_changed, reverse=True)[:MOST]
    return {
        "models": [_named(path) for path in sorted(models, key=_changed, reverse=True)[:MOST]],
        "data": [{"path": _named(path), "bytes": path.stat().st_size} for path in newest if path.is_file()],
        "defaults": {method: defaults(planner, method) for method in METHODS},
    }


def defaults(planner: Planner, method: str) -> dict[str, Any]:
    """What each setting of a method is where a request leaves it out, as far as it has a fixed default."""
    fields = {name: described(action) for name, action in planner.fields(method).items()}
    return {name: about["default"] for name, about in fields.items() if "default" in about}


def _folders(reach: Reach) -> Iterator[tuple[Path, list[str]]]:
    """(a folder under an allowed root, the names of its files), those of no great depth; links are not followed."""
    seen = 0
    for root in reach.roots:
        for parent, folders, files in os.walk(root):
            depth = len(Path(parent).relative_to(root).parts)
            kept = (name for name in sorted(folders) if not name.startswith(".") and name != CHECKPOINTS)
            folders[:] = [] if depth >= DEPTH else kept
            seen += 1
            if seen > MOST_FOLDERS:
                return
            reached = [name for name in files if not name.startswith(".") and reach.local(os.path.join(parent, name))]
            if reached:
                yield Path(parent), reached


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _named(path: Path) -> str:
    """Below the folder in which the server stands as a relative path."""
    try:
        return str(path.relative_to(os.path.realpath(".")))
    except ValueError:
        return str(path)
