"""A pretrained Gemma 3, read from its GGUF and written again: the file that llama.cpp's own tools made of it.

REAL_MODELS names the folder that has gemma3-270m.gguf, in Q4_K_M.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from common.export import gguf_writer
from common.models import gguf_import, tokenizers
from common.models.gguf_file import GgufFile
from common.models.gguf_model import GgufModel

FILE = Path(os.environ.get("REAL_MODELS", "/nowhere"), "gemma3-270m.gguf")
WINDOW, TOKENS = 512, 700
TEXT = "".join(Path(__file__).parents[2].joinpath("docs", name).read_text() for name in ("gguf.md", "export.md"))

pytestmark = [pytest.mark.exports, pytest.mark.skipif(not FILE.is_file(), reason="REAL_MODELS has no gemma3-270m")]
pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGUF_CACHE", str(tmp_path_factory.mktemp("cache")))
        return gguf_import.model_folder(str(FILE))


@pytest.fixture(scope="module")
def expected(folder) -> tuple[list[int], np.ndarray]:
    """The ids of a text, and torch's logits where more than the window lies behind them."""
    ids = tokenizers.load_tokenizer(folder).encode(TEXT)[:TOKENS]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return ids, model(torch.tensor([ids]), logits_to_keep=TOKENS - WINDOW).logits[0].numpy()


@pytest.mark.parametrize(("quant", "agreeing"), [("F16", 0.98), ("Q8_0", 0.9), ("Q4_K_M", 0.9)])
def test_behind_its_window(quant, agreeing, folder, expected, tmp_path):
    """The likeliest tokens are torch's; keys, tokens and types are those of the file that it came from."""
    tokenizer, path = tokenizers.load_tokenizer(folder), tmp_path / "model.gguf"
    stops = tokenizers.stop_ids(tokenizer, GenerationConfig.from_pretrained(folder))
    gguf_writer.write(folder, path, quant, tokenizer, stops)
    original, written = GgufFile(FILE), GgufFile(path)
    assert gguf_writer.predicted_bytes(folder, quant) == sum(tensor.size for tensor in written.tensors.values())
    own = {key: value for key, value in original.values.items() if key.startswith(("gemma3.", "tokenizer."))}
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.add_sep_token"):  # in another unit; of no use
        own.pop(key)
    assert {key: written.get(key) for key in own} == own
    if quant == "Q4_K_M":
        kinds, others = ({name: at.kind for name, at in file.tensors.items()} for file in (original, written))
        assert kinds == others
    ids, logits = expected
    model = GgufModel(path, TOKENS)
    assert model.tokenize(TEXT) == tokenizer.encode(TEXT, add_special_tokens=False)
    found = model.after(0, ids, TOKENS - WINDOW)
    model.close()
    assert (found.argmax(axis=1) == logits.argmax(axis=1)).mean() > agreeing
