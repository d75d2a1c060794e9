#!/usr/bin/env bash
# transformers 5.23.0: the class named in tokenizer_config.json replaces what tokenizer.json says of its pipeline.
#
# A byte-level tokenizer saved without a normalizer reads "e" + combining acute (U+0065 U+0301) as its own bytes, and
# decoding gives them back. With "tokenizer_class": "Qwen2Tokenizer" beside the same tokenizer.json, AutoTokenizer builds
# the class's own pipeline: an NFC normalizer appears, the ids are those of the composed letter, and decoding no longer
# gives the text back. llama.cpp normalizes nothing for a qwen2 GGUF, so a folder made of one and a llama.cpp that reads
# it disagree on such text unless the class is left out of the config.
#
# Here the tokenizer of a GGUF names no class of a model (common/models/gguf_tokenizer.py).
#
# Seen 2026-11-28 with tokenizers 0.23.3, CPython 3.11, x86-64. Exits 1 when a later release prints something else.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder/tokenizer" >"$folder/seen" 2>"$folder/log" <<'PYTHON'
import json
import sys
import unicodedata
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

folder = Path(sys.argv[1])
alphabet = pre_tokenizers.ByteLevel.alphabet()
plain = Tokenizer(models.BPE())
plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
plain.decoder = decoders.ByteLevel()
plain.train_from_iterator(["plain text"], trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=300, show_progress=False))
PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(folder)
text = unicodedata.normalize("NFD", "\u00e9")


def show(what: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    print(f"{what}: {len(ids)} ids, normalizer {tokenizer.backend_tokenizer.normalizer}, "
          f"text comes back: {tokenizer.decode(ids) == text}")


show("as saved")
settings = folder / "tokenizer_config.json"
settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}))
show("named Qwen2Tokenizer")
print("tokenizer.json still says:", json.loads((folder / "tokenizer.json").read_text())["normalizer"])
PYTHON
diff "$folder/seen" - <<'SEEN' || { cat "$folder/log" >&2; exit 1; }
as saved: 3 ids, normalizer None, text comes back: True
named Qwen2Tokenizer: 2 ids, normalizer NFC(), text comes back: False
tokenizer.json still says: None
SEEN
cat "$folder/seen"
