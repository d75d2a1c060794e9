#!/usr/bin/env bash
# torch 2.13.0: products in bfloat16 on a CPU keep what oneDNN compiled for each number of rows, in two caches of 1,024.
#
# Batches of texts have another number of tokens nearly each time. A loop of products with four matrices of a model of
# 135 million parameters, 60 numbers of rows, grew the process by 790 MB on an Intel Xeon with AMX. Nothing is leaked:
# oneDNN's own cache keeps a primitive for each shape, and so does torch's bridge to it (ideep), so that to bound either
# alone leaves the memory where it is. Both have a variable, ONEDNN_PRIMITIVE_CACHE_CAPACITY
# and LRU_CACHE_CAPACITY; the second is in no documentation of torch. In float32 the products go elsewhere and grow by
# nothing. glibc's heap looks like the culprit and is not: malloc_trim gives none of it back.
#
# Here both keep 128, unless the environment says otherwise (common/cli.py).
#
# Seen 2026-12-01 on CPython 3.11, x86-64 with AMX. Megabytes are printed, and judged by thirds: exits 1 when bounding
# both no longer spares two thirds of the growth, or bounding one does. Without AVX512-BF16 or AMX it has nothing to show.
set -euo pipefail
if ! grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
  echo "this CPU does not multiply in bfloat16"
  exit
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
cat >"$folder/grow.py" <<'PYTHON'
import os
import sys

import torch

torch.set_num_threads(1)
kind = getattr(torch, sys.argv[1])
shapes = ((576, 576), (192, 576), (1536, 576), (576, 1536))
weights = [torch.randn(*shape, dtype=kind) for shape in shapes]


def resident() -> float:
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def products(rows: int) -> None:
    for weight in weights:
        out = torch.nn.functional.linear(torch.randn(rows, weight.shape[1], dtype=kind), weight)
        out @ weight


products(2100)  # the most rows, so that tensors grow nothing later
before = resident()
for number in range(60):
    products(1001 + 17 * number)
print(round(resident() - before))
PYTHON
python=$folder/venv/bin/python
free=$("$python" "$folder/grow.py" bfloat16)
own=$(ONEDNN_PRIMITIVE_CACHE_CAPACITY=16 "$python" "$folder/grow.py" bfloat16)
bridge=$(LRU_CACHE_CAPACITY=16 "$python" "$folder/grow.py" bfloat16)
both=$(ONEDNN_PRIMITIVE_CACHE_CAPACITY=16 LRU_CACHE_CAPACITY=16 "$python" "$folder/grow.py" bfloat16)
float32=$("$python" "$folder/grow.py" float32)
echo "MB more after 60 numbers of rows: $free; oneDNN's cache bounded $own, the bridge's $bridge, both $both; in float32 $float32"
((free > 300 && both * 3 < free && own * 3 > free && bridge * 3 > free && float32 * 3 < free))
