"""A folder for onnxruntime-genai at work in its own runtime, on the CPU: exports are proven in it.

The package is optional (requirements/export.txt). Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from common.cli import UserError, reason

CONFIG_FILE = "genai_config.json"


def is_genai(folder: str | Path) -> bool:
    """Whether `folder` is for onnxruntime-genai."""
    return (Path(folder) / CONFIG_FILE).is_file()


def library() -> ModuleType:
    """The package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise UserError(
            f"onnxruntime-genai is not installed ({reason(error)}); pip install -r requirements/export.txt"
        ) from error
    return onnxruntime_genai


class GenaiModel:
    """A folder in onnxruntime-genai; `OMP_NUM_THREADS` bounds its threads as it does torch's.

    Args:
        folder: with genai_config.json.
        context: tokens that a row which is ranked or proven may have; room for its keys and values is made at once.

    Attributes:
        name: the folder.
        context: as given, or what the model can read.
        vocabulary: columns of the logits.
        dtype: what a ranker's scores depend on.

    Raises:
        UserError: the package is not installed, or cannot read the folder.
    """

    dtype = "onnx_genai"

    def __init__(self, folder: str | Path, context: int) -> None:
        self._og = library()
        self.name = str(folder)
        settings = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
        self.context = min(context, settings["model"]["context_length"])
        self.vocabulary: int = settings["model"]["vocab_size"]
        try:
            config = self._og.Config(str(folder))
            if threads := int(os.environ.get("OMP_NUM_THREADS") or 0):
                options = {"session_options": {"intra_op_num_threads": threads}}
                config.overlay(json.dumps({"model": {"decoder": options}}))
            self._model = self._og.Model(config)
            self._tokenizer = self._og.Tokenizer(self._model)
        except Exception as error:  # its own have no common class
            raise UserError(f"onnxruntime-genai cannot read {folder} ({reason(error)}); export it again") from error
        self._row = None

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text by the tokenizer in the folder, as the package reads it."""
        return self._tokenizer.encode(text).tolist()

    def after(self, kept: int, tokens: Sequence[int], wanted: int | None = None) -> np.ndarray:
        """Logits after each of `tokens` [tokens, vocabulary], read after the first `kept` of what was read before.

        Args:
            wanted: of this many last tokens only; None: of all.
        """
        if self._row is None or not kept:
            self._row = self._generator(self.context)
        else:
            self._row.rewind_to(kept)
        self._row.append_tokens(np.array(tokens, dtype=np.int32))
        logits = self._row.get_output("logits")[0]
        return logits[len(logits) - (wanted or len(logits)) :].astype(np.float32)

    def logits(self, ids: Sequence[int], wanted: int | None = None) -> np.ndarray:
        """Logits after each of the tokens [tokens, vocabulary], or after this many last ones."""
        return self.after(0, ids, wanted)

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int]) -> list[list[int]]:
        """The greedy continuation of each prompt, as the package itself writes it, without the token that ended it.

        It ends at the tokens of its own genai_config.json; without `ends`, nowhere.
        """
        return [self._continue(prompt, max_new_tokens, ends) for prompt in prompts]

    def _continue(self, prompt: Sequence[int], max_new_tokens: int, ends: Collection[int]) -> list[int]:
        most = len(prompt) + max_new_tokens
        generator = self._generator(most, **({} if ends else {"min_length": most}))
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        answer: list[int] = []
        while len(answer) < max_new_tokens:
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in ends or (ends and generator.is_done() and len(answer) + 1 < max_new_tokens):
                break
            answer.append(token)
        return answer

    def _generator(self, length: int, **options):
        """A text that may have so many tokens."""
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length, do_sample=False, **options)
        return self._og.Generator(self._model, parameters)
