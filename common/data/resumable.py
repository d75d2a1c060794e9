"""Going on where an interrupted run stopped: a file of answers to rows, and a store of finished work by key."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from common.cli import UserError, log
from common.files import write_jsonl

Row = TypeVar("Row")


def write_answers(
    output: str,
    rows: Iterable[Row],
    answer: Callable[[list[Row]], list[dict]],
    *,
    window: int,
    decided_by: Any,
    takes_over: Callable[[int, dict], bool] | None = None,
    put_in_place: Callable[[Path, str], None] = os.replace,
) -> Iterator[dict]:
    """Write `answer` of every row to `output`, one JSON object a line, and yield each, also those of an earlier run.

    What is written stays in OUTPUT.<key>.partial until it is whole. The key is a hash of `decided_by`, so answers of an
    interrupted run are kept only if the same inputs and settings made them.

    Args:
        window: rows that are answered at a time; so many are lost in an interruption, at most.
        decided_by: all that decides the answers, as JSON.
        takes_over: says of an interrupted OUTPUT.partial, a name without a key, whether its answers stand: called with
            their number and the last one. None: there are no such files.
        put_in_place: makes the whole file of answers `output`.
    """
    from tqdm import tqdm

    partial, stale = _partial_file(output, decided_by)
    unkeyed = Path(f"{output}.partial")
    if takes_over and unkeyed.is_file():
        count, last = whole_lines(unkeyed)
        if count and not partial.exists() and takes_over(count, _parsed(last)):
            unkeyed.rename(partial)
        else:
            stale.add(unkeyed)
    _drop(stale)
    done = whole_lines(partial)[0]
    if done:
        log(f"going on after {done:,} answers of {output}")
        with partial.open(encoding="utf-8") as handle:
            yield from map(json.loads, handle)
    rest = islice(rows, done, None)
    total = len(rows) if isinstance(rows, Sized) else None
    with partial.open("a", encoding="utf-8") as handle, tqdm(unit=" rows", total=total, initial=done) as bar:
        for batch in windows(rest, window):
            answers = answer(batch)
            handle.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in answers)
            handle.flush()
            bar.update(len(batch))
            yield from answers
    put_in_place(partial, output)


def write_each(
    output: str,
    rows: Sequence[Row],
    answer: Callable[[list[Row]], Iterable[tuple[int, dict]]],
    *,
    decided_by: Any,
    what: str = "rows",
) -> list[dict]:
    """The answers to all rows, also written to `output`, one JSON object a line, in the order of the rows.

    Each is kept in OUTPUT.<key>.partial as it comes, so that an interruption loses only what was under way; the key is
    as in `write_answers`.

    Args:
        answer: called with the rows that have no answer yet; gives the number of one of them, from 0, and its answer,
            in any order.
        what: the rows are called in the progress bar.
    """
    from tqdm import tqdm

    partial, stale = _partial_file(output, ["each", decided_by])
    _drop(stale)
    store = AnswerStore(partial)
    missing = [number for number in range(len(rows)) if str(number) not in store]
    if done := len(rows) - len(missing):
        log(f"going on after {done:,} answers of {output}")
    with tqdm(total=len(rows), initial=done, unit=f" {what}") as bar:
        for number, item in answer([rows[number] for number in missing]) if missing else ():
            store.add([(str(missing[number]), item)])
            bar.update()
    answers = [store[str(number)] for number in range(len(rows))]
    write_jsonl(output, answers)
    partial.unlink(missing_ok=True)
    return answers


def _partial_file(output: str, decided_by: Any) -> tuple[Path, set[Path]]:
    """(where the answers of an unfinished run are kept, the same of runs with other inputs or settings)."""
    key = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:12]
    partial = Path(f"{output}.{key}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    return partial, set(partial.parent.glob(glob.escape(Path(output).name) + ".*.partial")) - {partial}


def _drop(stale: Iterable[Path]) -> None:
    for path in stale:
        log(f"{path} holds answers of another model, input or settings; starting again")
        path.unlink()


def windows(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """The rows in lists of so many; the last may have fewer."""
    while batch := list(islice(rows, size)):
        yield batch


def whole_lines(path: Path) -> tuple[int, bytes]:
    """How many complete lines a file has, and the last of them; a line without its end is cut off the file."""
    if not path.is_file():
        return 0, b""
    count = end = 0
    last = b""
    with path.open("rb") as handle:
        for line in handle:
            if line.endswith(b"\n"):
                count, end, last = count + 1, end + len(line), line
    if end < path.stat().st_size:
        with path.open("ab") as handle:
            handle.truncate(end)
    return count, last


def _parsed(line: bytes) -> dict:
    try:
        answer = json.loads(line)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


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
            whole_lines(self.path)  # only now: a file of another kind stays as it is

    def _read(self, path: Path) -> None:
        with path.open("rb") as handle:
            for line in handle:
                if not line.endswith(b"\n"):
                    return
                try:
                    row = json.loads(line)
                    self.values[row["key"]] = row["value"]
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(f"{path} does not hold answers of this toolkit; move it away") from error

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

    def windows(
        self, items: Sequence[Any], size: int, identity: Any, work: Callable[[list[Any]], Any]
    ) -> Iterator[tuple[Any, float]]:
        """(what `work` makes of each `size` items, the seconds that it took), in order; kept ones are not made again.

        Args:
            items: JSON values.
            identity: all else that decides the answers, as JSON.
            work: answers a window of them, with a JSON value.
        """
        for start in range(0, len(items), size):
            window = list(items[start : start + size])
            key = content_key(identity, window)
            if key not in self:
                started = time.perf_counter()
                answer = work(window)
                self.add([(key, {"answer": answer, "seconds": time.perf_counter() - started})])
            yield self[key]["answer"], self[key]["seconds"]
