"""The label ranker on a runtime that reads row by row: a GGUF in llama.cpp, or a folder in onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.models.genai_model import GenaiModel
from common.models.gguf_model import GgufModel
from common.tasks.ranking.label_tree import label_scores
from common.tasks.ranking.ranker import Ranker, Share
from common.tasks.ranking.task import LabelTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RowRanker(Ranker):
    """Scores rows against a task's labels, row by row (see `Ranker`)."""

    def __init__(self, model: GgufModel | GenaiModel, tokenizer: PreTrainedTokenizerBase, task: LabelTask) -> None:
        super().__init__(tokenizer, task, model.context, model.vocabulary)
        self.model, self.name, self.precision = model, model.name, (model.dtype, False)

    def _start_of(self, prompt: list[int]) -> tuple[int, ...]:
        """None: llama.cpp's scores differ in their fourth digit by what a row is read behind, and a row by itself is to
        have the same ones in a script and in the server."""
        return ()

    def _score(self, prefix: tuple[int, ...], suffixes: Sequence[list[int]], owners: Sequence[Share]) -> np.ndarray:
        rows = []
        if prefix:
            self.model.after(0, prefix, 1)
        for suffix in suffixes:
            end = len(prefix) + len(suffix)
            columns = [self.model.after(len(prefix), suffix, 1)]
            columns += [None] * self.tree.columns
            for branch in self.tree.branches():
                logits = self.model.after(end, [self.tree.tokens[node] for node in branch])
                for node, row in zip(branch, logits, strict=True):
                    columns[node] = row[None]
            rows.append(np.concatenate(columns))
        return label_scores(self.tree, np.stack(rows), self.task.aggregate)
