"""One model of a comparison, judged in a process of its own: what it answers, what it costs, how fast it is.

A process of its own, because only one model at a time fits a small card, because the peak memory of a process cannot be
reset, and because transformers changes torch's process-wide defaults while it loads.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import run_record
from common.cli import UserError, log
from common.models import adapters, tokenizers
from common.models import loading as models
from common.models.batching import context_of
from common.models.source import LoadedModel, ModelSource
from common.tasks.ranking.task import LabelTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LABELS, SQUAD, ROWS, TEXT = "labels", "squad", "rows", "text"  # kinds of data
WINDOW = 64  # rows at a time between two steps of the progress bar


@dataclass(frozen=True)
class Job:
    """What is asked of a model.

    Attributes:
        model_dir: run folder, model folder or Hub id; base: of an adapter that was moved.
        kind: LABELS (rows have "text"), SQUAD, ROWS ("input" and "output") or TEXT ("text").
        speed_rows: how many rows, from the first, are timed.
        max_len: tokens of a prompt and its answer, or of a window of text.
        task, calibration: of LABELS.
    """

    model_dir: str
    base: str | None
    kind: str
    rows: Sequence[dict]
    speed_rows: int
    max_len: int
    max_new_tokens: int
    max_batch_tokens: int
    load_in_4bit: str
    dtype: str
    trust_remote_code: bool
    task: LabelTask | None = None
    calibration: str | None = None


def judge(job: Job) -> dict[str, Any]:
    """Judge a model in a new process, see `_judge`.

    Raises:
        UserError: what the model's loading raises, or the process was killed (out of memory).
    """
    context = multiprocessing.get_context("forkserver")  # a fresh process, without importing all this once a model
    context.set_forkserver_preload(["common.models.loading", "torch", "peft", "transformers.models.auto.modeling_auto"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_judge, job).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"the process that judged {job.model_dir} was killed, probably for want of memory; lower "
                "--max_batch_tokens or --max_len, or pass --load_in_4bit on"
            ) from error


def _judge(job: Job) -> dict[str, Any]:
    """Load, time, and answer all rows.

    Returns:
        "model_dir"; "facts": parameters, bytes on disk and in memory, peak memory, device (see `size_facts`);
        "seconds" and "speed": see `speed.measure` and `speed.summary`; "cut": prompts that were shortened; and of every
        row: "answers" (texts; of LABELS the labels), "nll", "tokens" and "bytes" of the output (ROWS) or of the text
        (TEXT). Of LABELS also "calibration", its method.
    """
    import peft  # noqa: F401 (what imports take belongs to the process, not to the model)
    import torch
    import transformers  # noqa: F401

    from common.comparison import latency as speed

    empty = run_record.peak_memory_bytes()["resident"]
    try:
        model, tokenizer = models.load_for_inference(
            ModelSource(
                job.model_dir,
                base=job.base,
                load_in_4bit=job.load_in_4bit,
                dtype=job.dtype,
                trust_remote_code=job.trust_remote_code,
            )
        )
        contestant = Contestant(job, model, tokenizer)
        timed = range(min(job.speed_rows, len(job.rows)))
        log(f"{job.model_dir}: timing {len(timed)} rows")
        prompts = [contestant.prompt(row, speed.NEW_TOKENS) for row in timed]
        seconds = speed.measure(model, tokenizer, prompts, contestant.answer)
        facts = size_facts(model, job.model_dir, job.base) | {
            "peak_memory_bytes": run_record.peak_memory_bytes() | {"process": empty},  # one row at a time, so far
            "device": models.describe_device(),
            "threads": torch.get_num_threads(),
        }
        log(f"{job.model_dir}: answering {len(job.rows):,} rows")
        found = {"model_dir": job.model_dir, "facts": facts, "seconds": seconds, "speed": speed.summary(seconds)}
        return found | {"cut": contestant.cut()} | contestant.outcomes()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device ran out of memory with {job.model_dir}; lower --max_batch_tokens or --max_len, or pass "
            "--load_in_4bit on"
        ) from error


class Contestant:
    """A loaded model and the rows it is to answer."""

    def __init__(self, job: Job, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.job, self.model, self.tokenizer = job, model, tokenizer
        self.limit = min(job.max_len, context_of(model.config))
        self.classifier = None
        if job.kind == LABELS:
            from common.tasks.ranking.classifier import Classifier

            self.classifier = Classifier.on(
                LoadedModel(model, tokenizer, job.max_batch_tokens), job.model_dir, job.task
            )

    def prompt(self, row: int, new_tokens: int) -> list[int]:
        """Token ids of a row's prompt, cut so that `new_tokens` more fit; of TEXT the start of the text."""
        content, job = self.job.rows[row], self.job
        room = self.limit - new_tokens
        if job.kind == TEXT and room > 0:
            return self.tokenizer.encode(content["text"])[:room]
        text = job.task.prompt(content["text"]) if job.kind == LABELS else content.get("input", "")
        ids = tokenizers.encode_prompt(self.tokenizer, text)
        if len(ids) > room:
            ids = tokenizers.truncate_prompt(self.tokenizer, text, new_tokens, self.limit)
        if ids is None:
            raise UserError(
                f"{self.limit} tokens leave no room for a prompt and {new_tokens} new ones; raise --max_len, or lower "
                "--max_new_tokens"
            )
        return ids

    def cut(self) -> int:
        """Prompts that lost text."""
        if self.job.kind not in (SQUAD, ROWS):
            return 0
        room = self.limit - self.job.max_new_tokens
        return sum(len(tokenizers.encode_prompt(self.tokenizer, row["input"])) > room for row in self.job.rows)

    @property
    def answer(self) -> Callable[[int], object] | None:
        """Answers one row, as the task is used; None for TEXT, which has no answer."""
        if self.job.kind == LABELS:
            return lambda row: self.classifier.raw_scores([self.job.rows[row]["text"]])
        return None if self.job.kind == TEXT else lambda row: self.generate([row])

    def generate(self, rows: Sequence[int]) -> list[str]:
        """Greedy answers to some rows."""
        from common.generation import generate as generation
        from common.generation.decoding import Decoding

        answers = generation.generate(
            self.model,
            self.tokenizer,
            [self.prompt(row, self.job.max_new_tokens) for row in rows],
            Decoding(self.job.max_new_tokens),
            max_batch_tokens=self.job.max_batch_tokens,
        )
        return [samples[0].text.strip() for samples in answers]

    def outcomes(self) -> dict[str, Any]:
        """What the model makes of all rows (see `_judge`)."""
        if self.job.kind == LABELS:
            return self._labels()
        found = {} if self.job.kind == TEXT else {"answers": self._answers()}
        return found if self.job.kind == SQUAD else found | self._surprise()

    def _labels(self) -> dict[str, Any]:
        raw = self.classifier.raw_scores([row["text"] for row in self.job.rows])
        calibration = self.classifier.calibration(self.job.calibration, raw)
        calibrated = calibration.apply(raw)
        labels = [self.job.task.labels[label] for label in calibrated.predictions]
        return {"answers": labels, "calibration": calibration.method}

    def _answers(self) -> list[str]:
        from tqdm import tqdm

        answers: list[str] = []
        with tqdm(total=len(self.job.rows), unit=" rows") as progress:
            for start in range(0, len(self.job.rows), WINDOW):
                answers += self.generate(range(start, min(start + WINDOW, len(self.job.rows))))
                progress.update(len(answers) - progress.n)
        return answers

    def _surprise(self) -> dict[str, Any]:
        """ "nll" in nats, "tokens" and "bytes" of each row's output or text."""
        from common.comparison import perplexity
        from common.training import batches as completions

        if self.job.kind == TEXT:
            rows = [tokenizers.windows(self.tokenizer, row["text"], self.limit) for row in self.job.rows]
        else:
            pairs = [(row["input"], row["output"]) for row in self.job.rows]
            encoded = completions.encode_rows(self.tokenizer, self.job.model_dir, pairs, self.limit, whole=False)
            if None in encoded:
                raise UserError(f"an output does not fit --max_len {self.limit}; raise it")
            rows = [[row] for row in encoded]
        flat = [window for windows in rows for window in windows]
        pad_id, budget = self.tokenizer.pad_token_id, self.job.max_batch_tokens
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
