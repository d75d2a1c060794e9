#!/usr/bin/env bash
# transformers 5.23.0: AutoModelForCausalLM reads a Qwen3.5 that can be shown images as its language model alone, and what it then
# saves can be shown none; of a Gemma 3 it reads and saves the whole model. Neither says a word.
#
# Both checkpoints have a vision tower, and both are given to the same auto class, as is done to fine-tune on text and to merge
# an adapter. Whether the tower is read is the family's choice: qwen3_5 is mapped to Qwen3_5ForCausalLM, which ignores
# the tensors of images without counting them among the unexpected ones, gemma3 to Gemma3ForConditionalGeneration.
#
# Here a merge takes the tower's tensors from the base's files and keeps its config (common/export/merge.py), so that the
# merged model can be shown images in both families.
#
# Seen 2026-12-01 on CPython 3.11, x86-64. Exits 1 when both families are read alike, or the loss is told.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import logging
import sys
from pathlib import Path

import transformers
from transformers.utils import logging as transformers_logging

folder = Path(sys.argv[1])
transformers_logging.disable_progress_bar()
said: list[str] = []


class Kept(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        said.append(record.getMessage())


transformers_logging.add_handler(Kept())
text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
text |= {"num_key_value_heads": 1, "head_dim": 16}
vision = {"hidden_size": 16, "intermediate_size": 16, "image_size": 28, "patch_size": 14}
vision |= {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
towers = {}
for family in ("Qwen3_5", "Gemma3"):
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision)
    whole = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    whole.save_pretrained(folder / family)
    said.clear()
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder / family, output_loading_info=True)
    model.save_pretrained(folder / f"{family}_again")
    again = transformers.AutoConfig.from_pretrained(folder / f"{family}_again")
    towers[family] = hasattr(again, "vision_config")
    told = [line for line in said if "vis" in line] + [str(key) for key in found["unexpected_keys"]]
    numbers = [sum(weight.numel() for weight in each.parameters()) for each in (whole, model)]
    print(f"{family}: {type(model).__name__} has {numbers[1]:,} of {numbers[0]:,} numbers; saved again it is a")
    print(f"  {again.model_type}; told of: {told or 'nothing'}")
    if told:
        sys.exit(1)
sys.exit(towers != {"Qwen3_5": False, "Gemma3": True})
PYTHON
