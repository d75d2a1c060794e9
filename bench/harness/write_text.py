"""Answers of one checkout of this repository to some prompts, and what they cost: a process for text_generation.py.

    python bench/harness/write_text.py CHECKOUT < settings.json

Says what it found as a line of JSON on standard output. It calls only what checkouts of before have, too.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def write(settings: dict[str, Any]) -> dict[str, Any]:
    """Write code for `settings["tasks"]` with the model in "model_dir".

    Returns:
        "seconds" and "cpu_seconds" without loading and a warm-up; "steps", forward passes that wrote a token of each
        of some rows, and "rows", summed over them; "prompt_passes", the others; "tokens"; and the "texts".
    """
    from common.generation import generate as generation
    from common.generation.decoding import Decoding
    from common.models import loading, tokenizers
    from common.models.source import ModelSource
    from common.tasks.codegen import answer, prompt

    model, tokenizer = loading.load_for_inference(ModelSource(settings["model_dir"], dtype=settings["dtype"]))
    tasks = settings["tasks"]
    prompts = [tokenizers.encode_prompt(tokenizer, task) for task in tasks]
    names = [prompt.names_asked_for(task) for task in tasks]

    def answers(count: int, budget: int) -> list[Any]:
        return generation.generate(
            model,
            tokenizer,
            prompts[:count],
            Decoding(budget),
            stop=lambda number, text: answer.answer_ends(text, names[number]),
            max_batch_tokens=settings["max_batch_tokens"],
        )

    answers(2, 4)
    shapes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    wall, cpu = time.perf_counter(), time.process_time()
    written = [answered for (answered,) in answers(len(prompts), settings["max_new_tokens"])]
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    steps = [rows for rows, columns in shapes if columns == 1]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "steps": len(steps),
        "rows": sum(steps),
        "prompt_passes": len(shapes) - len(steps),
        "tokens": sum(len(answered.tokens) for answered in written),
        "texts": [answered.text for answered in written],
    }


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    print(json.dumps(write(json.load(sys.stdin))))
