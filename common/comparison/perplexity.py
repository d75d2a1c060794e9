"""How surprised a model is by a text: passages of running text, and the negative log-likelihood of batches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.cli import UserError
from common.data import splits
from common.files import read_text
from common.models.batching import by_token_budget
from common.models.tokenizers import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PASSAGE = 16_384  # characters; long, so that few windows are cut short at its end
TITLE = re.compile(r" ?= [^=].* = ?\n?")  # of an article in wikitext
LOGITS_AT_ONCE = 1 << 28  # of a batch: half a gigabyte in bfloat16


def passages(path: str) -> list[dict]:
    """A text file in pieces of whole lines, {"text", "group"}; blank pieces are left out.

    A piece ends before a wikitext title (` = Title = `) and at about `PASSAGE` characters. The group is the article
    where the text has titles, else the piece.

    Raises:
        UserError: there is no text in it.
    """
    lines = read_text(path).splitlines(keepends=True)
    articles = any(TITLE.fullmatch(line) for line in lines)
    rows: list[dict] = []
    article, piece, size = 0, [], 0

    def flush() -> None:
        if (text := "".join(piece)).strip():
            name = f"article {article}" if articles else f"passage {len(rows)}"
            rows.append({"text": text, "group": splits.group_hash(name)})
        piece.clear()

    for line in lines:
        title = TITLE.fullmatch(line) is not None
        if title or size + len(line) > PASSAGE:
            flush()
            size = 0
        article += title
        piece.append(line)
        size += len(line)
    flush()
    if not rows:
        raise UserError(f"{path} has no text; give a text file with text in it")
    return rows


def negative_log_likelihood(
    model: PreTrainedModel, rows: Sequence[Encoded], pad_id: int, max_batch_tokens: int
) -> np.ndarray:
    """Of each row's completion [rows], summed over its tokens, in nats. Arguments as of `completion_sums`."""
    return completion_sums(model, rows, pad_id, max_batch_tokens)[:, 0]


def completion_sums(model: PreTrainedModel, rows: Sequence[Encoded], pad_id: int, max_batch_tokens: int) -> np.ndarray:
    """Of each row's completion [rows, 3]: negative log-likelihood in nats, tokens, tokens that were the likeliest.

    Args:
        max_batch_tokens: bounds rows x longest of a batch; one row always goes.
    """
    import torch

    from common.training import batches

    budget = min(max_batch_tokens, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    sums = np.zeros((len(rows), 3))
    with torch.inference_mode():
        for batch_rows in by_token_budget([len(row.input_ids) for row in rows], budget):
            batch = batches.collate([rows[row] for row in batch_rows], pad_id)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            targets = batch["labels"][:, 1:]
            columns = (targets != batches.IGNORE).any(0).nonzero()[:, 0]
            logits = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
                logits_to_keep=columns,
            ).logits
            for index, row in enumerate(batch_rows):  # one at a time: float32 is twice as large
                scored, wanted = logits[index].float(), targets[index, columns]
                loss = torch.nn.functional.cross_entropy(scored, wanted, ignore_index=batches.IGNORE, reduction="sum")
                learnt = wanted != batches.IGNORE
                right = (scored.argmax(dim=-1) == wanted) & learnt
                sums[row] = float(loss), int(learnt.sum()), int(right.sum())
    return sums
