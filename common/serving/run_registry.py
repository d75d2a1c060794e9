"""The run folders that a server may be asked for, by name and by version."""

from __future__ import annotations

import functools
import json
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import run_record
from common.cli import UserError, log
from common.data import task_record
from common.evaluation import run_figures
from common.export.gguf_lora import ADAPTER_FILE
from common.files import sha256_file
from common.models import adapters, gguf_import, unproven
from common.models import loading as models
from common.models.gguf_import import EXPORT_RECORD
from common.models.onnx_runtime import MODEL_FILE, is_onnx
from common.models.source import LLAMA_CPP, TORCH, looks_local

DEFAULT_BASE = "Qwen/Qwen2.5-3B-Instruct"
BASE = "base"  # the name of the base model among the runs
METHODS = ("sft", "kd", "dpo")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
DIGEST = re.compile(r"[0-9a-f]{8,64}")
KEPT_VERSIONS = 3  # of one run's adapter, the one on the disk included
LOOK = 0.25  # seconds between looks whether a run has changed on the disk
MAX_TEXT = 200  # characters of what a run says of itself
SETTLING = 1.0  # seconds since its last change in which a file may still be being written


class BadName(UserError):
    """A name that no run can have, such as a path."""


class UnknownRun(UserError):
    """No run of this name or version."""


@dataclass(frozen=True)
class Version:
    """What an address stands for: a base model, or one state of a run folder.

    Attributes:
        name: of the run, or "base".
        model_dir: what the scripts are given as --model_dir.
        base: the model that is loaded for it; the same as `model_dir` where that is a whole model.
        sha256: of the adapter's weights (see `adapters.adapter_hash`).
        signature: of its files, so that a change is noticed.
        task: what it was trained for, as `task_record.text_of` has it; None where nothing says so.
    """

    name: str
    model_dir: str
    base: str
    sha256: str
    signature: tuple
    task: str | None = None

    @property
    def adapter(self) -> bool:
        return self.base != self.model_dir

    @property
    def address(self) -> str:
        """`name@hash`, which stands for this version and no other."""
        return f"{self.name}@{self.sha256[:16]}"


