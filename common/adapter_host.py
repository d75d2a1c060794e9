"""One base model with many adapters on it, in a thread of its own.

PEFT adapters are not thread-safe: neither `set_adapter` nor `adapter_names=` may be used from two threads at once; that
gives wrong answers without an error. So each base model belongs to one thread (`Host`), which takes batches from a
queue and switches adapters between them.

A batch has one adapter. PEFT can mix them in one pass, but on two cores with the miniature and four adapters that was
faster only with few rows of each (4 rows: 28 ms against 30 for a pass per adapter; 16 rows, as with 64 clients: 94
against 78; 32 rows: 190 against 139).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import re
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common import models, records
from common.calibration import Calibration
from common.cli import UserError, log
from common.micro_batches import BatchQueue, Job
from common.onnx_model import OnnxModel, is_onnx
from common.run_registry import LOOK, Version, file_signature, signature_of
from common.tasks import LabelTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.classifier import Classifier

RETRY = 10.0  # seconds until a base that could not be loaded is tried again
PRIORS = ".priors"  # in the folder of the runs: priors of base models that have no folder of their own


class Work(Protocol):
    """What is done with a model for a batch of requests. Equal works may share a batch, so it is hashable by value.

    Attributes:
        name: the task, in metrics and logs.
        urgent: short enough to go between two steps of something longer.
    """

    name: str
    urgent: bool

    def run(self, view: View, payloads: Sequence[Any]) -> list[Any]:
        """One answer per payload. The view's adapter is active. A UserError is the fault of one of the payloads."""
        ...


@dataclass
class HostSettings:
    """How models are loaded and batched; see `serving.Settings`."""

    max_batch_tokens: int
    max_wait: float
    max_queue: int
    task: LabelTask
    num_null_prompts: int | None
    runs_dir: str


