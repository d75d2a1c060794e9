"""How far a training is, from the live log that it keeps in its run folder: for a status, a curve, a stream."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

from common.jobs.folder import ARTIFACTS, LOG, JobFolder, log_lines
from common.jobs.store import ENDED, Job
from common.training.progress import LIVE_LOG, is_loss

LIVE = f"{ARTIFACTS}/{LIVE_LOG}"
TAIL = 1 << 14  # bytes of the live log behind a status
CHUNK = 1 << 18  # bytes of a log that are sent at once
POLL = 0.25  # seconds between two looks for something new
BEAT = 15.0  # seconds of silence before a sign of life
OF_THE_LOG = {"max_steps", "time"}  # what each of its lines has beside what was logged


def parse(content: bytes) -> list[dict[str, Any]]:
    """The complete lines of a live log; a number that is not finite becomes None, as JSON has no such."""
    entries = []
    for line in content.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the beginning was cut off, or a kill left half a line
        if isinstance(entry, dict) and entry.keys() >= {"step", "max_steps", "time"}:
            entries.append({name: value if is_finite(value) else None for name, value in entry.items()})
    return entries


def losses_of(entry: dict[str, Any]) -> dict[str, float | None]:
    """The loss, its terms and the held-out loss of a line; none in one that marks a start."""
    timings = {name for name in entry if name.startswith("eval_") and name != "eval_loss"}
    return {name: value for name, value in entry.items() if is_loss(name) and name not in OF_THE_LOG | timings}


def is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def read(folder: JobFolder, name: str, start: int, most: int) -> bytes:
    """At most so many bytes of a job's file, from `start`, or with a negative start from so far before its end."""
    try:
        with folder.open(name) as handle:
            handle.seek(max(0, handle.seek(0, 2) + start) if start < 0 else start)
            return handle.read(most)
    except OSError:
        return b""


def status(folder: JobFolder, ended: bool) -> dict[str, Any]:
    """{"progress": {"step", "total", "percent", "seconds_left"} or None, "losses": the latest value of each term}.

    The time that is left follows from the speed since the training started, or went on, within the last lines.
    """
    entries = parse(read(folder, LIVE, -TAIL, TAIL))
    losses: dict[str, float | None] = {}
    for entry in entries:
        losses |= losses_of(entry)
    if not entries:
        return {"progress": None, "losses": losses}
    first, last = session_start(entries), entries[-1]
    step, total = last["step"], last["max_steps"]
    speed = (last["time"] - first["time"]) / (step - first["step"]) if step > first["step"] else None
    left = None if speed is None else round(max(0.0, (total - step) * speed), 1)
    progress = {
        "step": step,
        "total": total,
        "percent": round(100 * step / total, 1) if total else 100.0,
        "seconds_left": None if ended else left,
    }
    return {"progress": progress, "losses": losses}


def session_start(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The last line that marks a start (it has no loss), else the first there is."""
    return next((entry for entry in reversed(entries) if not losses_of(entry)), entries[0])


def curves(folder: JobFolder) -> list[dict[str, Any]]:
    """All that was logged, each step once: what a resumed training logs again takes the place of what was."""
    entries: dict[tuple[int, bool], dict[str, Any]] = {}
    for entry in parse(read(folder, LIVE, 0, -1)):
        if losses_of(entry):
            entries[entry["step"], "eval_loss" in entry] = entry
        else:  # it goes on from here
            entries = {key: kept for key, kept in entries.items() if key[0] <= entry["step"]}
    return list(entries.values())


def event(kind: str, data: Any, where: tuple[int, int]) -> str:
    """One server-sent event; its id says how far log and live log were read."""
    return f"event: {kind}\nid: {where[0]}-{where[1]}\ndata: {json.dumps(data)}\n\n"


async def events(
    folder: JobFolder,
    find: Callable[[], Job | None],
    describe: Callable[[Job], dict],
    where: tuple[int, int],
    closing: Callable[[], bool],
) -> AsyncIterator[str]:
    """Server-sent events of a job until it has ended: `state` (its status), `log` (lines), `metrics` (what was logged).

    Args:
        find: the job as it is now; None when it was deleted. Blocking, as is all that is read here.
        where: how far the reader had come before, in bytes of log.txt and of the live log.
        closing: whether the server is about to stop, which ends the stream.
    """
    log_at, live_at = where

    def look() -> tuple[Job | None, tuple[bytes, int], tuple[bytes, int], dict | None]:
        job = find()
        news = read_on(folder, LOG, log_at), read_on(folder, LIVE, live_at)
        return job, *news, describe(job) if job else None

    sent, silent = None, 0.0
    while not closing():
        job, (lines, log_at), (entries, live_at), state = await asyncio.to_thread(look)
        if lines:
            yield event("log", log_lines(lines), (log_at, live_at))
        if logged := [entry for entry in parse(entries) if losses_of(entry)]:
            yield event("metrics", logged, (log_at, live_at))
        if state != sent:
            yield event("state", state, (log_at, live_at))
        if state is None or (job.state in ENDED and not lines and not entries):
            return
        silent = 0.0 if lines or entries or state != sent else silent + POLL
        if silent >= BEAT:
            silent = 0.0
            yield ": still here\n\n"
        sent = state
        if not lines and not entries:
            await asyncio.sleep(POLL)


def read_on(folder: JobFolder, name: str, start: int) -> tuple[bytes, int]:
    """The whole lines that follow byte `start`, and where they end; a part of a line when it alone is too long."""
    content = read(folder, name, start, CHUNK)
    if len(content) < CHUNK or b"\n" in content:
        content = content[: content.rfind(b"\n") + 1]
    return content, start + len(content)