class Registry:
    """The run folders under `runs_dir`, by name.

    Args:
        base_model: what "base" stands for; None: the base of the adapters that are there, else Qwen2.5-3B-Instruct.
        task_name: of the label task, whose runs answer to their method alone.

    Attributes:
        short: run names by their short form, e.g. "creditmix_sft" by "sft".
    """

    def __init__(self, runs_dir: str, base_model: str | None, task_name: str = "creditmix") -> None:
        self.runs_dir, self._base_model = runs_dir, base_model
        self.short = {method: f"{task_name}_{method}" for method in METHODS}
        self._versions: dict[str, list[Version]] = {}  # newest first
        self._fresh: dict[str, tuple[float, Version]] = {}
        self._kinds: dict[str, tuple[tuple, str | None]] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The runs that hold a model, in order."""
        try:
            entries = sorted(entry.name for entry in os.scandir(self.runs_dir) if NAME.fullmatch(entry.name))
        except FileNotFoundError:
            return []
        return [name for name in entries if name != BASE and _holds_model(Path(self.runs_dir) / name)]

    def base_model(self) -> str:
        """What "base" stands for: as set, else what most adapters stood on when it was first asked for."""
        if self._base_model:
            return self._base_model
        folders = [Path(self.runs_dir) / name for name in self.names()]
        bases = [base for folder in folders if adapters.is_adapter(folder) and (base := _base_of(folder))]
        self._base_model = max(bases, key=bases.count) if bases else None
        return self._base_model or DEFAULT_BASE

    def adapters_of(self, base: str) -> int:
        """How many runs are adapters on a base; blocking."""
        folders = [Path(self.runs_dir) / name for name in self.names()]
        bases = [_base_of(folder) for folder in folders if adapters.is_adapter(folder)]
        return sum(base_key(other) == base_key(base) for other in bases if other)

    def find(self, address: str) -> Version:
        """The version that `name` or `name@hash` stands for; blocking, since a changed adapter is hashed.

        Files that have just changed may still be being written, so for a moment the name stands for the version before.

        Raises:
            BadName: a path, or no name at all.
            UnknownRun: says which runs there are.
            UserError: the folder holds no usable model.
        """
        name, at, digest = address.partition("@")
        if not NAME.fullmatch(name) or (at and not DIGEST.fullmatch(digest)):
            raise BadName(
                f"'{address[:80]}' is not the name of a run; give the name of a folder in {self.runs_dir} without its "
                f"path, or name@hash with at least 8 hex digits; there are: {self._all_names()}"
            )
        if name in self.short and not _holds_model(Path(self.runs_dir) / name):
            name = self.short[name]
        model_dir = self.base_model() if name == BASE else str(Path(self.runs_dir) / name)
        if name != BASE and not _holds_model(Path(model_dir)):
            raise UnknownRun(f"there is no run '{name}'; there are: {self._all_names()}")
        if name != BASE and gguf_import.local_gguf(model_dir):
            model_dir = gguf_import.packed_folder(model_dir)
        versions = self._look(name, model_dir)
        for version in versions:
            if version.sha256.startswith(digest):
                self._fresh[address] = (time.monotonic() + LOOK, version)
                return version
        there = ", ".join(version.address for version in versions)
        raise UnknownRun(f"'{name}' has no version {digest}; there are: {there}")

    def known(self, address: str) -> Version | None:
        """As `find`, where that needs no file to be read; None where it does.

        The disk is looked at every `LOOK` seconds at most: at a thousand requests a second it would cost a tenth.
        """
        until, version = self._fresh.get(address, (0.0, None))
        gone = version is not None and version.name != BASE and not os.path.isdir(self._folder(version.name))
        if gone or time.monotonic() > until:  # one that was deleted is not answered for, not even for a moment
            self._fresh.pop(address, None)
            return None
        return version

    def _folder(self, name: str) -> str:
        return os.path.join(self.runs_dir, name)

    def kind(self, name: str) -> str | None:
        """The kind of task that a run was trained for (`task_record.KINDS`); None where nothing says so."""
        folder = Path(self.runs_dir) / name
        signature = tuple(file_signature(str(folder / file)) for file in (task_record.FILE, run_record.FILE))
        known, kind = self._kinds.get(name, (None, None))
        if known != signature:
            try:
                record = task_record.read(folder)
            except UserError as error:
                log(str(error))
                record = None
            kind = record["kind"] if record else None
            self._kinds[name] = (signature, kind)
        return kind

    def writes(self, name: str) -> bool:
        """Whether a run can write text: an ONNX export ranks labels alone, an adapter alone in GGUF does nothing."""
        folder = Path(self.runs_dir) / name
        return not is_onnx(folder) and not (folder / ADAPTER_FILE).is_file()

    def _all_names(self) -> str:
        return ", ".join([BASE, *self.names()])

    def versions(self, name: str) -> list[Version]:
        """The known versions of a run, the one on the disk first."""
        return list(self._versions.get(name, ()))

    def _look(self, name: str, model_dir: str) -> list[Version]:
        with self._lock:
            versions = self._versions.setdefault(name, [])
            signature = signature_of(model_dir)
            if versions:
                newest = versions[0]
                if newest.signature == signature and newest.model_dir == model_dir:
                    return list(versions)
                parts = zip(signature, newest.signature, strict=True)
                changed = max((part[1] / 1e9 for part, before in parts if part and part != before), default=0.0)
                if newest.model_dir == model_dir and 0 <= time.time() - changed < SETTLING:
                    return list(versions)
            models.check_model_dir(model_dir, ask_hub=False)  # requests wait here; its process asks when it loads
            base = _own_base(model_dir) if adapters.is_adapter(model_dir) else model_dir
            record = task_record.read(model_dir)
            task = task_record.text_of(record) if record else None
            version = Version(name, model_dir, base, _hash(model_dir), signature, task)
            # a touched file is not a new version, and of one that came back only the newest stays
            kept = [old for old in versions if old.sha256 != version.sha256 and old.model_dir == model_dir]
            self._versions[name] = [version, *kept][:KEPT_VERSIONS]
            return list(self._versions[name])


@functools.lru_cache(maxsize=256)
def base_key(base: str) -> str:
    """One key for the spellings of a folder's path."""
    return os.path.realpath(base) if looks_local(base) else base


def _own_base(folder: str) -> str:
    """The base of an adapter. Raises UserError where it is none that an adapter can be put on."""
    base = adapters.base_of(folder)
    if gguf_import.file_of(base):
        raise UserError(
            f"the adapter {folder} stands on {base}, a GGUF that llama.cpp runs as it is, and no adapter can be put on "
            "one; train it on the file itself (--student FILE.gguf, which is de-quantised), or export it whole"
        )
    return base


