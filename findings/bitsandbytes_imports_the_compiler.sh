#!/usr/bin/env bash
# bitsandbytes 0.50.2 with torch 2.13.0: importing it imports TorchInductor, and so does importing peft beside it.
#
# torch.compile is lazy: a decorated function is compiled at its first call. But to decorate one imports the compiler
# (torch._inductor, torch._dynamo, sympy), some 1,400 modules, where torch itself has 1,100. bitsandbytes decorates four functions of
# its "default" backend, which only devices without kernels of their own use, when it is imported; and peft imports
# bitsandbytes wherever it is installed, 4 bits or not. A program that loads a LoRA adapter on a CPU pays 2 to 3 s of a
# core for a compiler that it never calls.
#
# Here flags are parsed before anything imports peft (common/cli.py); what loads a model pays.
#
# Seen 2026-11-29 with peft 0.21.2, transformers 5.23.0, CPython 3.11, x86-64, CPU. Exits 1 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 \
  bitsandbytes==0.50.2
cat >"$folder/look.py" <<'PYTHON'
import importlib
import sys

import torch

own = set(sys.modules)
importlib.import_module(sys.argv[1])
compiler = {"torch._inductor.compile_fx", "torch._dynamo.symbolic_convert", "sympy"} - own
print(sys.argv[1], "imports the compiler:", compiler <= sys.modules.keys())
PYTHON
{
  "$folder/venv/bin/python" "$folder/look.py" bitsandbytes
  "$folder/venv/bin/python" "$folder/look.py" peft
  "$folder/venv/bin/pip" uninstall -q -y bitsandbytes
  "$folder/venv/bin/python" "$folder/look.py" peft
} >"$folder/seen" 2>"$folder/errors"
diff "$folder/seen" - <<'SEEN'
bitsandbytes imports the compiler: True
peft imports the compiler: True
peft imports the compiler: False
SEEN
cat "$folder/seen"
