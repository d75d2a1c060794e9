"""Pass 1 of a distillation from a cache, and how pass 2 reads it: the teacher's distributions, written and batched."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from tqdm import tqdm

from common.cli import UserError, log
from common.distillation import objective, teacher_cache
from common.distillation.objective import Signals
from common.distillation.settings import DistillSettings
from common.distillation.teacher_cache import TeacherCache, completion_tokens, pack, row_key, unpack
from common.models import adapters, loading
from common.models.batching import CHUNK_LOGITS, by_token_budget
from common.models.tokenizers import Encoded
from common.training import batches, losses, prefix_tree, run
from common.training.hidden_states import HiddenStateReader, predicted, scored
from common.vram import preflight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.distillation.translation import Translation
    from common.run_record import RunRecord
    from common.vram.formulas import Inference

SHARD_TOKENS, SHARD_BYTES, SHARD_SECONDS = 1 << 16, 1 << 28, 60  # of what is lost at most when a pass is killed
NF4 = "NF4"


@dataclass(frozen=True)
class Targets:
    """What a cache keeps of each distribution.

    Attributes:
        drawn: outcomes are drawn from the distribution; else the most likely ones are kept, with their
            log-probabilities.
        own: the token that the row goes on with is one of them, in the place of the least likely.
        k: outcomes; 0 where distributions are not learnt from.
        temperature: of the distributions.
        vocabulary: ids that both models have.
        layers: of the teacher, whose hidden states are kept.
    """

    drawn: bool
    own: bool
    k: int
    temperature: float
    vocabulary: int
    layers: Sequence[int]

    @classmethod
    def of(cls, settings: DistillSettings, signals: Signals) -> Targets:
        """Those that the settings ask for."""
        drawn = settings.cache_targets == "sampled" and signals.distributions
        k = settings.cache_k if drawn else min(settings.cache_k, signals.vocabulary)
        layers = [theirs for _, theirs in signals.pairs] if signals.hidden else []
        kept = k if signals.distributions else 0
        return cls(drawn, settings.keeps_own, kept, settings.temperature, signals.vocabulary, layers)

    def outcomes(self, logits: torch.Tensor, tokens: torch.Tensor, chances: torch.Tensor) -> dict[str, torch.Tensor]:
        """`teacher_cache.pack`'s arguments of logits [n, vocabulary].

        Args:
            tokens: those that the rows go on with [n].
            chances: numbers from 0 to 1 that decide what is drawn [n, k].
        """
        logprobs = losses.log_probs(logits[:, : self.vocabulary], self.temperature)
        if self.drawn:
            up_to = logprobs.exp().cumsum(dim=-1)
            draws = torch.searchsorted(up_to, chances * up_to[:, -1:], right=True).clamp(max=self.vocabulary - 1)
            return {"ids": draws, "rest": -(logprobs.exp() * logprobs).sum(dim=-1)}
        top, ids = logprobs.topk(self.k)
        if self.own:  # where it is not among them, and the teacher has it at all
            ids = losses.with_own(ids, torch.where(tokens < self.vocabulary, tokens, ids[:, 0]))
            top = logprobs.gather(1, ids)
        return {"ids": ids, "rest": (1 - top.exp().sum(dim=-1)).clamp(min=0), "logprobs": top}


def collate(
    batch: Sequence[Encoded],
    pad_id: int,
    cache: TeacherCache | None = None,
    *,
    as_tree: bool = False,
    unlearnt: Sequence[int] = (),
) -> dict[str, Any]:
    """`batches.collate`, or `as_tree` that of `prefix_tree`, and under "teacher" what the cache holds of the rows'
    completion tokens, in their order.

    Rows that it does not hold (those that a run is judged by) get none.

    Args:
        unlearnt: tokens from which nothing is learnt where a completion holds them.
    """
    tensors: dict[str, Any] = (prefix_tree if as_tree else batches).collate(batch, pad_id)
    learnt = slice(None)
    if unlearnt:
        tokens = tensors["labels"][:, 1:][predicted(tensors)]
        learnt = ~torch.isin(tokens, torch.tensor(unlearnt))
        tensors["labels"][torch.isin(tensors["labels"], torch.tensor(unlearnt))] = batches.IGNORE
        if tree := tensors.get(prefix_tree.NAME):
            tensors[prefix_tree.NAME] = replace(tree, sources=list(compress(tree.sources, learnt.tolist())))
        learnt = learnt.numpy()
    packed = [cache.get(row) for row in batch] if cache else [None]
    if all(records is not None for records in packed):
        known = unpack(np.concatenate(packed)[learnt])
        tensors["teacher"] = {name: torch.from_numpy(array) for name, array in known.items()}
    return tensors


def written_cache(
    settings: DistillSettings,
    record: RunRecord | None,
    signals: Signals,
    teacher_width: int,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    translation: Translation | None = None,
) -> TeacherCache:
    """The cache with all of `rows` in it. The teacher is loaded only if some are missing, and is gone afterwards.

    Each of several processes writes its share.

    Args:
        teacher_width: of the teacher's hidden states.
        translation: from the teacher's vocabulary, where that is another.

    Raises:
        UserError: the teacher does not fit the memory, or the vocabulary not the cache.
    """
    from accelerate import PartialState

    targets = Targets.of(settings, signals)
    settings = as_it_was_written(settings, record)
    cache = open_cache(settings, targets, teacher_width, translation)
    state = PartialState(cpu=not torch.cuda.is_available())
    missing = cache.missing(rows)
    state.wait_for_everyone()  # before any writes, so that all divide the same rows
    if missing:
        log(f"{len(missing):,} of {len(rows):,} rows are not in {cache.folder}; the teacher reads them first")
        fitted = teacher_within_memory(settings, record)
        if fitted.load_teacher_in_4bit != settings.load_teacher_in_4bit:  # then it is another cache
            return written_cache(fitted, record, signals, teacher_width, tokenizer, rows, translation)
        share = missing[state.process_index :: state.num_processes]
        batch_tokens = fitted.max_batch_tokens
        try:
            reader = objective.load_teacher(fitted, signals)
            fill_cache(
                cache,
                reader,
                share,
                targets,
                tokenizer.pad_token_id,
                translation,
                max_batch_tokens=batch_tokens,
                seed=fitted.seed,
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the device ran out of memory while the teacher read; lower --max_batch_tokens {batch_tokens}"
            ) from error
        del reader
        gc.collect()
        torch.cuda.empty_cache()
    state.wait_for_everyone()
    cache.refresh()
    if cache.missing(rows):
        raise UserError(f"{cache.folder} lacks rows that other processes wrote; give a folder that all share")
    return cache


def as_it_was_written(settings: DistillSettings, record: RunRecord | None) -> DistillSettings:
    """The settings, or with --auto_fit, where 4 bits once were what fitted and filled the cache, those of then."""
    written = teacher_cache.written_facts(settings.teacher_cache).get("precision")
    if not settings.auto_fit or written != NF4 or loading.use_4bit(settings.load_teacher_in_4bit):
        return settings
    log(f"{settings.teacher_cache} was written by a teacher in 4 bits: --load_teacher_in_4bit on")
    changes = {"load_teacher_in_4bit": "on"}
    run.note_fit(record, changes)
    return replace(settings, **changes)


def open_cache(
    settings: DistillSettings, targets: Targets, teacher_width: int, translation: Translation | None = None
) -> TeacherCache:
    """The cache in its folder, as yet without what is missing."""
    teacher_cache.check_vocabulary(targets.vocabulary)
    facts = {
        "teacher": adapters.adapter_hash(settings.teacher),
        "precision": NF4 if loading.use_4bit(settings.load_teacher_in_4bit) else "16 or 32 bits",
        "vocabulary": targets.vocabulary,
        "targets": "topk with the row's own" if targets.own else settings.cache_targets,
        "k": targets.k,
        "temperature": targets.temperature if targets.k else None,
        "layers": list(targets.layers),
        "student's vocabulary": translation.fingerprint if translation else None,
    }
    hidden = (len(targets.layers), teacher_width)
    record_type = teacher_cache.record_type(targets.k, logprobs=not targets.drawn, hidden=hidden)
    return TeacherCache(settings.teacher_cache, facts, record_type)


def teacher_plan(settings: DistillSettings) -> Inference:
    """What the teacher's pass means for memory. Raises UnknownShape where that cannot be told."""
    plan = preflight.inference_plan(settings.teacher_source, max_batch_tokens=settings.max_batch_tokens)
    return replace(plan, generates=False, logits=CHUNK_LOGITS)


