"""One script of a checkout of this repository, and what it cost: a process for checkouts.py.

    python bench/harness/run_script.py CHECKOUT sft_train --student ...

Says what it found as a line of JSON on standard output, last. It calls only what checkouts of before have, too.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any


def run(script: str, argv: Sequence[str]) -> dict[str, Any]:
    """Run a script's main.

    Returns:
        "seconds" and "cpu_seconds" of all of it, imports aside; "steps", (seconds, CPU seconds) of each forward and
        backward pass of a Trainer; "peak_bytes", the most that was resident.
    """
    from transformers import Trainer

    main = importlib.import_module(script).main
    steps: list[tuple[float, float]] = []
    training_step = Trainer.training_step

    def timed(*args: Any, **given: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = training_step(*args, **given)
        steps.append((time.perf_counter() - wall, time.process_time() - cpu))
        return loss

    Trainer.training_step = timed
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        main(list(argv))
    finally:
        Trainer.training_step = training_step
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "steps": steps,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    found = run(sys.argv[2], sys.argv[3:])
    print(json.dumps(found))
