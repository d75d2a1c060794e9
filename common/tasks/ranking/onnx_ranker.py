"""The label ranker on an ONNX export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.models.batching import MAX_BATCH_TOKENS, window_of
from common.models.greedy import left_padded
from common.models.onnx_runtime import OnnxModel
from common.tasks.ranking.label_tree import label_scores
from common.tasks.ranking.ranker import Ranker, Share, sizes_of
from common.tasks.ranking.task import LabelTask

if TYPE_CHECKING:
    from onnxruntime import OrtValue
    from transformers import PreTrainedTokenizerBase


class OnnxRanker(Ranker):
    """Scores rows against a task's labels with an ONNX export (see `Ranker`).

    An exported mask is one number a token, so the label tree's branches follow the prompts one after another.
    """

    def __init__(
        self,
        model: OnnxModel,
        tokenizer: PreTrainedTokenizerBase,
        task: LabelTask,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ) -> None:
        super().__init__(tokenizer, task, *sizes_of(model.config), max_batch_tokens)
        self.model, self.name, self.precision = model, model.name, (model.dtype, False)
        self.window = window_of(model.config)

    def _shared_prefix(self, prompts: Sequence[list[int]], readers: int = 1) -> tuple[int, ...]:
        """None where rows reach beyond a window: padding stands between a shared start and a row, and an exported
        window counts it."""
        longest = max(map(len, prompts)) + max(self.tree.depths)
        return super()._shared_prefix(prompts, readers) if longest <= self.window else ()

    def _read_prefix(self, prefix: tuple[int, ...]) -> list[np.ndarray]:
        return [value.numpy() for value in self.model.forward(*left_padded([prefix], 0), None, 1)[1]]

    def _cache(self, prefix: tuple[int, ...], rows: int) -> list[OrtValue] | None:
        if not prefix:
            return None
        return self.model.cache([array.repeat(rows, axis=0) for array in self.kept(prefix)])

    def _score(self, prefix: tuple[int, ...], suffixes: Sequence[list[int]], owners: Sequence[Share]) -> np.ndarray:
        rows = len(suffixes)
        ids, mask, positions = left_padded(suffixes, self.tokenizer.pad_token_id, len(prefix))
        logits, past = self.model.forward(ids, mask, positions, self._cache(prefix, rows), 1)
        columns = np.empty((rows, 1 + self.tree.columns, logits.shape[2]), dtype=np.float32)
        columns[:, :1] = logits
        for branch in self.tree.branches():
            tokens = np.tile([self.tree.tokens[node] for node in branch], (rows, 1))
            visible = np.concatenate([mask, np.ones_like(tokens)], axis=1)
            after = positions[:, -1:] + 1 + np.arange(len(branch))
            columns[:, branch] = self.model.forward(tokens, visible, after, past, len(branch))[0]
        return label_scores(self.tree, columns, self.task.aggregate)
