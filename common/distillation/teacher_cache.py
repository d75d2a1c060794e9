"""A teacher's distributions on disk, so that teacher and student never share the card.

Each row's completion tokens have one record a token: the teacher's top k log-probabilities and the mass of the rest (or
draws from the distribution and its entropy), and hidden states where they are asked for. A row is found by its content
(its token ids), never by its position or its training step, so shuffling, accumulation and resuming are safe.

A folder holds meta.json (whose distributions these are) and shards: `*.tokens`, records, and `*.rows`, the keys and
token counts of the rows in it, written last: it makes the shard count. What was written before an interruption stays.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import UserError
from common.files import atomic_write, read_json, write_json
from common.models.tokenizers import Encoded

META = "meta.json"
HALF_MAX = 65_504  # of float16
INDEX = np.dtype([("key", "S32"), ("tokens", "<u4")])
MAX_VOCABULARY = 1 << 20  # ids are kept as 16 low and 4 high bits


def check_vocabulary(vocabulary: int) -> None:
    """Raises UserError for a vocabulary some of whose ids would not fit a record."""
    if vocabulary > MAX_VOCABULARY:
        raise UserError(
            f"a teacher cache keeps token ids below {MAX_VOCABULARY:,}, and these models share {vocabulary:,}; leave "
            "--teacher_cache out, so that the teacher reads along"
        )


def row_key(row: Encoded) -> bytes:
    """32 hex digits of a row's token ids and of which of them are learnt."""
    told = [row.prompt_length, *row.input_ids, *(place for span in row.read_only for place in span)]
    return hashlib.sha256(np.array(told, "<u4").tobytes()).hexdigest()[:32].encode()


