"""Rows as batches: prompt and completion as token ids, padding, rows in order of length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.cli import UserError, log
from common.models import chats, tokenizers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORE = -100


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    pairs: Sequence[tuple[chats.Prompt, str]],
    max_len: int,
    whole: bool,
) -> list[tokenizers.Encoded | None]:
    """Token ids of (prompt, completion) pairs within `max_len`.

    A row that is too long loses prompt text (see `chats.shortened`), never completion. With `whole` (structured
    output), and where the completion alone does not fit, the row becomes None and is listed: half a JSON teaches half a
    JSON.

    Raises:
        UserError: no row fits, or the chat template cannot write one.
    """
    encoded: list[tokenizers.Encoded | None] = []
    cut, left_out = 0, []
    for number, (prompt, completion) in enumerate(pairs, start=1):
        try:
            row, shortened = fit_row(tokenizer, prompt, completion, max_len, whole)
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}") from error
        cut += shortened
        if row is None:
            left_out.append(number)
        encoded.append(row)
    if cut:
        log(f"{path}: {cut} of {len(pairs)} prompts cut to fit --max_len {max_len}")
    if left_out:
        shown = ", ".join(map(str, left_out[:20])) + (", ..." if len(left_out) > 20 else "")
        log(f"{path}: {len(left_out)} of {len(pairs)} rows left out, longer than --max_len {max_len}: rows {shown}")
    if len(left_out) == len(pairs):
        raise UserError(f"{path}: no row fits --max_len {max_len}; raise it")
    return encoded


def fit_row(
    tokenizer: PreTrainedTokenizerBase, prompt: chats.Prompt, completion: str, max_len: int, whole: bool
) -> tuple[tokenizers.Encoded | None, bool]:
    """Token ids of a row within `max_len`, and whether its prompt was cut; None of one left out (see `encode_rows`)."""
    row = chats.encode(tokenizer, prompt, completion)
    if len(row.input_ids) <= max_len:
        return row, False

    def fits(prompt: chats.Prompt) -> bool:
        return len(chats.encode(tokenizer, prompt, completion).input_ids) <= max_len

    shorter = None if whole else chats.shortened(prompt, fits)
    return (chats.encode(tokenizer, shorter, completion), True) if shorter else (None, False)


def collate(batch: Sequence[tokenizers.Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `attention_mask`, `labels` [rows, longest]; labels are IGNORE where none is learnt."""
    import torch

    longest = max(len(row.input_ids) for row in batch)
    input_ids = torch.full((len(batch), longest), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE)
    for index, row in enumerate(batch):
        ids = torch.tensor(row.input_ids)
        input_ids[index, : len(ids)] = ids
        attention_mask[index, : len(ids)] = 1
        labels[index, row.learnt] = ids[row.learnt]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@dataclass
class LengthGroupedOrder:
    """Row order in which neighbours have similar lengths: a sampler with its own seed, so that resume is exact.

    Rows are shuffled, cut into pools of 64 steps, each pool sorted by length and its steps shuffled. The unit is the
    rows of one optimizer step, so the order does not depend on how a step is cut into processes and micro-batches.
    """

    lengths: Sequence[int]
    rows_per_step: int
    seed: int
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """The order of that epoch from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        import random

        rng = random.Random(self.seed * 1_000_003 + self.epoch)
        rows = rng.sample(range(len(self.lengths)), len(self.lengths))
        full = len(rows) - len(rows) % self.rows_per_step
        rows, rest = rows[:full], rows[full:]  # an incomplete step, where there is one, comes last
        pool = 64 * self.rows_per_step
        for start in range(0, len(rows), pool):
            ordered = sorted(rows[start : start + pool], key=lambda row: -self.lengths[row])
            steps = [ordered[i : i + self.rows_per_step] for i in range(0, len(ordered), self.rows_per_step)]
            rng.shuffle(steps)
            for step in steps:
                yield from step
        yield from rest
