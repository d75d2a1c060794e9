"""A GGUF export at work in llama.cpp (llama-cpp-python, in requirements-export.txt): label scores and greedy text."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.cli import UserError
from common.ranker import Ranker, label_scores
from common.tasks import LabelTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GgufModel:
    """A GGUF file in llama.cpp, on the CPU.

    Args:
        path: the file.
        context: tokens that a row may have; memory for the logits of all of them is taken.

    Raises:
        UserError: llama-cpp-python is not installed, or cannot read the file.
    """

    def __init__(self, path: str | Path, context: int) -> None:
        try:
            from llama_cpp import Llama
        except ImportError as error:
            raise UserError(
                "a GGUF is proven in llama.cpp, which is not installed; pip install -r requirements-export.txt"
            ) from error
        threads = int(os.environ.get("OMP_NUM_THREADS") or 0) or os.cpu_count()
        try:
            self._llama = Llama(
                str(path),
                n_ctx=context,
                n_batch=context,
                n_threads=threads,
                n_threads_batch=threads,
                logits_all=True,
                verbose=False,
            )
        except (ValueError, AssertionError) as error:
            raise UserError(f"llama.cpp cannot read {path} ({error}); export it again") from error
        self.name, self.context, self.vocabulary = str(path), context, self._llama.n_vocab()

    def after(self, kept: int, tokens: Sequence[int]) -> np.ndarray:
        """Logits after each of `tokens` [tokens, vocabulary], read after the first `kept` of what was read before."""
        self._llama.n_tokens = kept  # what comes after leaves the cache
        self._llama.eval(tokens)
        return self._llama.scores[kept : kept + len(tokens)]

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after each of the tokens [tokens, vocabulary]."""
        return self.after(0, ids).copy()

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int]) -> list[list[int]]:
        """The greedy continuation of each prompt, without the token of `ends` that ended it."""
        answers = []
        for prompt in prompts:
            token, answer = int(self.after(0, prompt)[-1].argmax()), []
            while token not in ends and len(answer) < max_new_tokens:
                answer.append(token)
                token = int(self.after(len(prompt) + len(answer) - 1, [token])[-1].argmax())
            answers.append(answer)
        return answers

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text by the tokenizer in the file, with special tokens where their names stand in it."""
        return self._llama.tokenize(text.encode(), add_bos=False, special=True)

    def ranker(self, tokenizer: PreTrainedTokenizerBase, task: LabelTask) -> GgufRanker:
        """The label ranker on this model."""
        return GgufRanker(self, tokenizer, task)

    def close(self) -> None:
        """Give the memory back."""
        self._llama.close()


class GgufRanker(Ranker):
    """Scores rows against a task's labels with a GGUF, row by row (see `Ranker`)."""

    def __init__(self, model: GgufModel, tokenizer: PreTrainedTokenizerBase, task: LabelTask) -> None:
        super().__init__(tokenizer, task, model.context, model.vocabulary)
        self.model, self.name, self.precision = model, model.name, ("gguf", False)

    def _score(self, prefix: tuple[int, ...], suffixes: Sequence[list[int]]) -> np.ndarray:
        rows = []
        if prefix:
            self.model.after(0, prefix)
        for suffix in suffixes:
            end = len(prefix) + len(suffix)
            columns = [self.model.after(len(prefix), suffix)[-1:].copy()]
            columns += [None] * self.tree.columns
            for branch in self.tree.branches():
                logits = self.model.after(end, [self.tree.tokens[node] for node in branch])
                for node, row in zip(branch, logits.copy(), strict=True):
                    columns[node] = row[None]
            rows.append(np.concatenate(columns))
        return label_scores(self.tree, np.stack(rows), self.task.aggregate)
