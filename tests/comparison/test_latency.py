"""How rows are timed."""

from __future__ import annotations

import pytest
import torch
from support.inputs import PROMPTS

from common.comparison import latency
from common.generation import generate as generation
from common.models import loading as models
from common.models import tokenizers
from common.models.source import ModelSource


@pytest.mark.processes
def test_every_row_is_timed_in_passes_on_answers_of_one_length(folders, monkeypatch):
    model, tokenizer = models.load_for_inference(ModelSource(folders["student"]))
    masked = latency.NeverEnd(tokenizer, model.generation_config).change(torch.zeros(len(tokenizer)))
    assert set(torch.isinf(masked).nonzero()[:, 0].tolist()) == set(tokenizers.stop_ids(tokenizer))
    lengths, calls, generate = [], [], generation.generate

    def watched(*args, **kwargs):
        answers = generate(*args, **kwargs)
        lengths.append(len(answers[0][0].tokens))
        return answers

    monkeypatch.setattr(generation, "generate", watched)
    prompts = [tokenizers.encode_prompt(tokenizer, prompt) for prompt in PROMPTS[:3]]
    seconds = latency.time_rows(model, tokenizer, prompts, calls.append)
    assert calls == [0, 1] + [0, 1, 2] * latency.PASSES
    assert lengths == [latency.NEW_TOKENS] * len(calls)
    assert all(len(seconds[name]) == 3 and min(seconds[name]) > 0 for name in ("latency", "ttft", "decode"))


def test_the_summary_of_known_seconds():
    seconds = {"latency": [0.1, 0.3, 0.2], "ttft": [0.01, 0.03, 0.02], "decode": [0.31, 3.1, 0.62], "core_share": 0.5}
    assert latency.summary(seconds) == {
        "latency_s": {"p50": 0.2, "p95": 0.29},
        "ttft_s": 0.02,
        "tokens_per_s": (latency.NEW_TOKENS - 1) / 0.62,
        "speed_rows": 3,
        "core_share": 0.5,
    }