class View:
    """A model as requests see it: a base with one adapter, or none, active. For the host's thread alone."""

    def __init__(self, host: Host, version: Version, adapter: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
        self.host, self.version, self.adapter, self.tokenizer = host, version, adapter, tokenizer
        self.kept: OrderedDict[Any, Any] = OrderedDict()  # what works keep for their next batch
        self._classifiers: dict[str, Classifier] = {}
        self._calibrations: dict[str, tuple[float, tuple | None, Calibration]] = {}

    @property
    def model(self):
        """The torch model.

        Raises:
            Unusable: it is an ONNX export, which gives no text here.
        """
        if isinstance(self.host.model, OnnxModel):
            raise Unusable(f"{self.version.name} is an ONNX export, which ranks labels alone; ask for the run it is of")
        return self.host.model

    def classifier(self, task: LabelTask) -> Classifier:
        """The label ranker of this model, with its prior (from the disk where it is there)."""
        if task.name not in self._classifiers:
            from common.classifier import Classifier

            started = time.perf_counter()
            self._classifiers[task.name] = Classifier(
                self.version.model_dir,
                task,
                loaded=(self.host.model, self.tokenizer),
                max_batch_tokens=self.host.settings.max_batch_tokens,
                num_null_prompts=self.host.settings.num_null_prompts,
                model_hash=self.version.sha256,
                prior_dir=self.prior_dir(),
            )
            self.host.timed("prior", self.version.name, time.perf_counter() - started)
        return self._classifiers[task.name]

    def calibration(self, task: LabelTask) -> Calibration:
        """The one the scripts choose by default: fitted where there is one, read again when it has changed."""
        from common.classifier import CALIBRATION_FILE

        until, signature, known = self._calibrations.get(task.name, (0.0, None, None))
        now = time.monotonic()
        if now > until:
            found = file_signature(os.path.join(self.version.model_dir, CALIBRATION_FILE))
            if known is None or found != signature:
                known = self.classifier(task).calibration(None)
            self._calibrations[task.name] = (now + LOOK, found, known)
        return known

    @property
    def warm(self) -> bool:
        return bool(self._classifiers)

    def keep(self, key: Any, make: Callable[[], Any], most: int = 16) -> Any:
        """`make()`, or what it gave the last time; the least recently used goes when there are more than `most`."""
        if key not in self.kept:
            self.kept[key] = make()
        self.kept.move_to_end(key)
        while len(self.kept) > most:
            self.kept.popitem(last=False)
        return self.kept[key]

    def prior_dir(self) -> Path:
        """Where the prior is cached: in the model's folder, or for a Hub id beside the runs."""
        if Path(self.version.model_dir).is_dir():
            return Path(self.version.model_dir)
        folder = Path(self.host.settings.runs_dir) / PRIORS / re.sub(r"[^\w.-]+", "--", self.version.model_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class Unusable(UserError):
    """The model on the disk cannot be loaded or used; no fault of a request."""


class Abandoned(Exception):
    """Nobody waits for the batch any more."""


class _Turnstile:
    """Any number may work at once, but nobody while one loads.

    transformers sets torch's default dtype, device and initialisers while it loads a model, for all threads: another
    host would compute in the wrong precision, or on no device at all.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._working = self._loading = 0

    def enter(self) -> None:
        """Begin to work; waits for those who load or want to."""
        with self._changed:
            self._changed.wait_for(lambda: not self._loading)
            self._working += 1

    def leave(self) -> None:
        with self._changed:
            self._working -= 1
            self._changed.notify_all()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        self.enter()
        try:
            yield
        finally:
            self.leave()

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Be alone; not from within `working`."""
        with self._changed:
            self._loading += 1
            self._changed.wait_for(lambda: not self._working)
            try:
                yield
            finally:
                self._loading -= 1
                self._changed.notify_all()


_turnstile = _Turnstile()


@dataclass
class Host:
    """A thread that owns one base model and the adapters on it.

    Args:
        base: folder or Hub id.
        after: a host that is closing; its memory is waited for.
        deliver: called from the thread with the jobs of a batch once their `answer` is set (an exception, or a value).
        timed: called from it with ("base" | "adapter" | "prior", name, seconds) for each thing that was loaded.
        versions: the versions of a run that may stay loaded, by its name.
    """

    base: str
    settings: HostSettings
    deliver: Callable[[list[Job]], None]
    timed: Callable[[str, str, float], None]
    versions: Callable[[str], list[Version]]
    after: Host | None = None
    model: Any = None
    broken: str | None = None  # why the base cannot be loaded
    broken_since: float = 0.0
    views: dict[Version, View] = field(default_factory=dict)
    batch: list[Job] = field(default_factory=list)  # what is being worked on

    def __post_init__(self) -> None:
        self.queue = BatchQueue(self.settings.max_queue, self.settings.max_batch_tokens, self.settings.max_wait)
        self._refused: dict[Version, str] = {}
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        self.base_hash: str | None = None  # `models.fingerprint`
        self._signature: tuple = ()  # of the base's files when it was loaded
        self._active: str | None = None
        self._layers: list[Any] = []  # those that adapters are in
        self._attached = 0
        self.thread = threading.Thread(target=self._work, name=f"model {self.base}", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Take no more jobs; those accepted are still done, then the memory is given back."""
        self.queue.close()

    def _work(self) -> None:
        if self.after:
            self.after.thread.join()
            self.after = None
        try:
            started = time.perf_counter()
            with _turnstile.loading():
                self._load()
            self.timed("base", self.base, time.perf_counter() - started)
            # Rounds of the garbage collector over all of torch's and the model's objects took a fifth of the time of
            # a request; from here on they leave alone what is there now.
            gc.collect(1)
            gc.freeze()
        except Exception as error:  # of a library, too: the thread has to go on and say so
            self.broken = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self.broken_since = time.monotonic()
            log(f"the base {self.base} cannot be loaded: {self.broken}")
            self.queue.close()
        while jobs := self.queue.take():
            self._answer(jobs)
        self.views.clear()
        self._layers.clear()
        self.model = None
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        _empty_cuda_cache()

    def _load(self) -> None:
        models.check_model_dir(self.base)
        self._signature = signature_of(self.base)
        self.views.clear()
        self._active, self._layers = None, []
        if is_onnx(self.base):
            self.model = OnnxModel(self.base)
            return
        self.model = models.load_base(self.base).eval()
        self.base_hash = models.fingerprint(self.model)
        models.align_model(self.model, self._tokenizer(self.base))
        # Runs before every forward pass, also those within `generate`, whoever calls it.
        self.model.register_forward_pre_hook(lambda module, inputs: self._between_steps())

    def _answer(self, jobs: list[Job]) -> None:
        """Do a batch and deliver it; where it fails, one by one, so that a bad request harms itself alone."""
        outer, self.batch = self.batch, jobs
        version, work = jobs[0].key
        try:
            if self.broken:
                raise Unusable(self.broken)
            view = self._view(version)
            with _turnstile.working():
                self._activate(view.adapter)
                answers = work.run(view, [job.payload for job in jobs])
            for job, answer in zip(jobs, answers, strict=True):
                job.answer = answer
        except Exception as error:
            if len(jobs) > 1 and not isinstance(error, Unusable | Abandoned):
                self.batch = outer
                for job in jobs:
                    self._answer([job])
                return
            for job in jobs:
                job.answer = error
        finally:
            self.batch = outer
        self.deliver(jobs)

    def _between_steps(self) -> None:
        """Within a longer piece of work: stop when nobody waits for it, and let short ones go first."""
        if not self.batch or self.batch[0].urgent:
            return
        active = self._active
        _turnstile.leave()
        try:
            if jobs := self.queue.take_urgent():  # one batch a step, so that the longer work goes on, too
                self._answer(jobs)
        finally:
            _turnstile.enter()
            self._activate(active)
        if all(job.abandoned for job in self.batch):
            raise Abandoned

    def _view(self, version: Version) -> View:
        if version in self._refused:
            raise Unusable(self._refused[version])
        if version not in self.views:
            try:
                started = time.perf_counter()
                with _turnstile.loading():
                    self.views[version] = View(self, version, *self._attach(version))
                self.timed("adapter", version.name, time.perf_counter() - started)
            except UserError as error:
                self._refused[version] = str(error)
                raise Unusable(str(error)) from error
            self._detach_old(version.name)
        return self.views[version]

    def _attach(self, version: Version) -> tuple[str | None, PreTrainedTokenizerBase]:
        """(adapter's name within PEFT, tokenizer)."""
        if not version.adapter:
            if self._signature != version.signature:
                raise UserError(f"the base {self.base} has changed on the disk since it was loaded; restart the server")
            return None, self._tokenizer(self.base)
        if signature_of(version.model_dir) != version.signature:
            raise UserError(f"{version.address} is no longer on the disk; ask for {version.name}")
        self._attached += 1
        name = f"a{self._attached}"  # a run's own name may hold dots, which module names cannot
        shared = hasattr(self.model, "peft_config")
        try:
            self.model = models.load_adapter(self.model, version.model_dir, name=name).eval()
        except UserError:
            if not shared:  # PEFT has left its layers in the base
                self._load()
            raise
        self._active = ""  # PEFT has switched
        self._layers = [module for module in self.model.modules() if hasattr(module, "_active_adapter")]
        if signature_of(version.model_dir) != version.signature:
            raise UserError(f"{version.model_dir} changed while it was being loaded; send the request again")
        return name, self._tokenizer(models.tokenizer_folder(version.model_dir, self.base))

    def _detach_old(self, name: str) -> None:
        """Drop the versions of a run that are too old to be asked for."""
        current = self.versions(name)
        running = {job.key[0] for job in self.batch}
        for version, view in list(self.views.items()):
            if version.name == name and version not in current and version not in running:
                del self.views[version]
                if view.adapter:
                    with warnings.catch_warnings():  # that PEFT makes another one active
                        warnings.simplefilter("ignore")
                        self.model.delete_adapter(view.adapter)
                    self._active = ""

    def _activate(self, adapter: str | None) -> None:
        """Make one adapter active, or none (then the base answers).

        What PEFT's set_adapter does, without its walk over all modules and their gradients: on the miniature that
        costs 1.4 ms a switch, a tenth of a batch of 16 rows.
        """
        if adapter != self._active:
            for layer in self._layers:
                layer._active_adapter = [adapter] if adapter else []
        self._active = adapter

    def _tokenizer(self, folder: str) -> PreTrainedTokenizerBase:
        """The tokenizer of a folder; one object for all folders with the same files, since a real one takes 100 MB."""
        from common.tokenizers import load_tokenizer

        key = _tokenizer_key(folder)
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(folder)
        return self._tokenizers[key]


def _tokenizer_key(folder: str) -> str:
    """What tells tokenizers apart: their files' contents, less what depends on where they were loaded from."""
    facts: list[Any] = []
    for name in ("tokenizer.json", "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model"):
        path = Path(folder) / name
        facts.append(records.sha256_file(path) if path.is_file() else None)
    if not any(facts):
        return folder  # a Hub id
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    facts.append({key: config[key] for key in sorted(config) if key not in ("is_local", "local_files_only")})
    return json.dumps(facts)


def _empty_cuda_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@functools.lru_cache(maxsize=256)
def _base_key(base: str) -> str:
    """One key for the spellings of a folder's path."""
    return os.path.realpath(base) if models.looks_local(base) else base


class Hosts:
    """The bases in memory, at most `most`; the least recently used leaves first."""

    def __init__(self, most: int, start: Callable[[str, Host | None], Host]) -> None:
        self.most, self._start = most, start
        self._hosts: OrderedDict[str, Host] = OrderedDict()

    def get(self, base: str) -> Host:
        """The host of a base; started where there is none, also in place of one that failed to load a while ago."""
        key = _base_key(base)
        host = self._hosts.pop(key, None)
        leaving = None
        if host is None or (host.broken and time.monotonic() - host.broken_since > RETRY):
            if host is None and len(self._hosts) >= self.most:
                leaving = self._hosts.popitem(last=False)[1]
                log(f"the base {leaving.base} leaves memory to make room for {base}")
                leaving.close()
            host = self._start(base, leaving)
        self._hosts[key] = host
        return host

    def base_hash(self, base: str) -> str | None:
        """The fingerprint of a base that is in memory."""
        host = self._hosts.get(_base_key(base))
        return host.base_hash if host else None

    def loaded(self) -> list[Host]:
        """The hosts there are, the least recently used first; some may still be loading."""
        return list(self._hosts.values())

    def close(self) -> None:
        """Finish what was accepted and stop."""
        hosts = self.loaded()
        for host in hosts:
            host.close()
        for host in hosts:
            host.thread.join()
        gc.unfreeze()
