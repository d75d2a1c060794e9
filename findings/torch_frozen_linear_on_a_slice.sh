#!/usr/bin/env bash
# torch 2.13.0: freezing a Linear layer makes it slower on a sliced input: one product a row in place of one in all.
#
# torch.nn.Linear multiplies [rows, 1, width] by its weight as one matrix product ("mm") where the weight may be
# trained or the input is contiguous. With requires_grad=False and an input that was cut out of longer rows, as
# `logits_to_keep=1` does before a language model's head, it becomes a batch of products ("bmm"), one a row, also under
# no_grad, where requires_grad has no meaning. 16 rows of 576 by a head of 49,152 tokens took 2.6 s in place of 0.5 s of
# one core; the results are equal within rounding. `.contiguous()` behind the slice is the way round it.
#
# Here a hook before the head does so (common/models/heads.py).
#
# Seen 2026-11-29 with torch 2.13.0, CPython 3.11, x86-64, CPU. Exits 1 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - >"$folder/seen" 2>"$folder/log" <<'PYTHON'
import torch
from torch.profiler import ProfilerActivity, profile

head = torch.nn.Linear(512, 32000, bias=False)
whole = torch.randn(16, 64, 512)
results = []
for frozen in (False, True):
    head.weight.requires_grad_(not frozen)
    for name, states in (("a slice", whole[:, -1:]), ("its copy", whole[:, -1:].contiguous())):
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
            results.append(head(states))
        kind = {event.key for event in seen.key_averages()} & {"aten::mm", "aten::bmm"}
        print("frozen  " if frozen else "trained ", name, *sorted(kind))
print("equal:", all(torch.allclose(results[0], other, atol=1e-4) for other in results))
PYTHON
diff "$folder/seen" - <<'SEEN' || { cat "$folder/log"; exit 1; }
trained  a slice aten::mm
trained  its copy aten::mm
frozen   a slice aten::bmm
frozen   its copy aten::mm
equal: True
SEEN
cat "$folder/seen"
