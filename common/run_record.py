"""`run.json`: what a run was made with and how it ended, written at its start, its end and its failure."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.data import splits, task_record
from common.files import atomic_write, sha256_file, write_json
from common.models import adapters, gguf_import

try:
    import resource
except ModuleNotFoundError:  # native Windows
    resource = None

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
FILE = "run.json"
GROUPS_FILE = "train_groups.txt"


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result, and Python's."""
    installed = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def git_commit() -> str | None:
    """The toolkit's commit, with `+changes` when tracked files differ from it; None outside a git checkout."""
    root = Path(__file__).parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """What a figure of speed was measured on: "cpu", "cores", "memory_gib", "gpu" (None without), "threads", "load"."""
    from common.models.loading import describe_device

    cpu, memory = platform.processor() or platform.machine(), None
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    device = describe_device()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "gpu": None if device.startswith("CPU") else device,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def utc_stamp(seconds: float, milliseconds: bool = False) -> str:
    """Seconds since 1970 as 2026-01-02T03:04:05Z, or 2026-01-02T03:04:05.678Z."""
    fraction = f".{int(seconds % 1 * 1000):03d}" if milliseconds else ""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + fraction + "Z"


def provenance(script: str, argv: Sequence[str] | None) -> dict[str, Any]:
    """What an evaluation's result says of itself: "command", "versions" (this project's commit too) and "created"."""
    return {
        "command": shlex.join(["python", script, *(sys.argv[1:] if argv is None else argv)]),
        "versions": versions() | {"distill-slm": git_commit() or "unknown"},
        "created": utc_stamp(time.time()),
    }


def describe_data(path: str, rows: int) -> dict[str, Any]:
    """Provenance of a data file: path, SHA-256 and the rows that were used of it."""
    return {"path": path, "sha256": sha256_file(path), "rows": rows}


def peak_memory_bytes() -> dict[str, int]:
    """Peak memory of this process: resident (`ru_maxrss`; 0 where the system does not say), and with CUDA what torch
    allocated on the card."""
    peak = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if resource else 0}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def read(save_dir: str | Path) -> dict[str, Any] | None:
    """The run.json of a folder; None when there is none.

    Raises:
        UserError: it is broken.
    """
    path = Path(save_dir) / FILE
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is broken ({error}); train again with --overwrite") from error
    if not isinstance(facts, dict):
        raise UserError(f"{path} is broken (no JSON object); train again with --overwrite")
    return facts


class RunRecord:
    """The record of one run, kept on disk: `state` goes from running to done or failed."""

    def __init__(self, save_dir: str, argv: list[str], settings: dict[str, Any], **facts: Any) -> None:
        self.path = Path(save_dir) / FILE
        self.lock: int | None = None  # file descriptor of the folder's lock, let go of with the end of the run
        self.started = time.time()
        self.facts = {
            "state": "running",
            "started": utc_stamp(self.started),
            "argv": argv,
            "settings": settings,
            "git_commit": git_commit(),
            "versions": versions(),
            **facts,
        }
        self.write()

    def write(self, **facts: Any) -> None:
        """Add facts and save."""
        self.facts |= facts
        write_json(self.path, self.facts)

    def end(self, state: str, **facts: Any) -> None:
        """Close with `state` "done" or "failed"."""
        self.write(
            state=state, seconds=round(time.time() - self.started, 1), peak_memory_bytes=peak_memory_bytes(), **facts
        )
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


def write_groups(save_dir: str | Path, groups: set[str]) -> None:
    """Keep the group hashes that the run trains on: evaluators count the overlap with them."""
    with atomic_write(Path(save_dir) / GROUPS_FILE) as handle:
        handle.writelines(f"{group}\n" for group in sorted(groups))


def read_groups(save_dir: str | Path) -> set[str] | None:
    """Group hashes that the run was trained on; None when the folder keeps no such record."""
    path = Path(save_dir) / GROUPS_FILE
    return set(path.read_text().split()) if path.is_file() else None


def was_trained(model_dir: str | Path) -> bool:
    """Whether a model is a run, or the export of one, also of before they told what they were trained for."""
    if adapters.is_adapter(model_dir) or any(Path(model_dir, file).is_file() for file in (FILE, task_record.FILE)):
        return True
    try:
        return json.loads(Path(model_dir, gguf_import.EXPORT_RECORD).read_text())["origin"]["base"] is not None
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_unseen(model_dir: str, groups: Iterable[str], rows: str, dev: str) -> None:
    """Refuse to fit a calibration on what a model was trained on.

    Args:
        groups: hash of each row.
        rows: what the rows are, up to "that MODEL was trained on".
        dev: what to give instead.

    Raises:
        UserError: it was trained on some of the groups.
    """
    seen, of = splits.overlap(groups, read_groups(model_dir) or set())
    if seen:
        raise UserError(
            f"{seen} of {of} {rows} that {model_dir} was trained on; a calibration needs unseen ones: give {dev}"
        )


def contamination(model_dir: str, groups: Sequence[str]) -> dict[str, int] | None:
    """{"rows", "of"}: rows whose group the run was trained on; None where a run keeps no record of that."""
    trained = read_groups(model_dir)
    if trained is None:
        if was_trained(model_dir):
            return None
        trained = set()  # a base model was trained on no labelled row of ours
    seen, of = splits.overlap(groups, trained)
    return {"rows": seen, "of": of}


def worst_contamination(counts: Sequence[dict[str, int] | None]) -> dict[str, int] | None:
    """The contamination of the model with the most; None where one is unknown and none is known to have any."""
    known = [count for count in counts if count]
    most = max(known, key=lambda count: count["rows"], default=None)
    return None if most and not most["rows"] and len(known) < len(counts) else most
