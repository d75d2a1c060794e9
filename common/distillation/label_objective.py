"""Distillation of label probabilities: the label ranker's scores, trained towards a teacher's distribution over labels.

The teacher can be any model with any tokenizer, or a person: three numbers a row are all that is needed of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from common.cli import UserError, log
from common.distillation.objective import Objective
from common.distillation.rows import PROBABILITIES
from common.models import tokenizers
from common.tasks.ranking import torch_ranker as label_ranking
from common.tasks.ranking.task import LabelTask
from common.training.batches import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LEAST = 1e-6  # of a teacher's probability; a 0 would make the reverse KL infinite


@dataclass(frozen=True)
class LabelRow:
    """A prompt's token ids, the teacher's probability of each label or None, the gold label's index or None."""

    prompt: list[int]
    probabilities: list[float] | None
    gold: int | None


class LabelDistillation:
    """Rows to batches, and the loss of a batch, for one task and tokenizer.

    A batch is that of the label ranker: a prompt's tokens, then all labels' tokens as a prefix tree in columns of
    their own, so one forward pass gives the scores of all labels and the likelihood of each as an answer.
    """

    def __init__(self, objective: Objective, tokenizer: PreTrainedTokenizerBase, task: LabelTask) -> None:
        self.objective, self.tokenizer, self.task = objective, tokenizer, task
        answers = [[[tokenizers.encode_completion(tokenizer, label)]] for label in task.labels]
        self.tree = label_ranking.LabelTree(label_ranking.label_tokens(tokenizer, task) + answers)

    def encode(self, path: str, rows: Sequence[dict], max_len: int) -> list[LabelRow]:
        """Rows as `distill_rows.read_labelled` gives them; those that do not fit `max_len` are left out, and counted.

        Raises:
            UserError: no row fits.
        """
        labels, room = self.task.labels, max_len - max(self.tree.depths) - 1
        encoded = [
            LabelRow(
                tokenizers.encode_prompt(self.tokenizer, row["input"]),
                [row[PROBABILITIES][label] for label in labels] if row.get(PROBABILITIES) else None,
                labels.index(row["output"]) if row.get("output") else None,
            )
            for row in rows
        ]
        kept = [row for row in encoded if len(row.prompt) <= room]
        if len(kept) < len(encoded):
            log(f"{path}: {len(encoded) - len(kept)} of {len(encoded)} rows left out, longer than --max_len {max_len}")
        if not kept:
            raise UserError(f"{path}: no row fits --max_len {max_len}; raise it")
        return kept

    def collate(self, batch: Sequence[LabelRow]) -> dict[str, torch.Tensor]:
        """`input_ids`, `position_ids` [rows, tokens], `attention_mask` [rows, 1, tokens, tokens], the teacher's
        `probabilities` [rows, labels] (0 where it says nothing), `gold` [rows] (IGNORE where it is unknown), and
        `labels` [rows, 2], which count a row as one item."""
        ids, positions, real = label_ranking.tree_columns(
            self.tree, [row.prompt for row in batch], self.tokenizer.pad_token_id
        )
        sees = label_ranking.tree_mask(self.tree, real)
        sees |= torch.eye(sees.shape[-1], dtype=torch.bool)  # padding sees itself: softmax over nothing is NaN
        nothing = [0.0] * len(self.task.labels)
        return {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": sees,
            PROBABILITIES: torch.tensor([row.probabilities or nothing for row in batch]),
            "gold": torch.tensor([IGNORE if row.gold is None else row.gold for row in batch]),
            "labels": torch.tensor([[IGNORE, 0]] * len(batch)),
        }

    def __call__(
        self, model: Any, batch: dict[str, torch.Tensor], num_items: torch.Tensor | int | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(scalar loss, its terms), means over the step's rows; see `common.training.trainer.Loss`.

        Divergences are between the teacher's probabilities and the softmax of the student's raw scores; ce and
        teacher_ce are nats a token of the gold, or the teacher's likeliest, label as an answer with its end.
        """
        logits = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            logits_to_keep=self.tree.columns + 1,
        ).logits.float()
        scores = label_ranking.label_scores(self.tree, logits, self.task.aggregate)
        count = len(self.task.labels)
        scores, answers = scores[:, :count], scores[:, count:]
        taught = batch[PROBABILITIES].sum(dim=1) > 0
        temperature = self.objective.temperature
        teacher = (batch[PROBABILITIES][taught].clamp(min=LEAST).log() / temperature).log_softmax(dim=-1)
        terms = self.objective.divergences((scores[taught] / temperature).log_softmax(dim=-1), teacher)
        if "ce" in self.objective.weights:
            known = batch["gold"] != IGNORE
            terms["ce"] = -answers[known].gather(1, batch["gold"][known][:, None])
        if "teacher_ce" in self.objective.weights:
            terms["teacher_ce"] = -answers[taught].gather(1, teacher.argmax(dim=1)[:, None])
        items = len(logits) if num_items is None else num_items
        terms = {name: value.sum() / items for name, value in terms.items()}
        return self.objective.total(terms), terms
