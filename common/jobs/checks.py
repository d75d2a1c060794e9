"""Whether what a request names can be had: models and data sets in reach, one vocabulary, enough memory.

A local path counts only under the allowed roots. One that lies elsewhere gets the very answer of one that does not
exist, so that nobody learns from the service what else is on its disk.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.jobs import within_reach
from common.jobs.backend import Device
from common.jobs.files import CONTENT, FILE_ID, FOLDER
from common.jobs.folder import ARTIFACTS
from common.models import adapters, gguf_import, hub
from common.training.settings import TrainSettings
from common.vram import model_shape, preflight
from common.web.app import Problem

IMPORTING = threading.Lock()
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CACHES = "caches"  # of teachers, in the service's folder; they are asked for by name
TABLE, OTHERS = "jobs.db", ("runner.lock", "reserve", CACHES)  # the service's own; how the table's files begin
HUB_SECONDS = hub.SECONDS  # a question to the Hub may take
TOKENIZER_SECONDS = 60.0  # two tokenizers may take to be loaded, the first time also downloaded
REMEMBER = 600.0  # seconds that a yes of the Hub holds


def import_libraries() -> None:
    """Import what the checks need, which takes seconds; by one thread, as it goes wrong by two at the same time."""
    with IMPORTING:
        import torch  # noqa: F401
        from huggingface_hub import HfApi  # noqa: F401
        from transformers import AutoConfig, AutoTokenizer  # noqa: F401


class Reach:
    """Names to places.

    Args:
        roots: folders under which local paths are allowed.
        own: the service's own folder, of which only what trainings have left, and what was sent, is in reach.
        uploaded: where a file that was sent to the service is, by its id.
    """

    def __init__(
        self,
        roots: Sequence[Path],
        own: Path | None = None,
        uploaded: Callable[[str], Path | None] = lambda name: None,
    ) -> None:
        self.uploaded = uploaded
        self.roots = [os.path.realpath(root) for root in roots]
        self.own = os.path.realpath(own) if own else None
        self._known: dict[tuple[str, str], float] = {}

    def local(self, name: str) -> str | None:
        """The real path of what exists under an allowed root."""
        path = os.path.realpath(name)
        inside = any(path == root or path.startswith(root + os.sep) for root in self.roots)
        return path if inside and os.path.exists(path) and not self._is_own(path) else None

    def _is_own(self, path: str) -> bool:
        """Whether a path is, or holds, what the service runs by: its table, a job's plan or log, a file's record."""
        if self.own is None:
            return False
        if path == self.own or self.own.startswith(path.rstrip(os.sep) + os.sep):
            return True
        first, *others = os.path.relpath(path, self.own).split(os.sep)
        if first == "jobs":  # jobs/<id>/artifacts is what a training has left
            return len(others) < 2 or others[1] != ARTIFACTS
        if first == FOLDER:  # files/<id>/content.jsonl is what was sent
            return len(others) < 2 or not FILE_ID.fullmatch(others[0]) or not others[1].startswith(CONTENT)
        return first in OTHERS or first.startswith(TABLE)

    def model(self, field: str, name: str) -> str:
        """The place of a model: a folder or a GGUF here, else an id on the Hub. Raises Problem 422."""
        path = self.local(name)
        if path is None:
            return self._on_hub("model", field, name)
        if os.path.isfile(os.path.join(path, "config.json")) or adapters.is_adapter(path):
            return path
        try:
            gguf = gguf_import.local_gguf(path)
            if gguf is None:
                raise Problem(422, f"{field}: the folder {name} holds no model", field)
            gguf_import.check(gguf)
        except UserError as error:
            raise Problem(422, f"{field}: {str(error).replace(path, name)}", field) from error
        return path

    def dataset(self, field: str, name: str) -> str:
        """The place of a data set: a file or folder here, else an id on the Hub. Raises Problem 422."""
        return self.local(name) or self._on_hub("dataset", field, name)

    def file(self, field: str, name: str) -> str:
        """The place of a file, which may be given by its id. Raises Problem 422."""
        if (sent := self.uploaded(name)) is not None:
            return str(sent)
        path = self.local(name)
        if path is None or not os.path.isfile(path):
            raise Problem(422, f"{field}: there is no file {name!r} under the allowed folders (ALLOWED_ROOTS)", field)
        return path

    def folder(self, field: str, name: str) -> str:
        """The place of a folder. Raises Problem 422."""
        path = self.local(name)
        if path is None or not os.path.isdir(path):
            raise Problem(422, f"{field}: there is no folder {name!r} under the allowed folders (ALLOWED_ROOTS)", field)
        return path

    def plain_name(self, field: str, name: str) -> str:
        """A name that is no path. Raises Problem 422."""
        if not NAME.fullmatch(name):
            raise Problem(422, f"{field}: give a name of letters, digits, '.', '_' and '-', not a path", field)
        return name

    def _on_hub(self, kind: str, field: str, name: str) -> str:
        if not HUB_ID.fullmatch(name):
            sentence = f"{field}: there is no {kind} {name!r} under the allowed folders (ALLOWED_ROOTS)"
            raise Problem(422, sentence + self._others(kind), field)
        if time.monotonic() - self._known.get((kind, name), -REMEMBER) < REMEMBER:
            return name
        reason = self.ask_hub(kind, name)
        if reason:
            sentence = f"{field}: the {kind} {name!r} cannot be reached: {reason}{self._others(kind)}"
            raise Problem(422, sentence, field)
        self._known[kind, name] = time.monotonic()
        return name

    def _others(self, kind: str) -> str:
        """What may be named instead, to end a sentence with."""
        return f"; {within_reach.which_models(self)}" if kind == "model" else ""

    def ask_hub(self, kind: str, name: str) -> str | None:
        """Why a name cannot be had from the Hub or its cache here; None when it can."""
        import_libraries()
        if hub.is_cached(name) if kind == "model" else cached_dataset(name):
            return None
        return hub.why_not(name, kind, HUB_SECONDS)


def cached_dataset(name: str) -> bool:
    """Whether the datasets library has a data set in its cache."""
    from huggingface_hub.constants import HF_HOME

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or os.path.join(HF_HOME, "datasets"))
    return (cache / name.replace("/", "___").lower()).is_dir()


class Vocabularies:
    """Whether a teacher's token ids mean the same to a student; each pair is compared once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.differences: dict[tuple, str | None] = {}

    def check(self, teacher: str, student: str) -> None:
        """Raises Problem 422 where the tokenizers differ or cannot be had."""
        key = (teacher, changed(teacher), student, changed(student))
        with self._lock:  # the first comparison imports transformers, which takes a while
            if key not in self.differences:
                self.differences[key] = self._difference(teacher, student)
        if reason := self.differences[key]:
            raise Problem(422, f"teacher: its tokenizer is not the student's: {reason}", "teacher")

    def _difference(self, teacher: str, student: str) -> str | None:
        import_libraries()
        from common.models import tokenizers

        def compare() -> str | None:
            both = [tokenizers.load_tokenizer(name) for name in (teacher, student)]
            return tokenizers.same_vocabulary(*both)

        try:
            return hub.within(TOKENIZER_SECONDS, compare)
        except UserError as error:
            raise Problem(422, f"teacher: {error}", "teacher") from error
        except TimeoutError as error:
            raise Problem(422, f"teacher: no tokenizer within {TOKENIZER_SECONDS:g} s; try again", "teacher") from error


