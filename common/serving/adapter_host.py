"""One base model with many adapters on it, or an export, in a process of its own, which the server starts
(`model_process`).

PEFT adapters are not thread-safe: neither `set_adapter` nor `adapter_names=` may be used from two threads at once; that
gives wrong answers without an error. So each base model belongs to one process that does one thing after the other
(`Host`): it takes batches from a queue and switches adapters between them. The server's own process keeps Python's lock
to itself that way, and so does the model; memory is given back when a process ends, and one that is killed takes
nobody along.

Texts of several LoRA adapters, and of the base, share forward passes, and so do rows of labels
(`lora_inference.segments`); an adapter of another kind has passes of its own.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import processes
from common.cli import UserError, log, prepare_process
from common.files import sha256_file
from common.models import adapters, gguf_import, onnx_runtime, tokenizers, unproven
from common.models import loading as models
from common.models.batching import CPU_BATCH_TOKENS
from common.models.onnx_runtime import is_onnx
from common.models.source import LLAMA_CPP, ModelSource
from common.serving import shared_adapters
from common.serving.batch_queue import BatchQueue, QueuedRequest
from common.serving.channel import Channel
from common.serving.messages import (
    Abandoned,
    Answers,
    Beat,
    Broken,
    Close,
    Encoder,
    EncodesWith,
    Fault,
    HostSettings,
    KeepVersions,
    Loaded,
    Start,
    State,
    Taken,
    Unusable,
    Withdraw,
)
from common.serving.run_registry import Version, signature_of
from common.serving.texts import TextSession, Unloaded
from common.serving.view import RankingWork, TextWork, View, rank_together
from common.vram import preflight as vram

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


BEAT = 1.0  # seconds between two signs of life, at least


class Host:
    """A base model and the adapters on it; what it hears and says is in `messages`.

    Args:
        base: folder or Hub id.
        adapters: about how many there will be on it, to tell whether the memory is enough.
    """

    def __init__(self, base: str, settings: HostSettings, adapters: int, channel: Channel) -> None:
        self.base, self.settings, self.adapters, self.channel = base, settings, adapters, channel
        self.queue = BatchQueue(settings.max_batch_tokens, settings.max_wait, self._kin)
        self.model: Any = None
        self.batch: list[QueuedRequest] = []  # what is being worked on
        self._taken: list[list[QueuedRequest]] = []  # batches that were begun, one within the other
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
        self._last_beat = 0.0
        self._attached = self._unloads = 0
        self._mixes = True  # several adapters may share a pass

    def serve(self) -> None:
        """Load the base, then work until the server closes the channel or goes away."""
        try:
            started = time.perf_counter()
            models.check_model_dir(self.base)
            self._check_memory()
            self.load()
        except Exception as error:  # of a library, too: the server has to know
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            log(f"the base {self.base} cannot be loaded: {reason}")
            self.channel.send(Broken(reason))
            while not self._closing:  # or gone: what is sent by an end that has closed can be lost
                self.receive(None)
            return
        self.report_loaded("base", self.base, time.perf_counter() - started)
        self._send_state()
        # Rounds of the garbage collector over all of torch's and the model's objects took a fifth of the time of a
        # request; from here on they leave alone what is there now.
        gc.collect()
        gc.freeze()
        while True:
            self.receive(self.queue.due())
            if self.queue and (self._closing or self.queue.due() == 0):
                self.begin(self.queue.take())
            elif self._closing:
                return

    def report_loaded(self, kind: str, name: str, seconds: float) -> None:
        """Say how long something took to load; see `messages.Loaded`."""
        self.channel.send(Loaded(kind, name, seconds))

    def receive(self, wait: float | None) -> None:
        """Take in what has arrived; wait for it up to `wait` seconds, None without end."""
        for message in self.channel.receive(0.0 if self._closing else wait):
            match message:
                case QueuedRequest():
                    self.queue.put(message)
                case Withdraw(number):
                    if not self.queue.withdraw(number):
                        for request in itertools.chain(*self._taken):
                            request.abandoned = request.abandoned or request.number == number
                    self.channel.send(Beat())
                case KeepVersions(name, versions):
                    self._versions[name] = versions
                    for old in [old for old in self._refused if old.name == name and old not in versions]:
                        del self._refused[old]
                case Close():
                    self._closing = True

    def _send_state(self) -> None:
        views = {version: view.warm for version, view in self.views.items()}
        self.channel.send(State(self._base_hash, views, _gpu_bytes()))

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
            self.queue.max_batch_tokens = self.queue.pass_tokens = self.settings.max_batch_tokens

    def load(self) -> None:
        """Load the base. Raises UserError."""
        models.check_model_dir(self.base)
        self._signature = signature_of(self.base)
        if is_onnx(self.base):
            self.model, self._tokenizers[_tokenizer_key(self.base)] = onnx_runtime.load(self.base)
            return
        if gguf_import.file_of(self.base):
            source = ModelSource(self.base, engine=LLAMA_CPP)
            self.model, self._tokenizers[self.base] = models.load_gguf(source, self.settings.max_batch_tokens)
            self.model.hooks.append(self.between_steps)
            self._base_hash = adapters.adapter_hash(self.base)[:16]
            return
        unproven.warn_of(self.base)
        self.model = models.load_base(ModelSource(self.base, load_in_4bit=self.settings.load_in_4bit)).eval()
        self._base_hash = adapters.fingerprint(self.model)
        models.align_model(self.model, self._tokenizer(self.base))
        if self.model.device.type == "cpu":
            self.queue.pass_tokens = min(self.queue.max_batch_tokens, CPU_BATCH_TOKENS)
        # Runs before every forward pass, also those within `generate`, whoever calls it.
        self.model.register_forward_pre_hook(lambda module, inputs: self.between_steps())

    def _unload(self) -> None:
        """Let go of the base, since something was left on it; it is loaded anew when it is needed next."""
        self._unloads += 1
        self.model = None
        self.views.clear()
        self._active, self._layers = None, []

    def begin(self, batch: list[QueuedRequest]) -> None:
        """Answer a batch, also within a longer one."""
        self.channel.send(Taken([request.number for request in batch]))
        self._answer(batch)

    def _answer(self, batch: list[QueuedRequest], *, joins: bool = True) -> bool:
        """Do a batch and send its answers, those of texts as they end; what is answered leaves `batch`.

        Where it fails the rest is done one by one, so that a bad request harms itself alone; of several adapters,
        each's by themselves first.

        Args:
            joins: requests that come meanwhile may enter a batch of texts.

        Returns:
            Whether one of them has failed even by itself.
        """
        outer, self.batch = self.batch, batch
        self._taken.append(batch)
        try:
            failure = self._do(batch, joins)
            return bool(failure) and self._answer_alone(batch, failure, joins)
        finally:
            self.batch = outer
            self._taken.pop()

    def _do(self, batch: list[QueuedRequest], joins: bool) -> _Failure | None:
        """Do a batch as one, and send its answers; where it fails, what is not answered stays in `batch`."""
        parts = _by_key(batch)
        batch[:] = itertools.chain(*parts)
        mixed = len(parts) > 1
        try:
            view = self._view(batch[0].key[0])
            if isinstance(batch[0].key[1], TextWork):
                mixed = joins and self._mixes and view.shares_steps
                self._activate(None if mixed else view.adapter)
                TextSession(self, view, batch, mixes=mixed, joins=joins).write()
                return None
            answers = self._answers_to(parts)
        except (Exception, Unloaded) as error:
            return _Failure.of(error, mixed)
        self.channel.send(Answers([request.number for request in batch], answers))
        return None

    def _answer_alone(self, batch: list[QueuedRequest], failure: _Failure, joins: bool) -> bool:
        """See `_answer`: of a batch that has failed as one."""
        error = failure.error
        if not isinstance(error, UserError):
            gc.collect()  # what the batch had in memory holds on to itself, on a process that may be idle next
        out_of_memory = _is_out_of_memory(error)
        if isinstance(error, Unloaded):
            return self._answer(batch, joins=joins)
        parts = _by_key(batch)
        several = failure.mixed or len(parts) > 1 or (len(batch) > 1 and not isinstance(error, Unusable))
        if several and not isinstance(error, Abandoned):
            alone = parts if len(parts) > 1 else [[request] for request in batch]
            failed = any([self._answer(part, joins=False) for part in alone])
            if failure.mixed and not (failed or out_of_memory or isinstance(error, UserError)):
                self._stop_mixing(failure.report)
            return failed
        if out_of_memory:  # a batch was tried row by row
            error = UserError("the device ran out of memory; send less text in one request, or lower MAX_BATCH_TOKENS")
        answer = error if isinstance(error, UserError | Abandoned) else Fault(failure.report)
        self.channel.send(Answers([request.number for request in batch], [answer] * len(batch)))
        return isinstance(answer, Fault)

    def _answers_to(self, parts: list[list[QueuedRequest]]) -> list[Any]:
        """An answer per request, in their order; several parts, which are `_kin`, are ranked together."""
        asked = [(self._view(part[0].key[0]), part[0].key[1], [request.payload for request in part]) for part in parts]
        warm = [view.warm for view, _, _ in asked]
        if len(asked) == 1:
            ((view, work, payloads),) = asked
            self._activate(view.adapter)
            answers = work.run(view, payloads)
        else:
            rankings = []
            for view, work, payloads in asked:
                self._activate(view.adapter)  # its prior may have to be asked for
                rankings.append((view, work.ranking(view, payloads)))
            self._activate(None)
            answers = rank_together(rankings)
        if warm != [view.warm for view, _, _ in asked]:
            self._send_state()
        return answers

    def _kin(self, key: tuple[Version, Any]) -> Hashable:
        """What the keys of requests have in common that may share a batch: texts are asked for of one adapter, or of
        several that can share steps; the same rows of labels, of adapters that can share a pass. Other keys are kin to
        themselves alone."""
        version, work = key
        view = self.views.get(version)
        if view and isinstance(work, TextWork):
            return TextWork if self._mixes and view.shares_steps else (TextWork, version)
        if self._mixes and view and isinstance(work, RankingWork) and view.shares_passes:
            return work, view.tokenizer
        return key

    def _stop_mixing(self, report: str) -> None:
        """A pass over several adapters has failed for no fault of a request: each has its own from now on."""
        log(f"the adapters on {self.base} have passes of their own from now on:\n{report}")
        self._mixes = False

    def between_steps(self) -> None:
        """Within a longer piece of work: let short ones go first, and show that the process is alive.

        Raises:
            Abandoned: nobody waits for the longer one any more.
            Unloaded: the base that the longer one is on has gone.
        """
        if time.monotonic() - self._last_beat > BEAT:
            self._last_beat = time.monotonic()
            self.channel.send(Beat())
        if not self.batch or self.batch[0].urgent:
            return
        self.receive(0.0)
        active, unloads = self._active, self._unloads
        if batch := self.queue.take(urgent=True):  # one batch a step, so that the longer work goes on, too
            import torch

            from common.models import lora_inference

            # what it loads is there for longer than the pass that it goes before
            with lora_inference.segments(None), torch.inference_mode(False):
                self.begin(batch)
            if self._unloads != unloads:
                raise Unloaded
            self._activate(active)
        if all(request.abandoned for request in self.batch):
            raise Abandoned

    def _view(self, version: Version) -> View:
        if version in self._refused:
            raise Unusable(self._refused[version])
        if self.model is None:
            try:
                self.load()
            except UserError as error:
                raise Unusable(str(error)) from error
        if version not in self.views:
            try:
                started = time.perf_counter()
                self.views[version] = View(self, version, *self._attach(version))
                self.report_loaded("adapter", version.name, time.perf_counter() - started)
            except Exception as error:  # whatever a library makes of files that are not what they should be
                if _is_out_of_memory(error):
                    raise
                reason = str(error)
                if not isinstance(error, UserError):
                    log(f"{version.model_dir} cannot be loaded:\n{traceback.format_exc()}")
                    reason = f"{version.model_dir} cannot be loaded ({type(error).__name__}); train it again"
                self._refused[version] = reason
                raise Unusable(reason) from error
            self._detach_old(version.name)
            self._send_state()
            self._offer_encoder(version)
        return self.views[version]

    def _offer_encoder(self, version: Version) -> None:
        """Let the server encode this version's prompts, on a core of its own while the model computes."""
        tokenizer = self.views[version].tokenizer
        if tokenizer not in self._encoders:
            encoder = tokenizers.prompt_encoder(tokenizer)
            self._encoders[tokenizer] = None if encoder is None else len(self._encoders)
            if encoder is not None:
                self.channel.send(Encoder(self._encoders[tokenizer], encoder))
        if (number := self._encoders[tokenizer]) is not None:
            self.channel.send(EncodesWith(version, number))

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
        shared_adapters.check(version.model_dir, [key for key, _ in self.model.named_modules()])
        before = self._shape()
        try:
            self.model = adapters.load_adapter(self.model, version.model_dir, name=name).eval()
        except BaseException:
            self._active = ""  # PEFT may have switched
            if self._shape() != before:
                self._unload()
            raise
        self._active = ""  # PEFT has switched
        self._layers = [module for module in self.model.modules() if hasattr(module, "_active_adapter")]
        try:
            if signature_of(version.model_dir) != version.signature:
                raise UserError(f"{version.model_dir} changed while it was being loaded; send the request again")
            tokenizer = self._tokenizer(adapters.tokenizer_folder(version.model_dir, self.base))
            tokenizers.fit_to_embedding(tokenizer, self.model.get_input_embeddings().weight.shape[0])
        except BaseException:
            self._detach(name)
            raise
        return name, tokenizer

    def _shape(self) -> list[tuple[str, torch.Size]]:
        """The model's weights by name and size: the same after a failed load as before it."""
        return [(name, weight.shape) for name, weight in self.model.named_parameters()]

    def _detach_old(self, name: str) -> None:
        """Drop the versions of a run that are too old to be asked for, runs that were deleted, and what stayed of an
        adapter that was the only one when it failed."""
        current = self._versions.get(name, ())
        running = {request.key[0] for request in itertools.chain(*self._taken)}
        for version in list(self.views):
            old = version.name == name and version not in current
            deleted = version.adapter and not Path(version.model_dir).is_dir()
            if (old or deleted) and version not in running:
                del self.views[version]
        wanted = {view.adapter for view in self.views.values()}
        for adapter in [*getattr(self.model, "peft_config", ())]:
            if adapter not in wanted:
                self._detach(adapter)

    def _detach(self, adapter: str) -> None:
        """Give an adapter's memory back; the last one stays, without which PEFT's model computes nothing."""
        if len(self.model.peft_config) > 1:
            with warnings.catch_warnings():  # that PEFT makes another one active
                warnings.simplefilter("ignore")
                self.model.delete_adapter(adapter)
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
        key = folder if folder in self._tokenizers else _tokenizer_key(folder)
        if key not in self._tokenizers:
            self._tokenizers[key] = tokenizers.load_tokenizer(folder)
        return self._tokenizers[key]


