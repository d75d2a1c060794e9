"""A file of rows in, a file of answers out: in order, in windows, going on where an interrupted run stopped."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from common.cli import log

Row = TypeVar("Row")


def write_answers(
    output: str, rows: Iterable[Row], answer: Callable[[list[Row]], list[dict]], *, window: int, decided_by: Any
) -> Iterator[dict]:
    """Write `answer` of every row to `output`, one JSON object a line, and yield each, also those of an earlier run.

    What is written stays in OUTPUT.<key>.partial until it is whole. The key is a hash of `decided_by`, so answers of an
    interrupted run are kept only if the same inputs and settings made them.

    Args:
        window: rows that are answered at a time; at most so many are lost in an interruption.
        decided_by: all that decides the answers, as JSON.
    """
    from tqdm import tqdm

    key = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:12]
    partial = Path(f"{output}.{key}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    for stale in set(partial.parent.glob(glob.escape(Path(output).name) + ".*.partial")) - {partial}:
        log(f"{stale} holds answers of another model, input or settings; starting again")
        stale.unlink()
    done = _whole_lines(partial)
    if done:
        log(f"going on after {len(done):,} answers in {partial}")
    yield from done
    rest = islice(rows, len(done), None)
    with partial.open("a", encoding="utf-8") as handle, tqdm(unit=" rows", initial=len(done)) as progress:
        while some := list(islice(rest, window)):
            answers = answer(some)
            handle.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in answers)
            handle.flush()
            progress.update(len(some))
            yield from answers
    os.replace(partial, output)


def _whole_lines(path: Path) -> list[dict]:
    """The answers in an interrupted output; a line without its end is cut off."""
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        with path.open("ab") as handle:
            handle.truncate(sum(map(len, lines[:-1])))
        del lines[-1]
    return [json.loads(line) for line in lines]