def record_type(k: int, *, logprobs: bool = True, hidden: tuple[int, int] = (0, 0)) -> np.dtype:
    """One token's record: 4.5 bytes an outcome and 4 more, 292 bytes at k = 64.

    Args:
        k: outcomes.
        logprobs: whether each has its log-probability, 2 bytes of the 4.5; draws have none.
        hidden: layers and width of the hidden states.
    """
    fields = [("low", "<u2", (k,)), ("high", "u1", ((k + 1) // 2,)), ("rest", "<f4")]
    fields += [("logprobs", "<f2", (k,))] * logprobs + [("hidden", "<f2", hidden)] * bool(hidden[0])
    return np.dtype(fields)


def pack(record: np.dtype, ids: np.ndarray, rest: np.ndarray, **optional: np.ndarray) -> np.ndarray:
    """Records [n].

    Args:
        ids: outcomes [n, k].
        rest: the mass of all other outcomes [n], or the entropy of draws.
        optional: `logprobs` [n, k] and `hidden` [n, layers, width], where `record` has them.
    """
    n, k = ids.shape
    packed = np.zeros(n, record)
    ids = ids.astype(np.uint32)
    packed["low"] = ids & 0xFFFF
    high = np.zeros((n, k + k % 2), np.uint8)
    high[:, :k] = ids >> 16
    packed["high"] = high[:, 0::2] | high[:, 1::2] << 4
    packed["rest"] = rest
    for name, values in optional.items():
        packed[name] = values.clip(-HALF_MAX, HALF_MAX)
    return packed


def unpack(packed: np.ndarray) -> dict[str, np.ndarray]:
    """`pack`'s arguments again, as int64 and float32."""
    k = packed["low"].shape[1]
    high = np.stack([packed["high"] & 0xF, packed["high"] >> 4], axis=-1).reshape(len(packed), -1)[:, :k]
    names = [name for name in ("rest", "logprobs", "hidden") if name in packed.dtype.names]
    ids = packed["low"].astype(np.int64) | high.astype(np.int64) << 16
    return {"ids": ids, **{name: packed[name].astype(np.float32) for name in names}}


def visible(folder: Path) -> list[Path]:
    """A folder's files; those that are being written have hidden names."""
    return list(folder.glob("[!.]*"))


def written_facts(folder: str | Path) -> dict[str, Any]:
    """What the distributions in a folder depend on; empty where it holds none."""
    path = Path(folder, META)
    return read_json(path) if path.is_file() and any(Path(folder).glob("*.rows")) else {}


class TeacherCache:
    """The cache in a folder, of one teacher, one kind of targets, one temperature."""

    def __init__(self, folder: str | Path, facts: dict[str, Any], record: np.dtype) -> None:
        """Opens the folder. It becomes this cache's with the first shard: one without any is nobody's yet.

        Args:
            facts: what the distributions depend on besides the token ids: teacher, hash, targets, temperature, ...

        Raises:
            UserError: it holds the distributions of something else; the message says of what.
        """
        self.folder, self.record = Path(folder), record
        self.facts = {**facts, "record": str(record.descr)}
        self._check()
        self._where: dict[bytes, tuple[Path, int, int]] = {}  # shard, first record, records
        self._shards: set[str] = set()
        self.refresh()

    def _check(self) -> None:
        """Raises UserError where the folder is not this cache's to read and to write."""
        if visible(self.folder) and not Path(self.folder, META).is_file():
            raise UserError(f"{self.folder} holds files that are no teacher cache; name a new folder")
        written = written_facts(self.folder)
        for name, value in self.facts.items():
            if written and written.get(name) != value:
                raise UserError(
                    f"the teacher cache {self.folder} was written with another {name} ({written.get(name)}, not "
                    f"{value}); name another folder, or delete this one"
                )

    def refresh(self) -> None:
        """Find the shards that have come since, also those of other processes."""
        for path in sorted(self.folder.glob("*.rows")):
            if path.name not in self._shards:
                self._shards.add(path.name)
                self._open(path)

    def _open(self, path: Path) -> None:
        index = np.fromfile(path, INDEX)
        tokens = path.with_suffix(".tokens")
        expected = int(index["tokens"].sum()) * self.record.itemsize
        if not tokens.is_file() or tokens.stat().st_size != expected:
            raise UserError(f"{tokens} is damaged; delete it and {path.name}, and run again")
        start = 0
        for key, count in zip(index["key"].tolist(), index["tokens"].tolist(), strict=True):
            self._where[key] = (tokens, start, count)
            start += count

    def missing(self, rows: Sequence[Encoded]) -> list[Encoded]:
        """The rows, each once, that the cache does not hold."""
        return list({key: row for row in rows if (key := row_key(row)) not in self._where}.values())

    def add(self, rows: Sequence[Encoded], packed: np.ndarray) -> None:
        """Write one shard.

        Args:
            packed: records of the rows' completion tokens, in order.

        Raises:
            UserError: since it was opened, the folder has become the cache of something else.
        """
        if not self._shards:
            self._check()
            write_json(self.folder / META, self.facts)
        index = np.array([(row_key(row), completion_tokens(row)) for row in rows], INDEX)
        digest = hashlib.sha256(index.tobytes()).hexdigest()[:16]
        path = self.folder / f"{digest}.rows"
        with atomic_write(path.with_suffix(".tokens"), "wb") as handle:
            handle.write(packed.tobytes())
        with atomic_write(path, "wb") as handle:
            handle.write(index.tobytes())
        self.refresh()

    def get(self, row: Encoded) -> np.ndarray | None:
        """Records [completion tokens] of a row; None where the cache does not hold it."""
        if (where := self._where.get(row_key(row))) is None:
            return None
        shard, start, count = where  # opened each time: there may be more of them than a process may hold open
        return np.fromfile(shard, self.record, count, offset=start * self.record.itemsize)

    def sizes(self) -> dict[str, int | float]:
        """{"rows", "tokens", "bytes", "bytes_per_token"} of all that is in the folder."""
        tokens = sum(count for _, _, count in self._where.values())
        size = sum(os.stat(path).st_size for path in visible(self.folder))
        return {
            "rows": len(self._where),
            "tokens": tokens,
            "bytes": size,
            "bytes_per_token": round(size / max(tokens, 1), 1),
        }


def completion_tokens(row: Encoded) -> int:
    """Tokens that a model learns to predict in this row (a row's first token is never predicted)."""
    read_only = sum(end - start for start, end in row.read_only)
    return len(row.input_ids) - max(1, row.prompt_length) - read_only
