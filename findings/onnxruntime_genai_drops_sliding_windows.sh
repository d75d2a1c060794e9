#!/usr/bin/env bash
# onnxruntime-genai 0.18.0 with transformers 5.23.0, each the newest: what its model builder makes of a Mistral with a sliding
# window breaks beyond the window, or is another model there; a Gemma 3 it cannot build.
#
# The builder asks `config.layer_types` which layers see a window alone. A MistralConfig has a window and no such list, so
# every layer becomes one of full attention, while genai_config.json tells the runtime to keep no more keys than a window
# needs: the first text beyond it ends in an error of GroupQueryAttention. With windowed_kv_cache=false it ends in other
# logits instead, without a word. Of a Gemma 3 the builder asks `rope_local_base_freq` and a flat `rope_parameters`, which
# transformers 5 has no more.
#
# Here the config is spelt out before it is handed to the builder (common/export/genai_writer.py), and keys are kept whole.
#
# Seen 2026-11-30 on CPython 3.11, x86-64. Exits 1 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 onnxruntime-genai==0.18.0 \
  onnxruntime==1.31.1 onnx==1.23.2 onnx-ir==1.1.0
"$folder/venv/bin/python" - "$folder" >"$folder/seen" 2>"$folder/log" <<'PYTHON'
import contextlib
import sys
import tempfile

import numpy as np
import onnxruntime_genai as og
import torch
import transformers
from onnxruntime_genai.models.builder import create_model, parse_extra_options
from tokenizers import Tokenizer, models

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "max_position_embeddings": 128}
SHAPE |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.5}
words = Tokenizer(models.BPE({f"<{number}>": number for number in range(64)}, []))
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<0>", pad_token="<0>")


def build(kind: str, *options: str, **spelt_out):
    """(the model in torch, its folder as the builder writes it)"""
    torch.manual_seed(0)
    source, target = (tempfile.mkdtemp(dir=sys.argv[1]) for _ in range(2))
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **SHAPE)).eval()
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    place = ("", source, target, "fp32", "cpu", f"{target}-cache")
    with contextlib.redirect_stdout(sys.stderr):
        settings = parse_extra_options(*place, ["hf_token=false", *options])
        for name, value in spelt_out.items():
            setattr(settings["hf_details"]["hf_config"], name, value)
        create_model(*place, **settings)
    return model, target


def compare(name: str, model, target: str) -> None:
    ids = np.arange(1, 41, dtype=np.int32)
    parameters = og.GeneratorParams(built := og.Model(target))
    parameters.set_search_options(max_length=100, do_sample=False)
    generator = og.Generator(built, parameters)
    try:
        generator.append_tokens(ids)
    except RuntimeError as error:
        print(f"{name}: 40 tokens with a window of 8 are an error: {str(error).partition('Message: ')[2][:21]} ...")
        return
    with torch.inference_mode():
        expected = model(torch.tensor([ids.tolist()])).logits[0].numpy()
    equal = np.abs(generator.get_output("logits")[0] - expected).max(axis=1) < 1e-3
    print(f"{name}: logits equal torch's at {equal[:8].sum()} of 8 tokens within the window, {equal[8:].sum()} of 32 beyond")


compare("mistral", *build("mistral"))
compare("mistral, windowed_kv_cache=false", *build("mistral", "windowed_kv_cache=false"))
compare("mistral with layer_types", *build("mistral", layer_types=["sliding_attention"] * 2))
try:
    build("gemma3_text")
except (AttributeError, KeyError) as error:
    print(f"gemma3_text: {type(error).__name__}: {error}")
PYTHON
diff "$folder/seen" - <<'SEEN' || { cat "$folder/log"; exit 1; }
mistral: 40 tokens with a window of 8 are an error: total_sequence_length ...
mistral, windowed_kv_cache=false: logits equal torch's at 8 of 8 tokens within the window, 0 of 32 beyond
mistral with layer_types: logits equal torch's at 8 of 8 tokens within the window, 32 of 32 beyond
gemma3_text: KeyError: 'rope_type'
SEEN
cat "$folder/seen"
