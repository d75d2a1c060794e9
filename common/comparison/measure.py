"""One model of a comparison, measured in a process of its own: what it answers, what it costs, how fast it is.

A process of its own, because only one model at a time fits a small card, because the peak memory of a process cannot be
reset, and because transformers changes torch's process-wide defaults while it loads.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common import run_record
from common.cli import UserError, log
from common.comparison.rows import LABELS, ROWS, SQUAD, TEXT
from common.data.resumable import AnswerStore, content_key
from common.models import adapters, chats, tokenizers
from common.models import loading as models
from common.models.batching import context_of
from common.models.source import LoadedModel, ModelSource
from common.tasks.ranking.task import LabelTask
from common.vram import preflight

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEPT = 32  # rows whose likelihoods are kept together
KEPT_LABELS = 512  # the same of their labels' scores


@dataclass(frozen=True)
class Measurement:
    """What is asked of a model.

    Attributes:
        source: the model.
        kind: LABELS (rows have "text"), SQUAD, ROWS ("input" and "output") or TEXT ("text").
        speed_rows: how many rows, from the first, are timed.
        max_len: tokens of a prompt and its answer, or of a window of text.
        max_new_tokens: tokens of an answer.
        max_batch_tokens: tokens in one forward pass.
        task, calibration: of LABELS.
        auto_fit: where memory is short, take smaller batches or 4 bits, and say so.
        kept: a file that answers are kept in, as they come; what is there is not made again. None: nothing is kept.
    """

    source: ModelSource
    kind: str
    rows: Sequence[dict]
    speed_rows: int
    max_len: int
    max_new_tokens: int
    max_batch_tokens: int
    task: LabelTask | None = None
    calibration: str | None = None
    auto_fit: bool = False
    kept: str | None = None

    def identity(self) -> list[Any]:
        """What tells a model's answers to a row from those of another one, or to another question, as JSON."""
        record = self.task and self.task.record()
        return [*adapters.identity(self.source), self.kind, self.max_len, self.max_new_tokens, record]


def measure_in_own_process(measurement: Measurement) -> dict[str, Any]:
    """`measure` in a new process.

    Raises:
        UserError: what the model's loading raises, or the process was killed (out of memory).
    """
    context = multiprocessing.get_context("forkserver")  # a fresh process, without importing all this once a model
    context.set_forkserver_preload(["common.models.loading", "torch", "peft", "transformers.models.auto.modeling_auto"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, measurement).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"the process that judged {measurement.source.model_dir} was killed, probably for want of memory; "
                "lower --max_batch_tokens or --max_len, or pass --load_in_4bit on"
            ) from error


def measure(measurement: Measurement) -> dict[str, Any]:
    """Load, time, and answer all rows.

    Returns:
        "model_dir"; "facts": parameters, bytes on disk and in memory, peak memory, device (see `size_facts`);
        "seconds" and "speed": see `latency.time_rows` and `latency.summary`; "cut": prompts that were shortened; and of
        every row: "answers" (texts; of LABELS the labels), "nll", "tokens" and "bytes" of the output (ROWS) or of the
        text (TEXT). Of LABELS also "calibration", its method. Where all of that has been kept, it is what was kept.
    """
    store = AnswerStore(measurement.kept)
    if measurement.kind == LABELS:  # their scores are kept; the calibration that follows may have changed
        return _measure(measurement, store)
    asked = [list(measurement.rows), measurement.speed_rows, measurement.max_batch_tokens]
    key = content_key("measured", measurement.identity(), asked)
    if key in store:
        log(f"{measurement.source.model_dir}: measured before")
    else:
        store.add([(key, _measure(measurement, store))])
    return store[key]


