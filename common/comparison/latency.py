"""How fast one model answers: latency of a row, time to first token, tokens a second.

Models are never loaded together, so they cannot take turns; each is timed alone, in a process of its own, as follows.
Rows go one at a time (batch of one). The first rows are run once without being timed (`WARM_UP`), then all rows are
run `PASSES` times and a row's time is its median, so that a hiccup of the machine does not count. Latency is the time
of the task's own answer. Time to first token and tokens a second are of one more answer with a fixed number of tokens,
`NEW_TOKENS`, whatever the model would have stopped at, so that models are compared at the same work. The share of the
time in which this process had a core tells whether the machine was busy with something else meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from common.generation import generate as generation
from common.generation.decoding import Decoding
from common.generation.steering import Steering
from common.models.tokenizers import stop_ids

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

WARM_UP = 2  # rows
PASSES = 3
NEW_TOKENS = 32


class _Clock(BaseStreamer):
    """Notes when the prompt was taken and when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class NeverEnd(Steering):
    """Takes the tokens that end an answer out of the choice."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig) -> None:
        self.ends = sorted(stop_ids(tokenizer, generation_config))

    def change(self, scores: torch.Tensor) -> torch.Tensor:
        scores[self.ends] = float("-inf")
        return scores


def time_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    answer: Callable[[int], object] | None,
) -> dict[str, Any]:
    """Time a model on some rows.

    Args:
        prompts: token ids of each row; `NEW_TOKENS` more must fit the context.
        answer: answers the row of that number, as the task is meant to be used; None: the answer of `NEW_TOKENS`.

    Returns:
        Seconds of each row in "latency", "ttft" and "decode" (`NEW_TOKENS` - 1 tokens after the first), and
        "core_share": 1 where nothing else wanted this process's core.
    """
    for row in range(min(WARM_UP, len(prompts))):
        _time_row(model, tokenizer, prompts[row], answer and (lambda row=row: answer(row)))
    wall, core = time.perf_counter(), time.thread_time()
    passes = [
        [
            _time_row(model, tokenizer, prompt, answer and (lambda row=row: answer(row)))
            for row, prompt in enumerate(prompts)
        ]
        for _ in range(PASSES)
    ]
    core_share = (time.thread_time() - core) / (time.perf_counter() - wall)
    medians = np.median(np.array(passes), axis=0).T  # [3, rows]
    seconds = {name: values.tolist() for name, values in zip(("latency", "ttft", "decode"), medians, strict=True)}
    return seconds | {"core_share": core_share}


def _time_row(model, tokenizer, prompt: Sequence[int], answer: Callable[[], object] | None) -> list[float]:
    """[latency, ttft, decode] of a row in seconds."""
    started = time.perf_counter()
    if answer:
        answer()
    latency, clock = time.perf_counter() - started, _Clock()
    started = time.perf_counter()
    generation.generate(
        model,
        tokenizer,
        [prompt],
        Decoding(NEW_TOKENS, prompt_lookup_num_tokens=0),  # each token takes its time
        steering=lambda number: NeverEnd(tokenizer, model.generation_config),
        streamer=clock,
    )
    whole = time.perf_counter() - started
    first, last = clock.times[1], clock.times[-1]  # the one before is the prompt's
    return [latency if answer else whole, first - started, last - first]


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The seconds of `time_rows` in figures: latency's median and 95 % quantile, medians of the others."""
    latency = np.array(seconds["latency"])
    ttft, decode = (float(np.median(seconds[name])) for name in ("ttft", "decode"))
    return {
        "latency_s": {"p50": round(float(np.median(latency)), 6), "p95": round(float(np.percentile(latency, 95)), 6)},
        "ttft_s": round(ttft, 6),
        "tokens_per_s": round((NEW_TOKENS - 1) / decode, 2),
        "speed_rows": len(latency),
        "core_share": round(seconds["core_share"], 3),
    }
