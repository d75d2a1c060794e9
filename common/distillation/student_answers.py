"""What an on-policy round is trained on: answers that the student has written, and the data's own beside them."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import UserError, log
from common.data import resumable
from common.distillation.settings import DistillSettings
from common.models import adapters, chats, loading
from common.models.source import ModelSource
from common.models.tokenizers import Encoded
from common.training.batches import encode_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "answers.jsonl"


@dataclass(frozen=True)
class StudentAnswer:
    """One that the student has written.

    Attributes:
        row: of the data, whose prompt it answers.
        tokens: token ids, without the one that ended it.
        logprob: of the tokens together, by the student, in nats.
        finished: it came to its end within the budget.
        text: for a reader.
    """

    row: int
    tokens: list[int]
    logprob: float
    finished: bool
    text: str


@dataclass(frozen=True)
class Prompts:
    """The data's prompts as token ids, and its own completions where they are wanted.

    Attributes:
        prompts: token ids by row, with room for an answer behind them; None for a row that is left out.
        rows: prompt and the data's completion by row; empty where the student answers all of them.
    """

    prompts: Sequence[list[int] | None]
    rows: Sequence[Encoded | None]

    @classmethod
    def of(cls, settings: DistillSettings, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict]) -> Prompts:
        """Those of data rows within `max_len`. A prompt that is too long loses text, or is left out (`idp_mode`).

        Raises:
            UserError: no prompt fits.
        """
        prompts: list[list[int] | None] = []
        room, counts = settings.max_len - settings.max_new_tokens, {"cut": 0, "left out": 0}
        for row in rows if settings.lmbda > 0 else []:
            ids: list[int] | None = chats.encode_prompt(tokenizer, row["input"])
            if len(ids) > room:
                ids = None if settings.idp_mode else chats.shortened_ids(tokenizer, row["input"], room)
                counts["cut" if ids else "left out"] += 1
            prompts.append(ids)
        if said := ", ".join(f"{count} of {len(rows)} prompts {done}" for done, count in counts.items() if count):
            log(
                f"{settings.data_name}: {said}, to leave room for --max_new_tokens {settings.max_new_tokens} within "
                f"--max_len {settings.max_len}"
            )
        if prompts and not any(prompts):
            raise UserError(f"{settings.data_name}: no prompt fits; raise --max_len or lower --max_new_tokens")
        pairs = [(row["input"], row["output"]) for row in rows] if settings.needs_completions else []
        fits = (settings.max_len, settings.idp_mode)
        return cls(prompts, encode_rows(tokenizer, settings.data_name, pairs, *fits) if pairs else [])

    def longest(self, max_new_tokens: int) -> tuple[int, int]:
        """Tokens of the longest row that there can be, with an answer of so many tokens, and of its completion."""
        asked = [(len(prompt) + max_new_tokens, max_new_tokens) for prompt in self.prompts if prompt]
        own = [(len(row.input_ids), len(row.input_ids) - row.prompt_length) for row in self.rows if row]
        return max(length for length, _ in asked + own), max(completion for _, completion in asked + own)


@dataclass(frozen=True)
class Round:
    """Which rows of the data a round takes.

    Attributes:
        number: from 1.
        rows: their numbers, in the order of the data.
        asked: those whose prompts the student answers; the others keep the data's completions.
    """

    number: int
    rows: Sequence[int]
    asked: frozenset[int]

    @classmethod
    def of(cls, settings: DistillSettings, number: int, rows: int) -> Round:
        """A round of `rows` data rows. The rounds walk through the shuffled data, again and again where it ends."""
        size = min(settings.prompts_per_round or -(-rows // settings.rounds), rows)
        start = (number - 1) * size
        orders: dict[int, list[int]] = {}

        def drawn(position: int) -> int:
            lap, index = divmod(position, rows)
            if lap not in orders:
                orders[lap] = random.Random(f"{settings.seed} {lap}").sample(range(rows), rows)
            return orders[lap][index]

        taken = sorted({drawn(position) for position in range(start, start + size)})
        count = round(settings.lmbda * len(taken))
        asked = random.Random(f"{settings.seed} round {number}").sample(taken, count)
        return cls(number, taken, frozenset(asked))


def written_answers(
    settings: DistillSettings,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    part: Round,
    student: str,
    folder: Path,
) -> list[StudentAnswer]:
    """The answers of a round. The student is loaded only if some are missing, and is gone afterwards.

    Args:
        student: the folder, or the name, of the model as the rounds before have left it.
        folder: of the round; the answers are kept in it as they come.
    """
    asked = [row for row in sorted(part.asked) if prompts.prompts[row] is not None]
    path = folder / FILE
    if path.is_file() or not asked:
        return list(kept_answers(path))
    log(f"round {part.number} of {settings.rounds}: the student answers {len(asked):,} prompts")
    source = source_of(settings, student)
    write(settings, source, [(row, prompts.prompts[row]) for row in asked], part.number, path)
    release()
    return list(kept_answers(path))


def source_of(settings: DistillSettings, student: str) -> ModelSource:
    """The student as it is loaded to write: a model, or an adapter on the run's base."""
    return ModelSource(
        student,
        base=settings.student if adapters.is_adapter(student) else None,
        load_in_4bit="off" if settings.full else settings.load_in_4bit,
        trust_remote_code=settings.trust_remote_code,
    )