def _measure(measurement: Measurement, store: AnswerStore) -> dict[str, Any]:
    import peft  # noqa: F401 (what imports take belongs to the process, not to the model)
    import torch
    import transformers  # noqa: F401

    from common.comparison import latency

    empty = run_record.peak_memory_bytes()["resident"]
    model_dir, rows = measurement.source.model_dir, measurement.rows
    try:
        loaded = preflight.load_within_memory(
            measurement.source, measurement.max_batch_tokens, auto_fit=measurement.auto_fit
        )
        model, tokenizer = loaded.model, loaded.tokenizer
        measurement = replace(measurement, max_batch_tokens=loaded.max_batch_tokens)
        measured = MeasuredModel(measurement, model, tokenizer, store)
        timed = range(min(measurement.speed_rows, len(rows)))
        log(f"{model_dir}: timing {len(timed)} rows")
        prompts = [measured.prompt(row, latency.NEW_TOKENS) for row in timed]
        seconds = latency.time_rows(model, tokenizer, prompts, measured.answer)
        facts = size_facts(model, model_dir, measurement.source.base) | {
            "peak_memory_bytes": run_record.peak_memory_bytes() | {"process": empty},  # one row at a time, so far
            "device": models.describe_device(),
            "threads": torch.get_num_threads(),
        }
        log(f"{model_dir}: answering {len(rows):,} rows")
        return {
            "model_dir": model_dir,
            "facts": facts,
            "seconds": seconds,
            "speed": latency.summary(seconds),
            "cut": measured.cut(),
            **measured.outcomes(),
        }
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device ran out of memory with {model_dir}; lower --max_batch_tokens or --max_len, or pass "
            "--load_in_4bit on"
        ) from error


class MeasuredModel:
    """A loaded model and the rows it is to answer; what it answers goes into `store`."""

    def __init__(
        self,
        measurement: Measurement,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        store: AnswerStore,
    ) -> None:
        self.measurement, self.model, self.tokenizer, self.store = measurement, model, tokenizer, store
        self.limit = min(measurement.max_len, context_of(model.config))
        self.classifier = None
        if measurement.kind == LABELS:
            from common.tasks.ranking.classifier import Classifier

            loaded = LoadedModel(model, tokenizer, measurement.max_batch_tokens)
            self.classifier = Classifier.on(loaded, measurement.source.model_dir, measurement.task)

    def prompt(self, row: int, new_tokens: int) -> list[int]:
        """Token ids of a row's prompt, cut so that `new_tokens` more fit; of TEXT the start of the text."""
        content, kind = self.measurement.rows[row], self.measurement.kind
        room = self.limit - new_tokens
        if kind == TEXT and room > 0:
            return self.tokenizer.encode(content["text"])[:room]
        text = self.measurement.task.prompt(content["text"]) if kind == LABELS else content.get("input", "")
        ids = tokenizers.encode_prompt(self.tokenizer, text)
        if len(ids) > room:
            ids = chats.shortened_ids(self.tokenizer, text, room)
        if ids is None:
            raise UserError(
                f"{self.limit} tokens leave no room for a prompt and {new_tokens} new ones; raise --max_len, or lower "
                "--max_new_tokens"
            )
        return ids

    def cut(self) -> int:
        """Prompts that lost text."""
        if self.measurement.kind not in (SQUAD, ROWS):
            return 0
        room = self.limit - self.measurement.max_new_tokens
        return sum(len(tokenizers.encode_prompt(self.tokenizer, row["input"])) > room for row in self.measurement.rows)

    @property
    def answer(self) -> Callable[[int], object] | None:
        """Answers one row, as the task is used; None for TEXT, which has no answer."""
        if self.measurement.kind == LABELS:
            return lambda row: self.classifier.raw_scores([self.measurement.rows[row]["text"]])
        return None if self.measurement.kind == TEXT else lambda row: list(self.generate([row]))

    def generate(self, rows: Sequence[int]) -> Iterator[tuple[int, str]]:
        """(index in `rows`, the greedy answer to that row) of each, as it ends."""
        from common.generation import generate as generation
        from common.generation.decoding import Decoding

        for index, _, answer in generation.generate_each(
            self.model,
            self.tokenizer,
            [self.prompt(row, self.measurement.max_new_tokens) for row in rows],
            Decoding(self.measurement.max_new_tokens),
            max_batch_tokens=self.measurement.max_batch_tokens,
        ):
            yield index, answer.text.strip()

    def outcomes(self) -> dict[str, Any]:
        """What the model makes of all rows (see `measure`)."""
        kind = self.measurement.kind
        if kind == LABELS:
            return self._labels()
        answers = {} if kind == TEXT else {"answers": self._answers()}
        return answers if kind == SQUAD else answers | self._likelihoods()

    def _labels(self) -> dict[str, Any]:
        texts = [row["text"] for row in self.measurement.rows]
        scored = self.store.windows(
            texts, KEPT_LABELS, self.measurement.identity(), lambda batch: self.classifier.raw_scores(batch).tolist()
        )
        raw = np.array([row for window, _ in scored for row in window], dtype=np.float32)
        calibration = self.classifier.calibration(self.measurement.calibration, raw)
        calibrated = calibration.apply(raw)
        labels = [self.measurement.task.labels[label] for label in calibrated.predictions]
        return {"answers": labels, "calibration": calibration.method}

    def _answers(self) -> list[str]:
        from tqdm import tqdm

        rows, identity = self.measurement.rows, self.measurement.identity()
        keys = [content_key("answer", identity, row["input"]) for row in rows]
        missing = [row for row, key in enumerate(keys) if key not in self.store]
        with tqdm(total=len(rows), initial=len(rows) - len(missing), unit=" rows") as progress:
            for index, answer in self.generate(missing):
                self.store.add([(keys[missing[index]], answer)])
                progress.update()
        return [self.store[key] for key in keys]

    def _likelihoods(self) -> dict[str, Any]:
        """ "nll" in nats, "tokens" and "bytes" of each row's output or text."""
        from tqdm import tqdm

        likelihoods: dict[str, list] = {"nll": [], "tokens": [], "bytes": []}
        rows, identity = list(self.measurement.rows), self.measurement.identity()
        with tqdm(total=len(rows), unit=" rows") as progress:
            for window, _ in self.store.windows(rows, KEPT, ["likelihoods", identity], self._likelihoods_of):
                for name, values in window.items():
                    likelihoods[name] += values
                progress.update(len(likelihoods["nll"]) - progress.n)
        return likelihoods

    def _likelihoods_of(self, batch: Sequence[dict]) -> dict[str, list]:
        """The same of some rows."""
        from common.comparison import perplexity
        from common.training import batches

        if self.measurement.kind == TEXT:
            rows = [tokenizers.windows(self.tokenizer, row["text"], self.limit) for row in batch]
        else:
            pairs = [(row["input"], row["output"]) for row in batch]
            encoded = batches.encode_rows(
                self.tokenizer, self.measurement.source.model_dir, pairs, self.limit, whole=False
            )
            if None in encoded:
                raise UserError(f"an output does not fit --max_len {self.limit}; raise it")
            rows = [[row] for row in encoded]
        flat = [window for windows in rows for window in windows]
        pad_id, budget = self.tokenizer.pad_token_id, self.measurement.max_batch_tokens
        sums = iter(perplexity.negative_log_likelihood(self.model, flat, pad_id, budget))
        completions = [[window.input_ids[window.prompt_length :] for window in windows] for windows in rows]
        return {
            "nll": [sum(float(next(sums)) for _ in windows) for windows in rows],
            "tokens": [sum(map(len, row)) for row in completions],
            "bytes": [
                sum(len(self.tokenizer.decode(ids, skip_special_tokens=True).encode()) for ids in row)
                for row in completions
            ],
        }


