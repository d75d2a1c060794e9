"""GGUF exports: read by llama.cpp they equal transformers, and Ollama's template is the chat template."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
from support.exported import AWKWARD, LINES, STORIES, export_run, stories

from common.cli import UserError
from common.export import gguf_writer
from common.models import loading as models
from common.models.gguf_runtime import GgufModel
from common.models.source import ModelSource
from common.tasks.ranking.rankers import ranker_of
from common.tasks.ranking.torch_ranker import TorchRanker

pytestmark = pytest.mark.exports


def test_modelfile(tokenizer):
    """Ollama's template filled in gives the text that the chat template gives."""
    text = gguf_writer.modelfile(tokenizer, "model-F16.gguf", ["<|im_end|>", "<|endoftext|>"])
    assert text.startswith("FROM ./model-F16.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n' in text
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    default = re.search(r'SYSTEM """(.*?)"""', text, re.DOTALL)

    def ollama(system: str, prompt: str) -> str:
        with_system = re.sub(r"{{ if .System }}(.*?){{ end }}", r"\1" if system else "", template, flags=re.DOTALL)
        asked = with_system.partition("{{ .Response }}")[0]
        return asked.replace("{{ .System }}", system).replace("{{ .Prompt }}", prompt)

    for system in ("", "Be brief."):
        turns = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": "Hi"}]
        expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert ollama(system or (default[1] if default else ""), "Hi") == expected
    assert template.endswith("{{ .Response }}<|im_end|>\n")


@pytest.mark.parametrize("quant", ["F16", "Q8_0"])
def test_gguf_in_llama_cpp(quant, run, dev, tmp_path):
    pytest.importorskip("llama_cpp")
    record = export_run(run, "gguf", tmp_path / "gguf", dev, "--quant", quant, "--max_metric_drop", "1")
    assert {"Modelfile", "tokenizer.json", f"model-{quant}.gguf"} <= set(record["files"])
    proof = record["proof"]
    assert proof["prompts_tokenized_alike"] == "48 of 48"
    assert proof["logits"]["mean_kl"] < (1e-5 if quant == "F16" else 1e-2)
    if quant == "F16":
        assert proof["generated"]["prompts"] == proof["generated"]["equal"] == 20
    model, tokenizer = models.load_for_inference(ModelSource(run, dtype="float32"))
    exported = GgufModel(tmp_path / "gguf" / f"model-{quant}.gguf", 256)
    expected = TorchRanker(model, tokenizer, AWKWARD).raw_scores(LINES[:4])
    found = ranker_of(exported, tokenizer, AWKWARD).raw_scores(LINES[:4])
    exported.close()
    assert np.abs(found - expected).max() < (0.02 if quant == "F16" else 0.5)


@pytest.mark.skipif(not STORIES.is_dir(), reason="the pretrained model is not there")
@pytest.mark.parametrize("quant", ["F16", "Q8_0"])
def test_a_pretrained_model(quant, tmp_path):
    """Of weights that nobody here made, and of the other architecture and kind of tokenizer."""
    pytest.importorskip("llama_cpp")
    proof = export_run(str(STORIES), "gguf", tmp_path / "gguf", stories(tmp_path), "--quant", quant)["proof"]
    assert proof["prompts_tokenized_alike"] == "3 of 3"
    assert proof["logits"]["mean_kl"] < (1e-4 if quant == "F16" else 0.05)
    if quant == "F16":
        assert proof["generated"]["equal"] == proof["generated"]["prompts"] == 3


def test_gguf_without_llama_cpp(run, dev, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UserError, match=r"pip install -r requirements/export.txt"):
        export_run(run, "gguf", tmp_path / "gguf", dev)
    assert list(tmp_path.iterdir()) == []