def write(
    settings: DistillSettings, source: ModelSource, asked: Sequence[tuple[int, list[int]]], number: int, path: Path
) -> None:
    """Load the student and write its answers to `asked`, (row, prompt), into a file."""
    from common.generation.decoding import Decoding
    from common.generation.generate import generate_each

    decoding = Decoding(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.sample_temperature,
        num_samples=settings.num_samples,
        seed=settings.seed + number,
    )
    model, tokenizer = loading.load_for_inference(source)

    def answer(batch: list[tuple[int, list[int]]]) -> Iterator[tuple[int, dict]]:
        samples: list[dict[int, dict]] = [{} for _ in batch]
        for number, sample, written in generate_each(
            model,
            tokenizer,
            [ids for _, ids in batch],
            decoding,
            whole=True,
            logprobs=True,
            max_batch_tokens=settings.max_batch_tokens,
        ):
            kept = {"text": written.text, "tokens": written.tokens}
            samples[number][sample] = kept | {"logprob": sum(written.logprobs), "finished": written.finished}
            if len(samples[number]) == decoding.num_samples:
                in_order = [samples[number][index] for index in range(decoding.num_samples)]
                yield number, {"row": batch[number][0], "samples": in_order}

    decided_by = [adapters.adapter_hash(source.model_dir), decoding.as_dict(), asked]
    resumable.write_each(str(path), asked, answer, decided_by=decided_by, what="prompts of the student")


def kept_answers(path: Path) -> Iterator[StudentAnswer]:
    """The answers in a file; none where there is no file."""
    from common.data.rows import iter_jsonl

    for _, line in iter_jsonl(path) if path.is_file() else ():
        for sample in line["samples"]:
            yield StudentAnswer(line["row"], **sample)


def training_rows(
    part: Round, prompts: Prompts, answers: Sequence[StudentAnswer], end: int
) -> tuple[list[tuple[int, Encoded]], list[Encoded]]:
    """(all rows of a round, numbered and in the order of the data, those of the answers in the order of `answers`).

    An answer that says nothing and does not end teaches nothing, and is left out.

    Args:
        end: the token that ends an answer.
    """
    of_answers = []
    for answer in answers:
        prompt = prompts.prompts[answer.row]
        assert prompt is not None  # it was answered
        of_answers.append(Encoded([*prompt, *answer.tokens, *[end] * answer.finished], len(prompt)))
    by_row: dict[int, list[Encoded]] = {}
    for answer, encoded in zip(answers, of_answers, strict=True):
        if len(encoded.input_ids) > encoded.prompt_length:
            by_row.setdefault(answer.row, []).append(encoded)
    rows: list[tuple[int, Encoded]] = []
    for number in part.rows:
        if number in part.asked:
            rows += [(number, row) for row in by_row.get(number, [])]
        elif own := prompts.rows[number]:
            rows.append((number, own))
    return rows, of_answers


def unlearnt_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens but the one that ends an answer: a student that writes one has to learn nothing from it."""
    special: dict[int, Any] = tokenizer.added_tokens_decoder
    return sorted(token for token, about in special.items() if about.special and token != tokenizer.eos_token_id)


def release() -> None:
    """Give back what a phase has held."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
