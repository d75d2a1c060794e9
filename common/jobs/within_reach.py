"""What lies under the folders that a service allows: walked, of no great depth, with links left alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.jobs.folder import CHECKPOINTS
from common.models import adapters

if TYPE_CHECKING:
    from common.jobs.checks import Reach

DEPTH, MOST_FOLDERS = 4, 2000
MOST_NAMED = 10  # in a sentence


def folders(reach: Reach) -> Iterator[tuple[Path, list[str]]]:
    """(a folder under an allowed root, the names of its files); links are not followed.

    Each root has its own allowance, and one that lies in another is walked once.
    """
    roots = set(reach.roots)
    for root in dict.fromkeys(reach.roots):
        for seen, (parent, inside, files) in enumerate(os.walk(root)):
            if seen == MOST_FOLDERS:
                break
            depth = len(Path(parent).relative_to(root).parts)
            kept = (name for name in sorted(inside) if not name.startswith(".") and name != CHECKPOINTS)
            inside[:] = [] if depth >= DEPTH else (n for n in kept if os.path.join(parent, n) not in roots)
            reached = [name for name in files if not name.startswith(".") and reach.local(os.path.join(parent, name))]
            if reached:
                yield Path(parent), reached


def models_in(folder: Path, files: list[str]) -> list[Path]:
    """The models among a folder's files: the folder itself, or GGUF files."""
    if "config.json" in files or adapters.is_adapter(folder):
        return [folder]
    return [folder / name for name in files if name.endswith(".gguf")]


def which_models(reach: Reach) -> str:
    """The models in reach, the newest first, for a sentence."""
    models = [model for folder, files in folders(reach) for model in models_in(folder, files)]
    if not models:
        return "no model is under them"
    names = [named(model) for model in sorted(models, key=changed, reverse=True)]
    more = f" and {len(names) - MOST_NAMED:,} others" if len(names) > MOST_NAMED else ""
    return f"there are: {', '.join(names[:MOST_NAMED])}{more}"


def changed(path: Path) -> float:
    """When it was; 0 of what is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def named(path: Path) -> str:
    """Below the folder in which the server stands as a relative path."""
    try:
        return str(path.relative_to(os.path.realpath(".")))
    except ValueError:
        return str(path)
