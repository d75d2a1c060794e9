"""A GGUF at work in llama.cpp, on the CPU: logits and greedy text."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.cli import UserError
from common.models import gguf_import, llama_cpp
from common.models.batching import context_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_STEP = 256  # llama.cpp's contexts are multiples of it
AT_ONCE = 512  # tokens that go through a layer together


def threads() -> int:
    """Threads of llama.cpp; `OMP_NUM_THREADS` bounds them as it does torch's."""
    return int(os.environ.get("OMP_NUM_THREADS") or 0) or os.cpu_count()


def load(folder: str, most_tokens: int) -> tuple[GgufModel, PreTrainedTokenizerBase]:
    """The GGUF that a model folder was made of (`gguf_import.model_folder`), as it is, and its tokenizer.

    Args:
        most_tokens: of a row, at most; and at most the model's context.

    Raises:
        UserError: see `GgufModel`.
    """
    from common.models.loading import load_config
    from common.models.tokenizers import load_tokenizer

    context = min(context_of(load_config(folder)), most_tokens)
    return GgufModel(gguf_import.origin(folder)["path"], context), load_tokenizer(folder)


class GgufModel:
    """A GGUF file in llama.cpp, on the CPU.

    Args:
        path: the file.
        context: tokens that a row may have.
        adapter: a GGUF with a LoRA adapter that is put on it.

    Attributes:
        name: the path.
        context: as given.
        vocabulary: tokens of the vocabulary.

    Raises:
        UserError: llama.cpp is not installed, or cannot read a file.
    """

    def __init__(self, path: str | Path, context: int, adapter: str | Path | None = None) -> None:
        self._lib = llama_cpp.library()
        self._model = self._lib.llama_model_load_from_file(os.fsencode(path), self._lib.llama_model_default_params())
        if not self._model:
            raise UserError(f"llama.cpp cannot read {path}; export it again")
        parameters = self._lib.llama_context_default_params()
        cells = -(-context // CONTEXT_STEP) * CONTEXT_STEP
        parameters.words[:3] = [cells, cells, min(cells, AT_ONCE)]  # n_ctx, n_batch, n_ubatch
        self._context = self._lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise UserError(f"llama.cpp has no room for {context} tokens of {path}; give shorter rows")
        self._lib.llama_set_n_threads(self._context, threads(), threads())
        self._batch = self._lib.llama_batch_init(cells, 0, 1)
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.name, self.context = str(path), context
        self.vocabulary = self._lib.llama_vocab_n_tokens(self._vocab)
        if adapter:
            self._put_on(adapter)

    def _put_on(self, adapter: str | Path) -> None:
        lora = self._lib.llama_adapter_lora_init(self._model, os.fsencode(adapter))
        if not lora:
            raise UserError(f"llama.cpp cannot put the adapter {adapter} on {self.name}; give its own base")
        self._lib.llama_set_adapters_lora(self._context, (ctypes.c_void_p * 1)(lora), 1, (ctypes.c_float * 1)(1.0))

    def after(self, kept: int, tokens: Sequence[int], wanted: int | None = None) -> np.ndarray:
        """Logits after each of `tokens` [tokens, vocabulary], read after the first `kept` of what was read before.

        Args:
            wanted: of this many last tokens only; None: of all.
        """
        wanted = len(tokens) if wanted is None else wanted
        lib, batch = self._lib, self._batch
        # what comes after leaves the cache; a recurrent layer has no way back but to the start
        if not lib.llama_memory_seq_rm(lib.llama_get_memory(self._context), 0, kept, -1):
            raise UserError(f"{self.name} has recurrent layers, which cannot go back in a text; load it in torch")
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = int(token), kept + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = index >= len(tokens) - wanted
        if code := lib.llama_decode(self._context, batch):
            raise UserError(f"llama.cpp cannot read {len(tokens)} tokens of a row of {kept + len(tokens)} ({code})")
        logits = np.ctypeslib.as_array(lib.llama_get_logits(self._context), (wanted, self.vocabulary))
        return logits.copy()  # the buffer is llama.cpp's, and the next call's

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after each of the tokens [tokens, vocabulary]."""
        return self.after(0, ids)

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int]) -> list[list[int]]:
        """The greedy continuation of each prompt, without the token of `ends` that ended it."""
        answers = []
        for prompt in prompts:
            token, answer = int(self.after(0, prompt, 1)[-1].argmax()), []
            while token not in ends and len(answer) < max_new_tokens:
                answer.append(token)
                token = int(self.after(len(prompt) + len(answer) - 1, [token])[-1].argmax())
            answers.append(answer)
        return answers

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text by the tokenizer in the file, with special tokens where their names stand in it."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()  # no token has less than a byte, but a space may be put before
        count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, len(ids), False, True)
        return list(ids[:count])

    def ends(self) -> set[int]:
        """The tokens that end an answer, as llama.cpp sees it."""
        return {token for token in range(self.vocabulary) if self._lib.llama_vocab_is_eog(self._vocab, token)}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back."""
        if getattr(self, "_context", None):
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._context)
            self._lib.llama_model_free(self._model)
            self._context = None
