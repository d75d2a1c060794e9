"""Finished work on disk, under a key of what it was made from, so an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.cli import UserError


def content_key(*parts: Any) -> str:
    """32 hex digits that name JSON values by their content."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class AnswerStore:
    """A JSONL file of {"key", "value"} lines that only grows; a line that a kill cut short is dropped.

    Without a path it is kept in memory.
    """

    def __init__(self, path: str | Path | None) -> None:
        """Raises UserError where `path` is a file of another kind."""
        self.path = Path(path) if path else None
        self.values: dict[str, Any] = {}
        if self.path and self.path.is_file():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        whole = 0
        with path.open("rb") as handle:
            for line in handle:
                if line.endswith(b"\n"):
                    try:
                        row = json.loads(line)
                        self.values[row["key"]] = row["value"]
                    except (ValueError, KeyError, TypeError) as error:
                        raise UserError(f"{path} does not hold answers of this toolkit; move it away") from error
                    whole += len(line)
        with path.open("ab") as handle:
            handle.truncate(whole)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def add(self, pairs: Iterable[tuple[str, Any]]) -> None:
        """Keep values, on disk before this returns."""
        pairs = list(pairs)
        self.values.update(pairs)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as handle:
                handle.writelines(json.dumps({"key": key, "value": value}) + "\n" for key, value in pairs)
