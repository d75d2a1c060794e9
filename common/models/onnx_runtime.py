"""An ONNX export at work in ONNX Runtime: label scores, and text token by token with its key/value cache.

Nothing here needs torch: where it is not installed, an export still answers. (Where it is, transformers' tokenizers
bring it into memory.)
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.cli import UserError, reason
from common.models import greedy, tokenizers, unproven
from common.models.genai_model import is_genai
from common.models.gguf_file import UNPROVEN_KEY

if TYPE_CHECKING:
    from onnxruntime import OrtValue
    from transformers import PreTrainedTokenizerBase

MODEL_FILE = "model.onnx"
KEEP = "num_logits_to_keep"  # an optional input: logits of this many last positions, all of them by default


def is_onnx(folder: str | Path) -> bool:
    """Whether `folder` holds an ONNX export that `OnnxModel` runs: one for onnxruntime-genai has other inputs."""
    return (Path(folder) / MODEL_FILE).is_file() and not is_genai(folder)


class OnnxModel:
    """An exported model in ONNX Runtime, on the CPU; `OMP_NUM_THREADS` bounds its threads as it does torch's.

    Attributes:
        name: the folder.
        config: transformers' configuration of the model.
        dtype: of its key/value cache, such as "float32".
        unproven: its own metadata says that it was exported without a proof.

    Raises:
        UserError: the folder holds no export that ONNX Runtime can read.
    """

    def __init__(self, folder: str) -> None:
        import onnxruntime
        from transformers import AutoConfig

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
        options.log_severity_level = 3
        self.name = folder
        try:
            self.config = AutoConfig.from_pretrained(folder)
            self._session = onnxruntime.InferenceSession(
                os.path.join(folder, MODEL_FILE), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's own have no common class
            raise UserError(f"{folder} cannot be read ({reason(error)}); export it again") from error
        cache = [argument for argument in self._session.get_inputs() if argument.name.startswith("past_key_values.")]
        self.unproven = UNPROVEN_KEY in self._session.get_modelmeta().custom_metadata_map
        self._cache_names = [argument.name for argument in cache]
        self._cache_shapes = [argument.shape for argument in cache]
        self.dtype = {"tensor(float)": "float32", "tensor(float16)": "float16"}[cache[0].type]

    def forward(
        self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, past: Sequence[OrtValue] | None, keep: int
    ) -> tuple[np.ndarray, list[OrtValue]]:
        """Logits of the last `keep` tokens [rows, keep, vocabulary] in float32, and the cache with all tokens in it.

        Args:
            ids: tokens [rows, new], left-padded where they are a prompt.
            mask: [rows, past + new], 0 for padding.
            positions: of the tokens [rows, new].
            past: the cache of an earlier call; None: there was none.
        """
        from onnxruntime import OrtValue

        if past is None:
            past = self.cache([np.empty((len(ids), shape[1], 0, shape[3]), self.dtype) for shape in self._cache_shapes])
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, KEEP: np.array([keep])}
        feeds = {name: OrtValue.ortvalue_from_numpy(value.astype(np.int64)) for name, value in feeds.items()}
        feeds |= dict(zip(self._cache_names, past, strict=True))
        names = ["logits", *(name.replace("past_key_values.", "present.") for name in self._cache_names)]
        logits, *present = self._session.run_with_ort_values(names, feeds)
        return logits.numpy().astype(np.float32, copy=False), present

    @staticmethod
    def cache(arrays: Sequence[np.ndarray]) -> list[OrtValue]:
        """Keys and values, each [rows, heads, tokens, size of a head], as `forward` takes them."""
        from onnxruntime import OrtValue

        return [OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for array in arrays]

    def logits(self, ids: Sequence[int], wanted: int | None = None) -> np.ndarray:
        """Logits after each of the tokens [tokens, vocabulary], or after this many last ones."""
        return self.forward(*greedy.left_padded([ids], 0), None, wanted or len(ids))[0][0]

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int]) -> list[list[int]]:
        """The greedy continuation of each prompt, without the token of `ends` that ended it."""

        past = None

        def step(*arrays: np.ndarray) -> np.ndarray:
            nonlocal past
            logits, past = self.forward(*arrays, past, 1)
            return logits[:, -1]

        return greedy.answers(step, prompts, max_new_tokens, ends)


def load(folder: str) -> tuple[OnnxModel, PreTrainedTokenizerBase]:
    """An export and its tokenizer.

    Raises:
        UserError: see `OnnxModel` and `tokenizers.load_tokenizer`.
    """
    model = OnnxModel(folder)
    unproven.warn_of(folder, model.unproven or unproven.is_unproven(folder))
    return model, tokenizers.load_tokenizer(folder)
