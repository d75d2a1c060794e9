#!/usr/bin/env bash
# torch 2.13.0: on a CPU, softmax of bfloat16 takes nearly twice as long for 117 columns as for 128, and the maximum of a
# row, too.
#
# Attention maps have as many columns as there are tokens, seldom a multiple of 32. With 48 maps of 204 rows, softmax took
# 2.3 ms of an Intel Xeon with AMX for 117 columns and 1.2 for 128, though those are more numbers; the maximum of each row
# took 2.1 and 0.8. In float32 it was 1.2 and 1.05, 0.64 and 0.36. So eleven columns of minus infinity in front of the
# scores are cheaper than their absence.
#
# Here the sequences of a batch are so long that its maps have a multiple of 32 columns (common/training/tree_attention.py).
#
# Seen 2026-12-01 on CPython 3.11, x86-64. Times are of the processor, medians of rounds in turn, and only a ratio is
# judged: exits 1 when 117 columns no longer take 1.4 times as long as 128 in softmax of bfloat16.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time
from statistics import median

import torch

torch.set_num_threads(1)
operations = {"softmax": lambda scores: scores.softmax(-1), "maximum": lambda scores: scores.amax(-1)}
maps = {
    (kind, columns): torch.randn(48, 204, columns, dtype=kind)
    for kind in (torch.bfloat16, torch.float32)
    for columns in (117, 128)
}
seconds: dict[tuple, list[float]] = {}
for _ in range(60):
    for name, operation in operations.items():
        for (kind, columns), scores in maps.items():
            start = time.process_time()
            operation(scores)
            seconds.setdefault((name, kind, columns), []).append(time.process_time() - start)
ratios = {}
for name in operations:
    for kind in (torch.bfloat16, torch.float32):
        few, more = (1e3 * median(seconds[name, kind, columns]) for columns in (117, 128))
        ratios[name, kind] = few / more
        print(f"{name} in {kind}: 117 columns {few:.2f} ms, 128 columns {more:.2f} ms, ratio {few / more:.2f}")
sys.exit(ratios["softmax", torch.bfloat16] < 1.4)
PYTHON
