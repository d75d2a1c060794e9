#!/usr/bin/env bash
# torch 2.13.0: torch.optim.Muon orthogonalises in bfloat16 whatever it trains, also on CPUs where that takes 20 times as long.
#
# The weights, gradients and momentum of this example are float32, on a CPU; every product of the optimizer's
# Newton-Schulz iterations is bfloat16 all the same, and no argument changes that. That is what the published
# implementation does for GPUs. On an AMD EPYC without AVX-512 (AVX2, as most laptops have) one orthogonalisation of a
# 128 x 512 matrix took 86 ms of a core, the same products in float32 3.3 ms, and the optimizer was more than half of
# the training of a small model. Nothing is said; autocast does not matter either.
#
# Here the miniature is taught by an optimizer that multiplies in float32 where the CPU has no bfloat16
# (common/training/muon.py).
#
# Seen 2026-11-29 on CPython 3.11, x86-64. The times are printed, not judged. Exits 1 when the data types change.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - >"$folder/seen" 2>"$folder/seconds" <<'PYTHON'
import sys
import time
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)
products = Counter()


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            products[str(result.dtype)] += 1
        return result


weight = torch.nn.Parameter(torch.randn(128, 512))
optimizer = torch.optim.Muon([weight], lr=0.02)
weight.grad = torch.randn(128, 512)
with Watch():
    optimizer.step()
state = optimizer.state[weight]["momentum_buffer"].dtype
print("weight", weight.dtype, "| gradient", weight.grad.dtype, "| momentum", state)
print("products of one step:", dict(products))

started = time.process_time()
for _ in range(5):
    optimizer.step()
print(f"{(time.process_time() - started) / 5 * 1000:.1f} ms a step", file=sys.stderr)
plain = torch.randn(128, 512)
started = time.process_time()
for _ in range(5):
    for _ in range(5):
        gram = plain @ plain.T
        torch.addmm(plain, torch.addmm(gram, gram, gram), plain)
print(f"{(time.process_time() - started) / 5 * 1000:.1f} ms for as many products in float32", file=sys.stderr)
PYTHON
diff "$folder/seen" - <<'SEEN'
weight torch.float32 | gradient torch.float32 | momentum torch.float32
products of one step: {'torch.bfloat16': 15}
SEEN
cat "$folder/seen" "$folder/seconds"
