#!/usr/bin/env bash
# torch 2.13.0: on a CPU, set_flush_denormal(True) is a switch of the thread that calls it. Workers that began before keep
# denormal numbers, workers that begin later drop them.
#
# The documentation speaks of denormal floating numbers on the CPU, without a word on threads, and True is returned. With two threads
# a million numbers of 1e-40 times 1 are half zeros and half 1e-40, a matrix product likewise; after set_num_threads(1)
# all are zeros. Where the switch is the first thing that a process does, before anything ran in parallel, its workers
# begin with it, and all numbers are zeros. So the same line changes a result or its first half, by what ran before it.
#
# Here it is not set: results would depend on the number of threads and on what ran before, and a training step of a real
# base has no denormal numbers to lose time with (docs/results.md).
#
# Seen 2026-12-01 on CPython 3.11, x86-64. Exits 1 when a late switch flushes all numbers, or an early one does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
count() { # count early|late: numbers that stay denormal, of a product of each kind
  "$folder/venv/bin/python" - "$1" <<'PYTHON'
import sys

import torch

torch.set_num_threads(2)
early = sys.argv[1] == "early"
if early:
    assert torch.set_flush_denormal(True)
bits = torch.full((1 << 20,), 71362, dtype=torch.int32)  # those of 1e-40; filled in parallel, which makes the workers
numbers = bits.view(torch.float32)
if not early:
    assert torch.set_flush_denormal(True)
left, right = torch.full((512, 512), 1e-30), torch.full((512, 512), 1e-10)


def denormal(tensor: torch.Tensor) -> int:
    return int((tensor.view(torch.int32) != 0).sum())


kept = denormal(numbers * 1.0), denormal(left @ right)
torch.set_num_threads(1)
print(*kept, denormal(numbers * 1.0))
PYTHON
}
read -r late late_product late_alone < <(count late)
read -r early early_product _ < <(count early)
echo "switched on after a parallel operation: $late of 1048576 stay denormal, $late_product of 262144 of a matrix product;"
echo "  with one thread then $late_alone"
echo "switched on before: $early and $early_product"
((late == 524288 && late_product > 0 && late_alone == 0 && early == 0 && early_product == 0))
