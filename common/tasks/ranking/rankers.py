"""The label ranker of a model, whatever runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.models.batching import MAX_BATCH_TOKENS
from common.models.gguf_model import GgufModel
from common.models.onnx_runtime import OnnxModel
from common.tasks.ranking.ranker import Ranker
from common.tasks.ranking.task import LabelTask

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def ranker_of(
    model: PreTrainedModel | PeftModel | OnnxModel | GgufModel,
    tokenizer: PreTrainedTokenizerBase,
    task: LabelTask,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> Ranker:
    """The ranker on an ONNX export, a GGUF (which reads row by row, whatever the budget) or a torch model."""
    if isinstance(model, OnnxModel):
        from common.tasks.ranking.onnx_ranker import OnnxRanker

        return OnnxRanker(model, tokenizer, task, max_batch_tokens)
    if isinstance(model, GgufModel):
        from common.tasks.ranking.gguf_ranker import GgufRanker

        return GgufRanker(model, tokenizer, task)
    from common.tasks.ranking.torch_ranker import TorchRanker

    return TorchRanker(model, tokenizer, task, max_batch_tokens)
