"""The label ranker of a model, whatever runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.models.batching import MAX_BATCH_TOKENS
from common.models.genai_model import GenaiModel
from common.models.gguf_model import GgufModel
from common.models.onnx_runtime import OnnxModel
from common.tasks.ranking.ranker import Ranker
from common.tasks.ranking.task import LabelTask

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def ranker_of(
    model: PreTrainedModel | PeftModel | OnnxModel | GgufModel | GenaiModel,
    tokenizer: PreTrainedTokenizerBase,
    task: LabelTask,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> Ranker:
    """The ranker on an ONNX export, on what reads row by row, whatever the budget (a GGUF, a folder for
    onnxruntime-genai), or on a torch model."""
    if isinstance(model, OnnxModel):
        from common.tasks.ranking.onnx_ranker import OnnxRanker

        return OnnxRanker(model, tokenizer, task, max_batch_tokens)
    if isinstance(model, GgufModel | GenaiModel):
        from common.tasks.ranking.row_ranker import RowRanker

        return RowRanker(model, tokenizer, task)
    from common.tasks.ranking.torch_ranker import TorchRanker

    return TorchRanker(model, tokenizer, task, max_batch_tokens)
