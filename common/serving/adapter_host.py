"""One base model with many adapters on it, in a process of its own, which the server starts (`model_process`).

PEFT adapters are not thread-safe: neither `set_adapter` nor `adapter_names=` may be used from two threads at once; that
gives wrong answers without an error. So each base model belongs to one process that does one thing after the other
(`Host`): it takes batches from a queue and switches adapters between them. The server's own process keeps Python's lock
to itself that way, and so does the model; memory is given back when a process ends, and one that is killed takes
nobody along.

A batch has one adapter. PEFT can mix them in one pass, but on two cores with the miniature and four adapters that was
faster only with few rows of each (4 rows: 28 ms against 30 for a pass per adapter; 16 rows, as with 64 clients: 94
against 78; 32 rows: 190 against 139).
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common.cli import UserError, log
from common.files import sha256_file
from common.models import adapters, tokenizers
from common.models import loading as models
from common.models.onnx_runtime import OnnxModel, is_onnx
from common.models.source import LoadedModel, ModelSource
from common.serving.batch_queue import BatchQueue, Job
from common.serving.channel import Channel
from common.serving.run_registry import LOOK, Version, file_signature, signature_of
from common.tasks.ranking.calibration import Calibration
from common.tasks.ranking.task import LabelTask
from common.vram import preflight as vram

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.tasks.ranking.classifier import Classifier

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
    load_in_4bit: str = "auto"
    auto_fit: bool = False  # where memory is short, take a smaller batch or 4 bits, and say so


class View:
    """A model as requests see it: a base with one adapter, or none, active. For the host alone."""

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
            from common.tasks.ranking.classifier import Classifier

            started = time.perf_counter()
            self._classifiers[task.name] = Classifier.on(
                LoadedModel(self.host.model, self.tokenizer, self.host.settings.max_batch_tokens),
                self.version.model_dir,
                task,
                num_null_prompts=self.host.settings.num_null_prompts,
                model_hash=self.version.sha256,
                prior_dir=self.prior_dir(),
            )
            self.host.timed("prior", self.version.name, time.perf_counter() - started)
        return self._classifiers[task.name]

    def calibration(self, task: LabelTask) -> Calibration:
        """The one the scripts choose by default: fitted where there is one, read again when it has changed."""
        from common.tasks.ranking.classifier import CALIBRATION_FILE

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


class Fault(Exception):
    """Something that the program did wrong in a model's process; its text is the traceback there."""


@dataclass(frozen=True)
class State:
    """What the server is told of a model's process whenever it changes.

    Attributes:
        base_hash: `adapters.fingerprint` of the base; None while it is not loaded, and for an export.
        views: the versions that are loaded, and whether their prior is known.
        gpu_bytes: that torch has given out.
    """

    base_hash: str | None = None
    views: dict[Version, bool] = field(default_factory=dict)
    gpu_bytes: int = 0