@dataclass(frozen=True)
class _Failure:
    """Why a batch could not be done as one.

    Attributes:
        error: without its traceback, which would keep all that the batch had in memory.
        report: that traceback, as text.
        mixed: several adapters had a part in it.
    """

    error: BaseException
    report: str
    mixed: bool

    @classmethod
    def of(cls, error: BaseException, mixed: bool) -> _Failure:
        """Of an exception that is being handled."""
        report = traceback.format_exc()
        error.__cause__ = error.__context__ = None
        return cls(error.with_traceback(None), report, mixed)


def _by_key(batch: list[QueuedRequest]) -> list[list[QueuedRequest]]:
    parts: dict[Hashable, list[QueuedRequest]] = {}
    for request in batch:
        parts.setdefault(request.key, []).append(request)
    return [*parts.values()]


def _is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"  # torch's, of a card; an export's runtime needs no torch


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
    """A model's process at its end of a pair of sockets: the first message says what to load."""
    channel = Channel(end)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the server is gone, and so are we
        match next(channel.receive(None)):
            case Start(base, settings, adapters):
                Host(base, settings, adapters, channel).serve()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a service manager stops all processes; this one by its server
    processes.die_with_parent(int(sys.argv[2]))
    prepare_process()
    main(socket.socket(fileno=int(sys.argv[1])))