def teacher_within_memory(settings: DistillSettings, record: RunRecord | None) -> DistillSettings:
    """The settings, or with --auto_fit milder ones, under which the teacher alone fits the memory.

    Raises:
        UserError: it does not fit; the message names what would.
    """
    plan = preflight.if_known(lambda: teacher_plan(settings))
    if plan is None:
        return settings
    log(f"the teacher {settings.teacher} reads first, alone:")
    flags = {
        "max_batch_tokens": preflight.INFERENCE["max_batch_tokens"],
        "OFFLOAD_FOLDER": preflight.INFERENCE["OFFLOAD_FOLDER"],
        "load_teacher_in_4bit": preflight.INFERENCE["load_in_4bit"],
    }
    changes = preflight.preflight(plan, flags, auto_fit=settings.auto_fit)
    run.note_fit(record, changes)
    return replace(settings, **{name: value for name, value in changes.items() if not name.isupper()})


@torch.no_grad()
def fill_cache(
    cache: TeacherCache,
    teacher: HiddenStateReader,
    rows: Sequence[Encoded],
    targets: Targets,
    pad_id: int,
    translation: Translation | None = None,
    *,
    max_batch_tokens: int,
    seed: int,
) -> None:
    """Write what the teacher says of `rows` into the cache.

    Args:
        translation: where the rows are in the tokens of another vocabulary than the teacher's.
        max_batch_tokens: in one forward pass.
        seed: of what is drawn.
    """
    device, as_tree = teacher.model.device, prefix_tree.install_where_it_pays(teacher.model)
    rows = rows[::-1]  # rows of one length in the order in which caches have always had them
    shard: list[tuple[Sequence[Encoded], np.ndarray]] = []
    begun = time.monotonic()

    def flush() -> None:
        nonlocal begun
        if shard:
            cache.add([row for rows, _ in shard for row in rows], np.concatenate([packed for _, packed in shard]))
        shard.clear()
        begun = time.monotonic()

    def is_full() -> bool:
        tokens, size = (sum(measured(packed) for _, packed in shard) for measured in (len, attrgetter("nbytes")))
        return tokens >= SHARD_TOKENS or size >= SHARD_BYTES or time.monotonic() - begun >= SHARD_SECONDS

    size = max(1, CHUNK_LOGITS // teacher.head.weight.shape[0])
    read = rows
    if translation is not None:
        read, pad_id = [translation.reading(row) for row in rows], 0  # the student's may be none of the teacher's
    with tqdm(total=len(rows), unit=" rows", desc="teacher") as progress, contextlib.ExitStack() as at_the_end:
        at_the_end.callback(flush)  # what was read before an exception, too
        for numbers in by_token_budget([len(row.input_ids) for row in read], max_batch_tokens):
            batch_rows = [rows[number] for number in numbers]
            batch = send_to_device(collate([read[number] for number in numbers], pad_id, as_tree=as_tree), device)
            states = teacher.read(teacher.model, batch)
            last, tokens = scored(states.last, batch), batch["labels"][:, 1:][predicted(batch)]
            if translation is None:
                chances = uniform(batch_rows, targets.k if targets.drawn else 0, seed).to(device)
                pieces = zip(last.split(size), tokens.split(size), chances.split(size), strict=True)
                parts = [targets.outcomes(teacher.logits(piece), *of_piece) for piece, *of_piece in pieces]
                values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            else:
                logits_of = lambda part, last=last: teacher.logits(last[part])  # noqa: E731 (of this batch)
                values = translation.outcomes(batch_rows, logits_of, targets.k, targets.own)
            if targets.layers:
                values["hidden"] = states.hidden_at(batch, targets.layers)
            arrays = {name: value.cpu().float().numpy() for name, value in values.items()}
            shard.append((batch_rows, pack(cache.record, **arrays)))
            if is_full():
                flush()
            progress.update(len(batch_rows))
    sizes = cache.sizes()
    log(
        f"teacher cache {cache.folder}: {sizes['rows']:,} rows, {sizes['tokens']:,} tokens, {sizes['bytes']:,} bytes, "
        f"{sizes['bytes_per_token']} a token"
    )


def uniform(rows: Sequence[Encoded], k: int, seed: int) -> torch.Tensor:
    """Numbers from 0 to 1, [completion tokens of the rows, k], by the seed and the content of each row alone: neither
    its batch nor where an interrupted pass went on changes what is drawn of it."""

    def of(row: Encoded) -> torch.Tensor:
        rng = torch.Generator().manual_seed(int(row_key(row)[:15], 16) + seed)
        return torch.rand(completion_tokens(row), k, generator=rng)

    return torch.cat([of(row) for row in rows])
