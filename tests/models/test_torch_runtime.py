"""A model in torch as the proof of an export runs it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.families import ARCHITECTURES, config_of

from common.models.torch_runtime import TorchRuntime

PROMPTS = [list(range(2, 9)), list(range(20, 51)), [7], list(range(40, 60))]  # the second is longer than a window


@pytest.fixture(scope="module", params=ARCHITECTURES)
def runtime(request) -> TorchRuntime:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = config_of(request.param, vocab_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    return TorchRuntime(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())


def test_prompts_that_are_answered_together_are_answered_as_each_alone(runtime):
    each = [alone(runtime.model, prompt, 12) for prompt in PROMPTS]
    assert runtime.generate(PROMPTS, 12, ()) == each


def test_an_answer_ends_before_the_others(runtime):
    whole = runtime.generate(PROMPTS, 12, ())
    end = whole[0][3]
    expected = [answer[: answer.index(end)] if end in answer else answer for answer in whole]
    assert runtime.generate(PROMPTS, 12, {end}) == expected


def test_the_logits_of_the_last_tokens(runtime):
    every = runtime.logits(PROMPTS[1])
    assert every.shape == (len(PROMPTS[1]), 64)
    np.testing.assert_allclose(runtime.logits(PROMPTS[1], 3), every[-3:], atol=1e-5)


def alone(model, prompt: list[int], tokens: int) -> list[int]:
    """The likeliest token again and again, by the whole text each time."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]
