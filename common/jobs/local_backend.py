"""Jobs as process groups of this machine.

A worker is recognised by the lock on its job's folder, which it and its commands hold for as long as one of them
lives: the kernel lets go of it however they end, so that a server that has been killed finds its workers again, and
no job ever has two. Every process of a job carries its id in its environment; that is how all of them are found.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.jobs.backend import GONE, Device, Ended
from common.jobs.folder import WORKER, JobFolder
from common.jobs.store import CANCELLED, FAILED, RUNNING, TO_PAUSE, Job
from common.jobs.worker import BUSY, STOPPED, failure
from common.vram.machine import machine_bytes

ROOT = Path(__file__).parents[2]
GRACE = 5.0  # seconds a training gets to save a checkpoint when it is cancelled
PAUSE_GRACE = 120.0  # and when it is paused, which must not lose a step
MARK = "DISTILL_JOB"  # the environment variable with a job's id
SECRETS = ("API_KEY",)  # of the server's environment, not for its workers


class LocalBackend:
    """The backend of one machine.

    Args:
        jobs_dir: where the jobs' folders are.
        cards: names for CUDA_VISIBLE_DEVICES; with several, each slot has its own.
    """

    first_state = RUNNING  # a job that is handed over here begins at once

    def __init__(self, jobs_dir: Path, cards: Sequence[str] = ()) -> None:
        self.jobs_dir, self.cards, self.device = jobs_dir, cards, find_device(cards)
        self._children: dict[str, subprocess.Popen] = {}
        self._seen: set[str] = set()  # jobs that this server has started, or found at work
        self._stopping: dict[str, float] = {}  # since when

    def start(self, job: Job) -> None:
        """Start a worker. Raises OSError where there is no room for its files."""
        folder = JobFolder(self.jobs_dir / job.id)
        folder.prepare(job.attempt, job.commands)
        environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
        environment |= {MARK: job.id, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        if len(self.cards) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = self.cards[job.slot % len(self.cards)]
        self._seen.add(job.id)
        with folder.open_log() as log:
            self._children[job.id] = subprocess.Popen(
                [sys.executable, "-P", "-m", "common.jobs.worker", str(folder.path), "--attempt", str(job.attempt)],
                cwd=folder.path,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def look(self, job: Job) -> str | Ended:
        """RUNNING, GONE, or how the job ended."""
        folder = JobFolder(self.jobs_dir / job.id)
        child = self._children.get(job.id)
        if child is not None and child.poll() == BUSY:  # a worker of the server before this one has the job
            del self._children[job.id]
            child = None
        alive = folder.is_locked() if child is None else child.returncode is None
        if alive:
            self._seen.add(job.id)
            return RUNNING
        result = folder.result(job.attempt)
        if result:
            return Ended(result["state"], result["error"], result["artifacts"])
        if job.cancel:
            return Ended(CANCELLED)
        if job.id not in self._seen or (child is not None and child.returncode == STOPPED):
            return GONE
        tail = folder.log_tail()
        reason = "the worker was killed" if child is None else f"the worker: {failure(child.returncode, tail)}"
        return Ended(FAILED, {"reason": reason, "exit_code": child and child.returncode, "log": tail})

    def stop(self, job: Job) -> None:
        """Ask the worker to stop, and after some seconds kill all that the job has started; to be called again."""
        grace = PAUSE_GRACE if job.cancel == TO_PAUSE else GRACE
        child = self._children.get(job.id)
        leader = child.pid if child else JobFolder(self.jobs_dir / job.id).read(WORKER).get("pid")
        with contextlib.suppress(ProcessLookupError):
            if job.id not in self._stopping:
                self._stopping[job.id] = time.monotonic()
                if leader:
                    os.kill(leader, signal.SIGTERM)
            elif time.monotonic() - self._stopping[job.id] > grace:
                kill_marked(job.id)
                if leader:  # its number is not given to others while the group has a member
                    os.killpg(leader, signal.SIGKILL)

    def forget(self, job: Job) -> None:
        """After a job has ended: nothing that it started may go on."""
        kill_marked(job.id)
        self._children.pop(job.id, None)
        self._seen.discard(job.id)
        self._stopping.pop(job.id, None)

    def close(self) -> None:
        """Workers go on without this server."""


def kill_marked(job_id: str) -> int:
    """SIGKILL to every process of a job, also one that left its group; how many there were."""
    mark = f"{MARK}={job_id}".encode()
    killed: set[int] = set()
    for _ in range(100):  # one may fork while the others are killed, and on a busy machine dying takes a while
        marked = [pid for pid in process_ids() if mark in environment_of(pid)]
        for pid in marked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed.update(marked)
        if not marked:
            break
        time.sleep(0.01)
    return len(killed)


def process_ids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def environment_of(pid: int) -> list[bytes]:
    """NAME=VALUE entries of a process; none of one that has ended or belongs to another user."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def ask_cards(query: str, cards: Sequence[str] = ()) -> list[str]:
    """What nvidia-smi says of each card; empty where there is none. Asking torch would take memory on the card.

    Args:
        cards: names of those that are meant, as CUDA_VISIBLE_DEVICES has them; empty: all.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    meant = [f"--id={','.join(cards)}"] * bool(cards)
    words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", *meant]
    try:
        output = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return output.split()


def find_cards() -> list[str]:
    """The NVIDIA cards that may be used, as names for CUDA_VISIBLE_DEVICES."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for word in chosen.split(",") if (name := word.strip()) not in ("", "-1")]
    return ask_cards("index")


def find_device(cards: Sequence[str]) -> Device:
    """The smallest of the cards, else this machine, or what of it the container may have."""
    if cards:
        sizes = [int(size) << 20 for size in ask_cards("memory.total", cards) if size.isdigit()]
        return Device(True, min(sizes, default=None))
    return Device(False, machine_bytes())