def changed(folder: str) -> float:
    """When the newest file of a local model was written; 0 of one on the Hub."""
    if os.path.isfile(folder):  # a GGUF
        return os.stat(folder).st_mtime
    try:
        return max((entry.stat().st_mtime for entry in os.scandir(folder)), default=0.0)
    except OSError:
        return 0.0


def as_fields(changes: Mapping[str, Any]) -> str:
    """Fields of a request and their values, as a sentence names them."""
    return ", ".join(f"{field}={value}" for field, value in changes.items())


class DoesNotFit(Problem):
    """422: a training is predicted to need more memory than its device has.

    Args:
        needed, size: bytes.
        changes: fields of the request, and the values with which it would fit.
    """

    def __init__(self, needed: int, size: int, changes: Mapping[str, Any]) -> None:
        self.fields = as_fields(changes)
        self.sentence = f"about {needed / 1e9:.1f} GB are needed, the device has {size / 1e9:.1f}; it would fit with "
        first = next(iter(changes))
        super().__init__(422, f"{first}: {self.sentence}{self.fields}", first)


def check_memory(settings: TrainSettings, device: Device) -> None:
    """Raises Problem 422 where a training is predicted to need more memory than its device has (see `DoesNotFit`).

    A model of a kind that cannot be predicted passes: its training finds out.
    """
    if device.size is None:
        return
    names = [name for name in (settings.student, getattr(settings, "teacher", None)) if name]
    if not all(map(os.path.isdir, names)):
        import_libraries()
    try:
        plan = settings.plan(cuda=device.cuda)
    except model_shape.UnknownShape:
        return
    import_libraries()
    needed = preflight.predict(plan).total
    if needed <= device.size:
        return
    try:
        changes = preflight.advise(plan, settings.memory_flags(plan.batch), device.size)
    except preflight.NothingFits as error:
        raise Problem(422, f"student: {error.sentence(as_fields)}", "student") from error
    if "teacher_cache" in changes:  # the service keeps caches by name
        changes["teacher_cache"] = f"cache-{secrets.token_hex(4)}"
    raise DoesNotFit(needed, device.size, changes)