def size_facts(model: PreTrainedModel, model_dir: str, base: str | None) -> dict[str, Any]:
    """How large a model is.

    Returns:
        "parameters", of which "adapter_parameters"; "disk_bytes": {"adapter", "base"} of the weight files, base None
        where they cannot be found; "loaded_bytes": of the weights as loaded; "precision".
    """
    adapter = adapters.is_adapter(model_dir)
    own = model.get_base_model() if adapter else model  # the adapter's matrices are modules of it
    base = (base or adapters.base_of(model_dir)) if adapter else model_dir
    four_bit = getattr(own, "is_loaded_in_4bit", False)
    weights = Path(model_dir) / adapters.ADAPTER_WEIGHTS
    return {
        "parameters": own.num_parameters(),
        "adapter_parameters": sum(p.numel() for name, p in own.named_parameters() if ".lora_" in name),
        "disk_bytes": {"adapter": weights.stat().st_size if adapter else 0, "base": _weight_bytes(base)},
        "loaded_bytes": own.get_memory_footprint(),
        "precision": "nf4" if four_bit else str(own.dtype).removeprefix("torch."),
    }


def _weight_bytes(name_or_path: str) -> int | None:
    """Bytes of a model's safetensors, in its folder or in the Hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    folder = Path(name_or_path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name_or_path, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            return None
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors")) or None
