"""A GGUF file as it is, packed, at work in llama.cpp on texts that grow together: each has a sequence of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.cli import UserError
from common.models import llama_cpp
from common.models.gguf_runtime import AT_ONCE, CONTEXT_STEP, threads

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedConfig

MOST_AT_ONCE = 2048  # tokens of a text that are read in one call


class PackedModel:
    """A GGUF file in llama.cpp, on the CPU, in the place of a torch model where text is written.

    Args:
        path: the file.
        config: of its architecture; its context bounds texts.
        generation_config: its stop tokens.

    Raises:
        UserError: llama.cpp is not installed, or cannot read the file.
    """

    def __init__(self, path: str | Path, config: PreTrainedConfig, generation_config: GenerationConfig) -> None:
        import torch

        self._lib = llama_cpp.library()
        self._model = self._lib.llama_model_load_from_file(os.fsencode(path), self._lib.llama_model_default_params())
        if not self._model:
            raise UserError(f"llama.cpp cannot read {path}; leave --engine out, and it is de-quantised")
        self._context = None
        self.path, self.config, self.generation_config = str(path), config, generation_config
        self.device, self.dtype = torch.device("cpu"), "gguf"
        self.vocabulary: int = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        self.sequences = self.columns = 0

    def open(self, sequences: int, columns: int) -> None:
        """Make room for so many texts of at most `columns` tokens each; those that were being written are gone.

        Raises:
            UserError: there is no memory for it.
        """
        self._leave()
        columns = -(-columns // CONTEXT_STEP) * CONTEXT_STEP
        parameters = self._lib.llama_context_default_params()
        at_once = min(columns, MOST_AT_ONCE)
        # n_ctx, which the sequences share evenly, n_batch, n_ubatch, n_seq_max
        parameters.words[:4] = [sequences * columns, max(at_once, sequences), min(at_once, AT_ONCE), sequences]
        self._context = self._lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise UserError(
                f"llama.cpp has no room for {sequences} x {columns} tokens of {self.path}; lower --max_batch_tokens"
            )
        self._lib.llama_set_n_threads(self._context, threads(), threads())
        self._batch = self._lib.llama_batch_init(max(at_once, sequences), 0, 1)
        self.sequences, self.columns = sequences, columns

    def read(self, sequence: int, ids: Sequence[int]) -> torch.Tensor:
        """Begin a sequence anew with a text; the logits [1, vocabulary] of what follows it."""
        self.clear(sequence)
        for start in range(0, len(ids), MOST_AT_ONCE):
            part = ids[start : start + MOST_AT_ONCE]
            last = start + len(part) == len(ids)
            wanted = [False] * (len(part) - 1) + [last]
            logits = self._decode(part, range(start, start + len(part)), [sequence] * len(part), wanted)
        return logits

    def step(self, sequences: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """A token more of some sequences, at its position in each; logits [sequences, vocabulary] of what follows."""
        return self._decode(tokens, positions, sequences, [True] * len(tokens))

    def copy(self, source: int, target: int) -> None:
        """Let a sequence begin anew as another one is."""
        self.clear(target)
        self._lib.llama_memory_seq_cp(self._lib.llama_get_memory(self._context), source, target, -1, -1)

    def clear(self, sequence: int) -> None:
        """Forget a sequence."""
        self.cut(sequence, -1)

    def cut(self, sequence: int, kept: int) -> None:
        """Leave the first so many tokens of a sequence."""
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), sequence, kept, -1)

    def _decode(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wanted: Sequence[bool]
    ) -> torch.Tensor:
        import torch

        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, values in enumerate(zip(tokens, positions, sequences, wanted, strict=True)):
            batch.token[index], batch.pos[index], batch.seq_id[index][0], batch.logits[index] = values
            batch.n_seq_id[index] = 1
        if code := self._lib.llama_decode(self._context, batch):
            raise UserError(f"llama.cpp cannot go on with {len(tokens)} tokens ({code}); lower --max_batch_tokens")
        rows = sum(wanted)
        if not rows:
            return torch.empty(0, self.vocabulary)
        logits = np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (rows, self.vocabulary))
        return torch.from_numpy(logits.copy())  # the buffer is llama.cpp's, and the next call's

    def _leave(self) -> None:
        if self._context:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._context)
            self._context = None
        self.sequences = self.columns = 0

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self._leave()
            self._lib.llama_model_free(self._model)
            self._model = None