class Host:
    """A base model and the adapters on it.

    Messages that come: `job` (a Job), `withdraw` (its number), `versions` (a run's name, and those of its versions that
    may stay loaded), `close`. Messages that go: `broken` (why the base cannot be loaded), `state` (a State), `timed`
    ("base" | "adapter" | "prior", name, seconds), `taken` (the numbers of a batch), `text` (a part of an answer, for
    the job with that number), `encoder` (a number and a PromptEncoder), `encodes` (a version, and which does), `done`
    (the numbers and the answers of a batch; an answer can be an exception).

    Args:
        base: folder or Hub id.
        adapters: about how many there will be on it, to tell whether the memory is enough.
    """

    def __init__(self, base: str, settings: HostSettings, adapters: int, channel: Channel) -> None:
        self.base, self.settings, self.adapters, self.channel = base, settings, adapters, channel
        self.queue = BatchQueue(settings.max_batch_tokens, settings.max_wait)
        self.model: Any = None
        self.batch: list[Job] = []  # what is being worked on
        self._taken: list[list[Job]] = []  # batches that were begun, one within the other
        self.views: dict[Version, View] = {}
        self._versions: dict[str, list[Version]] = {}
        self._closing = False
        self._refused: dict[Version, str] = {}
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        self._encoders: dict[PreTrainedTokenizerBase, int | None] = {}
        self._base_hash: str | None = None
        self._signature: tuple = ()  # of the base's files when it was loaded
        self._active: str | None = None
        self._layers: list[Any] = []  # those that adapters are in
        self._attached = 0

    def serve(self) -> None:
        """Load the base, then work until the server closes the channel or goes away."""
        try:
            started = time.perf_counter()
            self._check_memory()
            self._load()
        except Exception as error:  # of a library, too: the server has to be told
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            log(f"the base {self.base} cannot be loaded: {reason}")
            self.channel.send("broken", reason)
            while not self._closing:  # or gone: what is sent by an end that has closed can be lost
                self._receive(None)
            return
        self.timed("base", self.base, time.perf_counter() - started)
        self._tell()
        # Rounds of the garbage collector over all of torch's and the model's objects took a fifth of the time of a
        # request; from here on they leave alone what is there now.
        gc.collect()
        gc.freeze()
        while True:
            self._receive(self.queue.due())
            if self.queue and (self._closing or self.queue.due() == 0):
                self._begin(self.queue.take())
            elif self._closing:
                return

    def timed(self, kind: str, name: str, seconds: float) -> None:
        """Tell how long something took to load."""
        self.channel.send("timed", kind, name, seconds)

    def emit(self, text: str) -> None:
        """Send a part of the answer that is being written; the job is alone in its batch."""
        self.channel.send("text", self.batch[0].number, text)

    def _receive(self, wait: float | None) -> None:
        for kind, *fields in self.channel.receive(0.0 if self._closing else wait):
            match kind:
                case "job":
                    self.queue.put(*fields)
                case "withdraw":
                    (number,) = fields
                    if not self.queue.withdraw(number):
                        for job in itertools.chain(*self._taken):
                            job.abandoned = job.abandoned or job.number == number
                case "versions":
                    name, versions = fields
                    self._versions[name] = versions
                    for old in [old for old in self._refused if old.name == name and old not in versions]:
                        del self._refused[old]
                case "close":
                    self._closing = True

    def _tell(self) -> None:
        views = {version: view.warm for version, view in self.views.items()}
        self.channel.send("state", State(self._base_hash, views, _gpu_bytes()))

    def _check_memory(self) -> None:
        """Raises UserError where the base and its adapters need more memory than is free, with what would fit."""
        changed = vram.before_serving(
            self.base,
            adapters=self.adapters,
            max_batch_tokens=self.settings.max_batch_tokens,
            load_in_4bit=self.settings.load_in_4bit,
            auto_fit=self.settings.auto_fit,
        )
        if changed:
            names = {"MAX_BATCH_TOKENS": "max_batch_tokens", "LOAD_IN_4BIT": "load_in_4bit"}
            fitting = {names[name]: value for name, value in changed.items() if name in names}
            self.settings = replace(self.settings, **fitting)
            self.queue.max_batch_tokens = self.settings.max_batch_tokens

    def _load(self) -> None:
        models.check_model_dir(self.base)
        self._signature = signature_of(self.base)
        self.views.clear()
        self._active, self._layers = None, []
        if is_onnx(self.base):
            self.model = OnnxModel(self.base)
            return
        self.model = models.load_base(ModelSource(self.base, load_in_4bit=self.settings.load_in_4bit)).eval()
        self._base_hash = adapters.fingerprint(self.model)
        models.align_model(self.model, self._tokenizer(self.base))
        # Runs before every forward pass, also those within `generate`, whoever calls it.
        self.model.register_forward_pre_hook(lambda module, inputs: self._between_steps())

    def _begin(self, jobs: list[Job]) -> None:
        self.channel.send("taken", [job.number for job in jobs])
        self._taken.append(jobs)
        try:
            self._answer(jobs)
        finally:
            self._taken.pop()

    def _answer(self, jobs: list[Job]) -> None:
        """Do a batch and send its answers; where it fails, one by one, so that a bad request harms itself alone."""
        outer, self.batch = self.batch, jobs
        version, work = jobs[0].key
        try:
            view = self._view(version)
            self._activate(view.adapter)
            warm = view.warm
            answers = work.run(view, [job.payload for job in jobs])
            if view.warm != warm:
                self._tell()
        except Exception as error:
            if len(jobs) > 1 and not isinstance(error, Unusable | Abandoned):
                self.batch = outer
                for job in jobs:
                    self._answer([job])
                return
            if type(error).__name__ == "OutOfMemoryError":  # torch's, of a card; a batch was tried row by row
                error = UserError(
                    "the device ran out of memory; send less text in one request, or lower MAX_BATCH_TOKENS"
                )
            known = isinstance(error, UserError | Abandoned)
            answers = [error if known else Fault(traceback.format_exc()) for _ in jobs]
        finally:
            self.batch = outer
        self.channel.send("done", [job.number for job in jobs], answers)

    def _between_steps(self) -> None:
        """Within a longer piece of work: stop when nobody waits for it, and let short ones go first."""
        if not self.batch or self.batch[0].urgent:
            return
        self._receive(0.0)
        active = self._active
        if jobs := self.queue.take(urgent=True):  # one batch a step, so that the longer work goes on, too
            self._begin(jobs)
            self._activate(active)
        if all(job.abandoned for job in self.batch):
            raise Abandoned

    def _view(self, version: Version) -> View:
        if version in self._refused:
            raise Unusable(self._refused[version])
        if version not in self.views:
            try:
                started = time.perf_counter()
                self.views[version] = View(self, version, *self._attach(version))
                self.timed("adapter", version.name, time.perf_counter() - started)
            except UserError as error:
                self._refused[version] = str(error)
                raise Unusable(str(error)) from error
            self._detach_old(version.name)
            self._tell()
            self._offer_encoder(version)
        return self.views[version]

    def _offer_encoder(self, version: Version) -> None:
        """Let the server encode this version's prompts, on a core of its own while the model computes."""
        tokenizer = self.views[version].tokenizer
        if tokenizer not in self._encoders:
            encoder = tokenizers.prompt_encoder(tokenizer)
            self._encoders[tokenizer] = None if encoder is None else len(self._encoders)
            if encoder is not None:
                self.channel.send("encoder", self._encoders[tokenizer], encoder)
        if (number := self._encoders[tokenizer]) is not None:
            self.channel.send("encodes", version, number)

    def _attach(self, version: Version) -> tuple[str | None, PreTrainedTokenizerBase]:
        """(adapter's name within PEFT, tokenizer)."""
        if not version.adapter:
            if self._signature != version.signature:
                raise UserError(f"the base {self.base} has changed on the disk since it was loaded; restart the server")
            return None, self._tokenizer(self.base)
        if signature_of(version.model_dir) != version.signature:
            raise UserError(f"{version.address} is no longer on the disk; ask for {version.name}")
        adapters.check_kind(version.model_dir, shared=True)
        self._attached += 1
        name = f"a{self._attached}"  # a run's own name may hold dots, which module names cannot
        shared = hasattr(self.model, "peft_config")
        try:
            self.model = adapters.load_adapter(self.model, version.model_dir, name=name).eval()
        except UserError:
            if not shared:  # PEFT has left its layers in the base
                self._load()
            raise
        self._active = ""  # PEFT has switched
        self._layers = [module for module in self.model.modules() if hasattr(module, "_active_adapter")]
        if signature_of(version.model_dir) != version.signature:
            raise UserError(f"{version.model_dir} changed while it was being loaded; send the request again")
        tokenizer = self._tokenizer(adapters.tokenizer_folder(version.model_dir, self.base))
        tokenizers.fit_to_embedding(tokenizer, self.model.get_input_embeddings().weight.shape[0])
        return name, tokenizer

    def _detach_old(self, name: str) -> None:
        """Drop the versions of a run that are too old to be asked for."""
        current = self._versions.get(name, ())
        running = {job.key[0] for job in itertools.chain(*self._taken)}
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
        key = _tokenizer_key(folder)
        if key not in self._tokenizers:
            self._tokenizers[key] = tokenizers.load_tokenizer(folder)
        return self._tokenizers[key]


def _tokenizer_key(folder: str) -> str:
    """What tells tokenizers apart: their files' contents, less what depends on where they were loaded from."""
    facts: list[Any] = []
    for name in ("tokenizer.json", "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model"):
        path = Path(folder) / name
        facts.append(sha256_file(path) if path.is_file() else None)
    if not any(facts):
        return folder  # a Hub id
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    facts.append({key: config[key] for key in sorted(config) if key not in ("is_local", "local_files_only")})
    return json.dumps(facts)


def _gpu_bytes() -> int:
    torch = sys.modules.get("torch")  # an export's runtime needs none
    return torch.cuda.memory_allocated() if torch is not None and torch.cuda.is_available() else 0


def main(end: socket.socket) -> None:
    """A model's process: the first message tells what to load."""
    channel = Channel(end)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the server is gone, and so are we
        kind, *fields = next(channel.receive(None))
        assert kind == "start"
        Host(*fields, channel).serve()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a service manager stops all processes; this one by its server
    # Under the name by which the server knows this module's classes.
    from common.serving import adapter_host

    adapter_host.main(socket.socket(fileno=int(sys.argv[1])))
