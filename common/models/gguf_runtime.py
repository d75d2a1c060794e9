"""A GGUF export at work in llama.cpp (llama-cpp-python, in requirements/export.txt): label scores and greedy text."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.cli import UserError

if TYPE_CHECKING:
    pass


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
                "a GGUF is proven in llama.cpp, which is not installed; pip install -r requirements/export.txt"
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

    def close(self) -> None:
        """Give the memory back."""
        self._llama.close()
