"""SFT and KD: rows with a prompt and a completion, and the cross-entropy of the completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common.data import training_files
from common.models import tokenizers
from common.models.tokenizers import Encoded
from common.training import run
from common.training.batches import IGNORE, collate, encode_rows
from common.training.progress import ACCURACY
from common.training.settings import TrainSettings
from common.training.trainer import TrainingRows, fitted_trainer, limit_length, prepare_student

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from common.training.hidden_states import HiddenStateReader


def train(settings: TrainSettings, trainer: str, argv: Sequence[str] | None, task_of: run.TaskOf | None = None) -> None:
    """A whole run: rows -> batches -> adapter in the run folder.

    Args:
        trainer: whose rows they are (`training_files.read`).
        argv: the command's words, for the record; None: those of this process.
        task_of: see `run.start`.
    """
    rows = training_files.read(settings.data, trainer, settings.skip_bad_rows)
    held_out = training_files.read(settings.eval_data, trainer, settings.skip_bad_rows) if settings.eval_data else []
    record = run.start(settings, rows, argv, task_of)
    with run.recorded_failure(record):
        tokenizer = tokenizers.load_tokenizer(settings.student, trust_remote_code=settings.trust_remote_code)

        def encode(settings: TrainSettings, path: str, rows: Sequence[dict]) -> list[Encoded]:
            pairs = [(row["input"], row["output"]) for row in rows]
            encoded = encode_rows(tokenizer, path, pairs, settings.max_len, whole=settings.idp_mode)
            return [row for row in encoded if row]

        settings, train_rows = run.fitting_rows(
            limit_length(settings), record, lambda settings: encode(settings, settings.data, rows)
        )
        student = prepare_student(settings, tokenizer)
        eval_rows = encode(settings, settings.eval_data, held_out) if held_out else []
        data = completion_rows(train_rows, tokenizer, student, eval_rows)
        run.train_and_save(fitted_trainer(settings, student, tokenizer, data), settings, record)


def completion_rows(
    rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, student: Any, eval_rows: Sequence[Encoded] = ()
) -> TrainingRows:
    """Encoded rows, trained on and judged by the mean cross-entropy of their completions' tokens."""
    from common.training import prefix_tree
    from common.training.hidden_states import HiddenStateReader

    pad_id = tokenizer.pad_token_id
    lengths = [len(row.input_ids) for row in rows]
    base = student.get_base_model() if hasattr(student, "peft_config") else student
    if not prefix_tree.understood_by(base):
        return TrainingRows(
            rows,
            lengths,
            collate=lambda batch: collate(batch, pad_id),
            loss=completion_loss,
            eval_rows=eval_rows,
        )
    return TrainingRows(
        rows,
        lengths,
        collate=lambda batch: prefix_tree.collate(batch, pad_id),
        loss=SharedCompletionLoss(HiddenStateReader(base)),
        eval_rows=eval_rows,
    )


def completion_loss(
    model: Any, batch: dict[str, Any], num_items: torch.Tensor | int | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`losses.completion_loss` with the share of tokens that are the likeliest; see `common.training.trainer.Loss`."""
    from common.training import losses

    loss, output = losses.completion_loss(model, batch, num_items)
    targets = losses.completion_columns(batch)[1]
    hits = (output.logits.detach().argmax(dim=-1) == targets).sum()
    return loss, {ACCURACY: hits / ((targets != IGNORE).sum().clamp(min=1) if num_items is None else num_items)}


class SharedCompletionLoss:
    """`completion_loss` of a batch, be it a prefix tree or not; quick on a student whose LM head is frozen."""

    def __init__(self, student: HiddenStateReader) -> None:
        self.reader = student

    def __call__(
        self, model: Any, batch: dict[str, Any], num_items: torch.Tensor | int | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `common.training.trainer.Loss`."""
        import torch

        from common.training.hidden_states import predicted, scored
        from common.training.losses import FrozenHeadCrossEntropy

        states = scored(self.reader.read(model, batch).last, batch)
        targets = batch["labels"][:, 1:][predicted(batch)]
        if self.reader.frozen_head:
            total, hits = FrozenHeadCrossEntropy.apply(states, self.reader.head.weight, targets)
        else:
            logits = self.reader.logits(states).float()
            total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            hits = (logits.detach().argmax(dim=-1) == targets).sum()
        items = max(1, len(targets)) if num_items is None else num_items
        return total / items, {ACCURACY: hits / items}
