#!/usr/bin/env bash
# peft 0.21.2: saving a whole adapter with lora_bias=True warns that its tensors have "invalid shape".
#
# LoraConfig(lora_bias=True) gives every lora_B a bias, a tensor of one dimension. Saving such an adapter warns that
# one-dimensional LoRA tensors are incomplete shards of DeepSpeed ZeRO-3 or FSDP and tells how to gather them, on one
# process and without either. Nothing is missing: it loads without a warning, and the outputs are bit-equal.
#
# Here adapters are made without a bias (common/models/adapters.py), and read with one (common/models/lora_inference.py).
#
# Seen 2026-11-28 with torch 2.13.0, transformers 5.23.0, CPython 3.11, x86-64, CPU. Exits 1 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - "$folder/adapter" >"$folder/seen" <<'PYTHON'
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model


def base() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))


trained = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"], lora_bias=True))
for name, parameter in trained.named_parameters():
    if "lora_" in name:
        torch.nn.init.normal_(parameter)
with warnings.catch_warnings(record=True) as at_saving:
    warnings.simplefilter("always")
    trained.save_pretrained(sys.argv[1])
with warnings.catch_warnings(record=True) as at_loading:
    warnings.simplefilter("always")
    loaded = PeftModel.from_pretrained(base(), sys.argv[1])
for when, caught in (("saving", at_saving), ("loading", at_loading)):
    texts = [str(warning.message) for warning in caught if "lora_B.bias" in str(warning.message)]
    print(when, "says invalid shape:", any("invalid shape" in text for text in texts), end="; ")
    print("says shards were not gathered:", any("shards were not gathered" in text for text in texts))
inputs = torch.randn(3, 8)
print("outputs are equal:", torch.equal(trained.eval()(inputs), loaded.eval()(inputs)))
PYTHON
diff "$folder/seen" - <<'SEEN'
saving says invalid shape: True; says shards were not gathered: True
loading says invalid shape: False; says shards were not gathered: False
outputs are equal: True
SEEN
cat "$folder/seen"
