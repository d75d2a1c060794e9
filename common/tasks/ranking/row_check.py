"""Which rows can be classified: known before a model loads, so that a bad one is not found in the middle of a night."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from common.models import adapters, gguf_import, loading, tokenizers
from common.models.batching import MAX_BATCH_TOKENS, context_of
from common.models.source import LLAMA_CPP, ModelSource
from common.tasks.ranking.label_tree import LabelTree, label_tokens
from common.tasks.ranking.task import LabelTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_tokenizer: Callable[..., PreTrainedTokenizerBase] = lru_cache(maxsize=2)(tokenizers.load_tokenizer)


@dataclass(frozen=True)
class PromptRoom:
    """How much text a model can read with a task's prompt around it and the longest label behind it.

    Nothing of it needs the model itself, and it is small enough to be sent to other processes.

    Attributes:
        tokenizer: its folder or Hub id.
        trust_remote_code: run code that comes with it.
        context: tokens that the model can read.
        most: tokens that a prompt may have.
        around: tokens of the prompt of no text.
    """

    tokenizer: str
    trust_remote_code: bool
    context: int
    most: int
    around: int

    @classmethod
    def of(cls, source: ModelSource, task: LabelTask, max_batch_tokens: int = MAX_BATCH_TOKENS) -> PromptRoom:
        """Of a model that is not loaded.

        Raises:
            UserError: it has no tokenizer or no config.
        """
        own = loading.base_source(source).model_dir
        folder = adapters.tokenizer_folder(source.model_dir, own)
        if source.engine == LLAMA_CPP:
            own = folder = gguf_import.config_folder(source.model_dir)
        config = loading.load_config(own, source.trust_remote_code)
        context = context_of(config)
        if source.engine == LLAMA_CPP:
            context = min(context, max_batch_tokens)
        folder = os.path.abspath(folder) if os.path.isdir(folder) else folder
        tokenizer = _tokenizer(folder, trust_remote_code=source.trust_remote_code)
        most = longest_prompt(LabelTree(label_tokens(tokenizer, task)), context)
        around = len(tokenizers.encode_prompt(tokenizer, task.prompt("")))
        return cls(folder, source.trust_remote_code, context, most, around)

    def fault(self, prompt: str, text: str) -> str | None:
        """Why the prompt of a text is too long; None where it fits."""
        if self.around + len(text.encode()) <= self.most:  # a token is a byte or more, so that few have to be encoded
            return None
        tokenizer = _tokenizer(self.tokenizer, trust_remote_code=self.trust_remote_code)
        tokens = len(tokenizers.encode_prompt(tokenizer, prompt))
        return length_fault(tokens, self.context) if tokens > self.most else None


def longest_prompt(tree: LabelTree, context: int) -> int:
    """Tokens that a prompt may have, so that the longest label fits behind it."""
    return context - max(tree.depths) - 1


def length_fault(tokens: int, context: int) -> str:
    """What is said of a row that is longer than `longest_prompt`, behind its name."""
    return f"has {tokens} tokens and with its longest label does not fit the model's context of {context}"


@dataclass(frozen=True)
class RowCheck:
    """Tells good rows from bad ones.

    Attributes:
        task: whose text a row needs.
        room: for the text; None: any length will do.
        strict: a row whose text is not of the task (see `LabelTask.warning`) is bad, too.
    """

    task: LabelTask
    room: PromptRoom | None = None
    strict: bool = False

    def read(self, row: Any) -> tuple[str, None] | tuple[None, str]:
        """(clean text of a row, None), or (None, why it cannot be classified)."""
        if isinstance(row, ValueError):
            return None, str(row)
        text = self.task.text_of(row)
        if text is None:
            return None, f"no text under '{self.task.text_field}'"
        fault = self.too_long(text) or (self.task.warning(text) if self.strict else None)
        return (None, fault) if fault else (text, None)

    def too_long(self, text: str) -> str | None:
        """Why a text does not fit the model's context; None where it does."""
        fault = self.room.fault(self.task.prompt(text), text) if self.room else None
        return fault and f"the row {fault}"


def fits_all(checks: Sequence[RowCheck]) -> Callable[[str], str | None]:
    """A check of texts: why one does not fit the context of some model, or None."""

    def fault(text: str) -> str | None:
        return next((found for check in checks if (found := check.too_long(text))), None)

    return fault
