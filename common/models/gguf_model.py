"""A GGUF file as it is, packed, at work in llama.cpp on the CPU: in the place of a torch model where text is written,
labels are ranked or an export is proven. Nothing here needs torch."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.cli import UserError
from common.models import llama_cpp

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

CONTEXT_STEP = 256  # llama.cpp's contexts are multiples of it
AT_ONCE = 512  # tokens that go through a layer together
MOST_AT_ONCE = 2048  # tokens that are read in one call


def threads() -> int:
    """Threads of llama.cpp; `OMP_NUM_THREADS` bounds them as it does torch's."""
    return int(os.environ.get("OMP_NUM_THREADS") or 0) or os.cpu_count()


def rounded(tokens: int) -> int:
    """The tokens that llama.cpp makes room for where so many are asked for."""
    return -(-tokens // CONTEXT_STEP) * CONTEXT_STEP


class GgufModel:
    """A GGUF file in llama.cpp, its weights read once, whatever is asked of it.

    What is ranked and what is written have keys and values of their own, so that a row can be ranked between two tokens
    of a text.

    Args:
        path: the file.
        context: tokens that a row which is ranked or proven may have.
        adapter: a GGUF with a LoRA adapter that is put on it.
        config: transformers' of its architecture, where text is to be written; its context bounds that.
        generation_config: its stop tokens, likewise.

    Attributes:
        name: the path.
        context, config, generation_config: as given.
        vocabulary: tokens of the vocabulary.
        device, dtype: as a torch model has them, in words.
        hooks: each is called before every forward pass.

    Raises:
        UserError: llama.cpp is not installed, or cannot read a file.
    """

    device, dtype = "cpu", "gguf"

    def __init__(
        self,
        path: str | Path,
        context: int,
        adapter: str | Path | None = None,
        *,
        config: PreTrainedConfig | None = None,
        generation_config: GenerationConfig | None = None,
    ) -> None:
        self.lib = llama_cpp.library()
        self.handle = self.lib.llama_model_load_from_file(os.fsencode(path), self.lib.llama_model_default_params())
        if not self.handle:
            raise UserError(f"llama.cpp cannot read {path}; export it again, or leave --engine out: torch reads more")
        self.name, self.context = str(path), context
        self.config, self.generation_config = config, generation_config
        self._vocab = self.lib.llama_model_get_vocab(self.handle)
        self.vocabulary: int = self.lib.llama_vocab_n_tokens(self._vocab)
        self.hooks: list[Callable[[], None]] = []
        self.adapter: int | None = None
        self._row: Sequences | None = None
        self._row_ids: list[int] = []
        self._texts: Sequences | None = None
        if adapter:
            self.adapter = self.lib.llama_adapter_lora_init(self.handle, os.fsencode(adapter))
            if not self.adapter:
                raise UserError(f"llama.cpp cannot put the adapter {adapter} on {path}; give its own base")

    def texts(self, sequences: int, columns: int) -> Sequences:
        """Room for so many texts of at most `columns` tokens each: what there is, where that is enough.

        Raises:
            UserError: there is no memory for it.
        """
        known = self._texts
        if known is None or columns > known.columns or sequences > known.count:
            if known:
                known.close()
                self._texts = None
            self._texts = Sequences(self, sequences, columns)
        return self._texts

    def after(self, kept: int, tokens: Sequence[int], wanted: int | None = None) -> np.ndarray:
        """Logits after each of `tokens` [tokens, vocabulary], read after the first `kept` of what was read before.

        Recurrent layers have no way back within a text but to its start: with them, those `kept` are read anew.

        Args:
            wanted: of this many last tokens only; None: of all.
        """
        if self._row is None:
            self._row = Sequences(self, 1, self.context)
        wanted = len(tokens) if wanted is None else wanted
        self._row_ids[kept:] = tokens
        if not self._row.cut(0, kept):
            kept, tokens = 0, self._row_ids
        return self._row.read(0, tokens, kept=kept, wanted=wanted)

    def logits(self, ids: Sequence[int], wanted: int | None = None) -> np.ndarray:
        """Logits after each of the tokens [tokens, vocabulary], or after this many last ones."""
        return self.after(0, ids, wanted)

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
        count = self.lib.llama_tokenize(self._vocab, data, len(data), ids, len(ids), False, True)
        return list(ids[:count])

    def ends(self) -> set[int]:
        """The tokens that end an answer, as llama.cpp sees it."""
        return {token for token in range(self.vocabulary) if self.lib.llama_vocab_is_eog(self._vocab, token)}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back."""
        if getattr(self, "handle", None):
            for sequences in filter(None, (self._row, self._texts)):
                sequences.close()
            self._row = self._texts = None
            self.lib.llama_model_free(self.handle)
            self.handle = None


class Sequences:
    """Texts that grow side by side in a model: the keys and values of each.

    Args:
        count: of texts.
        columns: tokens of a text, at most.

    Attributes:
        count: as given.
        columns: as given, or some more.

    Raises:
        UserError: there is no memory for them.
    """

    def __init__(self, model: GgufModel, count: int, columns: int) -> None:
        self._lib, self._vocabulary, self._name = model.lib, model.vocabulary, model.name
        self._hooks = model.hooks  # and not the model, whose memory has to go when nobody else holds it
        self.count, self.columns = count, rounded(columns)
        at_once = min(self.columns, MOST_AT_ONCE)
        parameters = self._lib.llama_context_default_params()
        # n_ctx, which the sequences share evenly, n_batch, n_ubatch, n_seq_max
        parameters.words[:4] = [count * self.columns, max(at_once, count), min(at_once, AT_ONCE), count]
        self._context = self._lib.llama_init_from_model(model.handle, parameters)
        if not self._context:
            raise UserError(
                f"llama.cpp has no room for {count} x {self.columns} tokens of {model.name}; lower --max_batch_tokens "
                "(MAX_BATCH_TOKENS of the server), or give shorter rows"
            )
        self._lib.llama_set_n_threads(self._context, threads(), threads())
        self._batch = self._lib.llama_batch_init(max(at_once, count), 0, 1)
        if model.adapter:
            pointers, scales = (ctypes.c_void_p * 1)(model.adapter), (ctypes.c_float * 1)(1.0)
            self._lib.llama_set_adapters_lora(self._context, pointers, 1, scales)

    def read(self, sequence: int, ids: Sequence[int], *, kept: int = 0, wanted: int = 1) -> np.ndarray:
        """Read a text behind the first `kept` tokens of a sequence; what came after them is forgotten.

        Returns:
            The logits after its last `wanted` tokens [wanted, vocabulary].
        """
        gone = self.cut(sequence, kept)
        assert gone, "a recurrent layer cannot go back within a text: see `GgufModel.after`"
        parts = []
        for start in range(0, len(ids), MOST_AT_ONCE):
            part = ids[start : start + MOST_AT_ONCE]
            numbers = range(start, start + len(part))
            asked = [number >= len(ids) - wanted for number in numbers]
            parts.append(self._decode(part, [kept + number for number in numbers], [sequence] * len(part), asked))
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def step(self, sequences: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """A token more of some sequences, at its position in each; logits [sequences, vocabulary] of what follows."""
        return self._decode(tokens, positions, sequences, [True] * len(tokens))

    def copy(self, source: int, target: int) -> None:
        """Let a sequence begin anew as another one is."""
        self.cut(target, 0)
        self._lib.llama_memory_seq_cp(self._lib.llama_get_memory(self._context), source, target, -1, -1)

    def cut(self, sequence: int, kept: int) -> bool:
        """Leave the first so many tokens of a sequence; False where a recurrent layer would have to go back to them."""
        return self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), sequence, kept, -1)

    def _decode(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wanted: Sequence[bool]
    ) -> np.ndarray:
        for hook in self._hooks:
            hook()
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, values in enumerate(zip(tokens, positions, sequences, wanted, strict=True)):
            batch.token[index], batch.pos[index], batch.seq_id[index][0], batch.logits[index] = values
            batch.n_seq_id[index] = 1
        if code := self._lib.llama_decode(self._context, batch):
            raise UserError(
                f"llama.cpp cannot go on with {len(tokens)} tokens of {self._name} ({code}); give shorter texts"
            )
        rows = sum(wanted)
        if not rows:
            return np.empty((0, self._vocabulary), dtype=np.float32)
        logits = np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (rows, self._vocabulary))
        return logits.copy()  # the buffer is llama.cpp's, and the next call's

    def close(self) -> None:
        """Give the memory back."""
        if self._context:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._context)
            self._context = None
