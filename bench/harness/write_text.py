"""Answers of one checkout of this repository to some prompts, and what they cost: a process for text_generation.py.

    python bench/harness/write_text.py CHECKOUT < settings.json

Says what it found as a line of JSON on standard output. It calls only what checkouts of before have, too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any


def write(settings: dict[str, Any]) -> dict[str, Any]:
    """Write code for `settings["tasks"]`, or with "schema" JSON, with the model in "model_dir".

    Returns:
        "seconds" and "cpu_seconds" without loading and a warm-up; "prompt_cpu_seconds", those of them that the passes
        over prompts took; "steps", forward passes that went on with some rows,
        "rows", summed over them, and "step_tokens", those that they read; "prompt_passes", the others; "tokens"; and
        the "texts".
    """
    from common.models import loading
    from common.models.source import ModelSource

    model, tokenizer = loading.load_for_inference(ModelSource(settings["model_dir"], dtype=settings["dtype"]))
    tasks, answers = settings["tasks"], (extractions if settings["schema"] else programs)(model, tokenizer, settings)
    answers(tasks[:2], 64 if settings["schema"] else 4)
    steps: list[tuple[int, int]] = []
    prompts: list[tuple[int, int]] = []
    began: list[float | None] = []  # each pass over a prompt
    of_prompts: list[float] = []  # CPU seconds

    def begin(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        cache = given.get("past_key_values")
        reads_on = cache is not None and cache.get_seq_length() > 0
        (steps if reads_on else prompts).append((len(given["attention_mask"]), given["input_ids"].numel()))
        began.append(None if reads_on else time.process_time())

    def end(module: Any, args: tuple[Any, ...], output: Any) -> None:
        if began[-1] is not None:
            of_prompts.append(time.process_time() - began[-1])

    model.register_forward_pre_hook(begin, with_kwargs=True)
    model.register_forward_hook(end)
    wall, cpu = time.perf_counter(), time.process_time()
    written = answers(tasks, settings["max_new_tokens"])
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "prompt_cpu_seconds": sum(of_prompts),
        "steps": len(steps),
        "rows": sum(rows for rows, _ in steps),
        "step_tokens": sum(tokens for _, tokens in steps),
        "prompt_passes": len(prompts),
        "tokens": sum(tokens for _, tokens in written),
        "texts": [text for text, _ in written],
    }


def programs(model: Any, tokenizer: Any, settings: dict[str, Any]) -> Callable[[list[str], int], list[tuple[str, int]]]:
    """What writes code for tasks, within a budget: (text, tokens) of each answer."""
    from common.generation import generate as generation
    from common.generation.decoding import Decoding
    from common.models import tokenizers
    from common.tasks.codegen import answer, prompt

    def write(tasks: list[str], budget: int) -> list[tuple[str, int]]:
        names = [prompt.names_asked_for(task) for task in tasks]
        written = generation.generate(
            model,
            tokenizer,
            [tokenizers.encode_prompt(tokenizer, task) for task in tasks],
            Decoding(budget, **settings["decoding"]),
            stop=lambda number, text: answer.answer_ends(text, names[number]),
            max_batch_tokens=settings["max_batch_tokens"],
        )
        return [(answered.text, len(answered.tokens)) for (answered,) in written]

    return write


def extractions(
    model: Any, tokenizer: Any, settings: dict[str, Any]
) -> Callable[[list[str], int], list[tuple[str, int]]]:
    """What extracts fields from documents: (text, tokens) of each answer."""
    from common.generation import json_schema
    from common.models.source import LoadedModel
    from common.tasks.idp.extractor import ExtractionSettings, Extractor

    schema = settings["schema"]

    def write(documents: list[str], budget: int) -> list[tuple[str, int]]:
        loaded = LoadedModel(model, tokenizer, settings["max_batch_tokens"])
        how = ExtractionSettings(budget, on_cut="flag", **settings["decoding"])
        extractor = Extractor(loaded, schema, json_schema.preflight(schema), how)
        return [(read.text, read.tokens) for read in extractor.extract(documents, settings["confidence"])]

    return write


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    print(json.dumps(write(json.load(sys.stdin))))
