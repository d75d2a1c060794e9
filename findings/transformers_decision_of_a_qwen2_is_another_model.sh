#!/usr/bin/env bash
# transformers 5.23.0: AutoModelForDecision takes a Qwen2 for JevForDecision, a model of 7.9 billion parameters.
#
# pipeline("decision") is documented with a plain Qwen2.5 by its Hub id, which it scores by the logits of its labels.
# The auto class behind it has another answer for the model type "qwen2": JevForDecision, whose config is JevConfig. A
# config of Qwen2 does not fit it (from_config raises AttributeError), and JevConfig's own defaults, which stand in for
# what a Qwen2 folder does not say, are a Qwen3.5 of 7.9 billion parameters. Whoever wants the labels of a folder's own
# model scored has to load it (AutoModelForCausalLM) and hand the model over.
#
# Here docs/decisions.md has the model loaded first.
#
# Seen 2026-11-29 with torch 2.13.0, CPython 3.11, x86-64, on the meta device: nothing is allocated. Exits 1 when a
# later release prints something else.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.23.0 torch==2.13.0
"$folder/venv/bin/python" - >"$folder/seen" 2>"$folder/log" <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, AutoModelForDecision, Qwen2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_DECISION_MAPPING
from transformers.models.jev.configuration_jev import JevConfig

small = Qwen2Config(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=1)


def parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


with torch.device("meta"):
    print("a small Qwen2:", parameters(AutoModelForCausalLM.from_config(small)), "parameters")
    decides = MODEL_FOR_DECISION_MAPPING[Qwen2Config]
    print("AutoModelForDecision:", decides.__name__)
    try:
        AutoModelForDecision.from_config(small)
    except AttributeError as error:
        print(f"from_config: AttributeError, {str(error).partition('.')[0]}")
    whole = decides(JevConfig())
    print("by default:", whole.config.text_config.model_type, "of", parameters(whole), "parameters")
PYTHON
diff "$folder/seen" - <<'SEEN' || { cat "$folder/log" >&2; exit 1; }
a small Qwen2: 4432 parameters
AutoModelForDecision: JevForDecision
from_config: AttributeError, 'Qwen2Config' object has no attribute 'text_config'
by default: qwen3_5_text of 7936782872 parameters
SEEN
cat "$folder/seen"
