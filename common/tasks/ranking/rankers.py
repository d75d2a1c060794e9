"""The label ranker of a model, whatever runs it."""

from __future__ import annotations

from typing import Any

from common.models.gguf_runtime import GgufModel
from common.models.onnx_runtime import OnnxModel
from common.tasks.ranking.ranker import Ranker
from common.tasks.ranking.task import LabelTask


def ranker_of(model: Any, tokenizer: Any, task: LabelTask, *budget: int) -> Ranker:
    """The ranker on an ONNX export, a GGUF or a torch model."""
    if isinstance(model, OnnxModel):
        from common.tasks.ranking.onnx_ranker import OnnxRanker

        return OnnxRanker(model, tokenizer, task, *budget)
    if isinstance(model, GgufModel):
        from common.tasks.ranking.gguf_ranker import GgufRanker

        return GgufRanker(model, tokenizer, task)
    from common.tasks.ranking.torch_ranker import LabelRanker

    return LabelRanker(model, tokenizer, task, *budget)