def _base_of(folder: Path) -> str | None:
    try:
        return adapters.base_of(folder)
    except UserError as error:
        log(str(error))
        return None


def _holds_model(folder: Path) -> bool:
    return adapters.is_adapter(folder) or (folder / "config.json").is_file() or any(folder.glob("*.gguf"))


def _hash(model_dir: str) -> str:
    """Of the adapter's weights, or of a GGUF; of another export the hash of its record, which has those of all its
    files."""
    record = Path(model_dir) / EXPORT_RECORD
    if record.is_file() and not gguf_import.file_of(model_dir):
        return sha256_file(record)
    return adapters.adapter_hash(model_dir)


def engine_of(model_dir: str) -> str:
    """What runs a model: "torch", "onnxruntime" or "llama_cpp"."""
    if is_onnx(model_dir):
        return "onnxruntime"
    return LLAMA_CPP if gguf_import.file_of(model_dir) else TORCH


def signature_of(model_dir: str) -> tuple:
    """The `file_signature`s of what makes a model."""
    weights = (adapters.ADAPTER_WEIGHTS, adapters.ADAPTER_CONFIG, "config.json", "model.safetensors")
    names = (*weights, "model.safetensors.index.json", MODEL_FILE, EXPORT_RECORD, task_record.FILE)
    # a folder that was made of a file has its contents' name; where a copy of that lies does not matter
    gguf = None if gguf_import.origin(model_dir) else gguf_import.file_of(model_dir)
    of_gguf = file_signature(str(gguf)) if gguf else None
    return *(file_signature(os.path.join(model_dir, name)) for name in names), of_gguf


def made_at(model_dir: str) -> int:
    """When the newest file of what makes a model was written, in ns; what evaluators and servers keep beside it, such
    as figures, calibrations and teachers' answers, makes it no newer. 0 for a folder that holds no model."""
    try:
        return max((part[1] for part in signature_of(model_dir) if part), default=0)
    except (UserError, OSError, ValueError):  # asked for by its name, it says why
        return 0


def file_signature(path: str) -> tuple[int, int, int] | None:
    """(inode, time of change in ns, size), which tells a file from what it was before; None where there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def describe(version: Version) -> dict[str, Any]:
    """What the registry tells of a version: base, method, hash, created, metrics where it was evaluated."""
    about: dict[str, Any] = {
        "name": version.name,
        "address": version.address,
        "model_dir": version.model_dir,
        "base": version.base,
        "adapter_sha256": version.sha256 if version.adapter else None,
        "method": None,
        "created": None,
        "metrics": None,
        "engine": engine_of(version.model_dir),
        "unproven": unproven.is_unproven(version.model_dir),
        "evaluations": [],
        "error": None,
        "kind": None,
        "task": None,
        "labels": None,
        "text_fields": None,
        "text_columns": None,
    }
    if version.task:
        record = json.loads(version.task)
        about |= {"kind": record["kind"], "task": record["name"], "labels": record.get("labels")}
        about["text_fields"] = [record["text_field"]] if record.get("text_field") else None
        about["text_columns"] = record.get("text_columns") or None
    folder = Path(version.model_dir)
    try:
        if (folder / run_record.FILE).is_file():
            about |= _read_run(json.loads((folder / run_record.FILE).read_text()))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        about["error"] = f"{run_record.FILE} is unreadable ({type(error).__name__}: {str(error)[:100]})"
    try:
        about["evaluations"] = run_figures.read(folder) if folder.is_dir() else []
    except ValueError as error:
        about["error"] = str(error)
    if version.adapter:  # figures of other weights, from before the run was trained again, say nothing of these
        own = [known for known in about["evaluations"] if known["model_sha256"] in (None, version.sha256)]
        about["evaluations"] = own
    if about["evaluations"]:
        about["metrics"] = _headline(about["evaluations"][0])
    return about


def _read_run(run: dict) -> dict[str, Any]:
    method, started = run.get("method"), run.get("started")
    if not all(value is None or (isinstance(value, str) and len(value) <= MAX_TEXT) for value in (method, started)):
        raise ValueError("method or started is no text")
    return {"method": method, "created": started}


def _headline(evaluation: run_figures.Record) -> dict[str, Any]:
    """The newest evaluation in one line: what was judged on, and the bare figures."""
    about = {key: evaluation[key] for key in ("evaluator", "split", "n")}
    return about | {key: figure["value"] for key, figure in evaluation["figures"].items()}
