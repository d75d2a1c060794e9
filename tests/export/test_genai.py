"""Folders for onnxruntime-genai: in its own runtime they equal torch, and say what ends a text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx as onnx_format
import pytest
import torch
from support.exported import LINES, export_run
from support.families import WIDER
from support.label_tasks import AWKWARD, TEXTS

import export_model
import infer_creditmix
from common import cli
from common.cli import UserError
from common.export import genai_writer, parity
from common.models import tokenizers, unproven
from common.models.genai_model import CONFIG_FILE, GenaiModel
from common.models.gguf_file import UNPROVEN_KEY
from common.models.onnx_runtime import is_onnx
from common.models.torch_runtime import TorchRuntime
from common.tasks.ranking.rankers import ranker_of
from common.tasks.ranking.torch_ranker import naive_scores

pytest.importorskip("onnxruntime_genai")
pytestmark = pytest.mark.exports
WINDOW = 8
SLIDING = ["sliding_attention", "full_attention"]
ROPE = {  # other frequencies than the builder takes where it is told of none
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
STRETCHED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES = {
    "llama": {"rope_parameters": STRETCHED | {"original_max_position_embeddings": 64}},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {},
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "sliding_window": WINDOW,
        "layer_types": SLIDING,
        "rope_parameters": ROPE,
    },
}


def build(architecture: str, folder: Path, tokenizer, **more):
    """A model of random weights with that tokenizer, in a folder, too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings = (
        WIDER
        | {"head_dim": 16}
        | tokens
        | FAMILIES[architecture]
        | more
        | {"vocab_size": -(-len(tokenizer) // 32) * 32}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings), dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_it_equals_torch(architecture, tokenizer, tmp_path):
    """Logits of texts within a window and beyond it, scores of labels of many tokens, and greedy text."""
    model = build(architecture, tmp_path / "plain", tokenizer)
    ends = [tokenizer.eos_token_id, 7]
    genai_writer.write(tmp_path / "plain", tmp_path / "genai", "float32", tokenizer, ends, 512)
    exported, reference = GenaiModel(tmp_path / "genai", 256), TorchRuntime(model)
    long = tokenizers.encode_prompt(tokenizer, TEXTS[0])
    for prompt in (long[: WINDOW - 3], long):
        assert np.abs(exported.logits(prompt) - reference.logits(prompt)).max() < 1e-3
        assert exported.generate([prompt], 3 * WINDOW, ends) == reference.generate([prompt], 3 * WINDOW, ends)
        assert exported.generate([prompt], 3 * WINDOW, ()) != []
    expected = naive_scores(model, tokenizer, AWKWARD, TEXTS)
    assert np.abs(ranker_of(exported, tokenizer, AWKWARD).raw_scores(TEXTS) - expected).max() < 1e-3


@pytest.fixture
def plain(tokenizer, tmp_path) -> str:
    """A whole model whose heads the runtime takes."""
    build("qwen2", tmp_path / "plain", tokenizer)
    return str(tmp_path / "plain")


def test_a_proven_folder(plain, dev, tmp_path, capsys):
    """Weights in 4 bits, every stop token in its config, and its use in the card; nothing else here runs it."""
    record = export_run(plain, "onnx_genai", tmp_path / "out", dev, "--max_metric_drop", "1")
    assert record["dtype"] == "int4" and record["runtime"].startswith("onnxruntime-genai ")
    assert 0 < record["proof"]["logits"]["mean_kl"] < 0.5
    assert record["proof"]["prompts_tokenized_alike"] == "48 of 48"
    graph = onnx_format.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False).graph
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) > 4
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    tokenizer = tokenizers.load_tokenizer(str(tmp_path / "out"))
    assert config["model"]["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert config["search"]["do_sample"] is False
    card = (tmp_path / "out" / "README.md").read_text()
    assert "ONNX folder for onnxruntime-genai of" in card and "og.Generator(model" in card and "macro_f1 of" in card
    code = card.partition("onnxruntime-genai:\n\n```python\n")[2].partition("```")[0]
    here = code.replace('og.Model(".")', f"og.Model({str(tmp_path / 'out')!r})")
    exec(compile(here, "card", "exec"), {})
    assert not is_onnx(tmp_path / "out")
    with pytest.raises(UserError, match=r"is an export for onnxruntime-genai, which runs it as its README\.md says"):
        infer_creditmix.main(["--model_dir", str(tmp_path / "out"), "--features", LINES[0]])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", genai_writer.PRECISIONS)
def test_the_bytes_are_known_beforehand(dtype, tied, tokenizer, tmp_path):
    build("qwen2", tmp_path / "plain", tokenizer, tie_word_embeddings=tied)
    genai_writer.write(tmp_path / "plain", tmp_path / "genai", dtype, tokenizer, [0], 512)
    size = (tmp_path / "genai" / "model.onnx.data").stat().st_size
    assert 0.9 < size / genai_writer.predicted_bytes(tmp_path / "plain", dtype) < 1.05
    logits = GenaiModel(tmp_path / "genai", 64).logits([5, 6, 7, 8])
    assert np.isfinite(logits).all()


def test_every_stop_ends_a_text(tokenizer, tmp_path):
    """Also one that the model's files do not name as EOS."""
    model = build("llama", tmp_path / "plain", tokenizer)
    prompt = tokenizers.encode_prompt(tokenizer, TEXTS[0])
    (free,) = TorchRuntime(model).generate([prompt], 6, ())
    genai_writer.write(
        tmp_path / "plain", tmp_path / "genai", "float32", tokenizer, [tokenizer.eos_token_id, free[3]], 512
    )
    (answer,) = GenaiModel(tmp_path / "genai", 256).generate([prompt], 6, {tokenizer.eos_token_id})
    assert answer == free[: free.index(free[3])]


def test_one_without_a_proof(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "Measurement", None)
    argv = ["--model_dir", plain, "--format", "onnx_genai", "--save_dir", str(tmp_path / "out"), "--no_proof"]
    assert export_model.main([*argv, "--dtype", "float32"]) == cli.DONE
    assert unproven.is_unproven(tmp_path / "out")
    assert "**Unproven.**" in (tmp_path / "out" / "README.md").read_text()
    model = onnx_format.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False)
    assert [entry.value for entry in model.metadata_props if entry.key == UNPROVEN_KEY] == ["true"]
    GenaiModel(tmp_path / "out", 64).logits([5, 6])  # the weights beside it are still its own


def test_other_tokens_are_refused(plain, dev, tmp_path, monkeypatch):
    monkeypatch.setattr(GenaiModel, "tokenize", lambda self, text: [1, 2, 3])
    argv = ["--model_dir", plain, "--format", "onnx_genai", "--save_dir", str(tmp_path / "out"), "--proof_data", dev]
    with pytest.raises(UserError, match="onnxruntime-genai reads other tokens than the model was trained on"):
        export_model.main(argv)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_what_the_runtime_would_not_run_is_refused_beforehand(run, dev, tokenizer, tmp_path):
    scaled = ROPE | {"full_attention": ROPE["full_attention"] | {"rope_type": "linear", "factor": 8.0}}
    build("gemma3_text", tmp_path / "gemma", tokenizer, rope_parameters=scaled)
    for model_dir, said in (
        (str(tmp_path / "gemma"), r"of the kind default in gemma3_text, and those of .* are linear; use --format onnx"),
        (run, r"is for attention heads of a multiple of 16 numbers, and those of .* have 8; use --format onnx"),
    ):
        argv = ["--model_dir", model_dir, "--format", "onnx_genai", "--save_dir", str(tmp_path / "out")]
        with pytest.raises(UserError, match=said):
            export_model.main([*argv, "--proof_data", dev])


def test_what_the_builder_cannot_do_is_one_sentence(plain, dev, tmp_path, monkeypatch):
    import onnxruntime_genai.models.builder as builder

    def fail(*args, **options):
        raise NotImplementedError("The ours model is not currently supported.\nmore")

    monkeypatch.setattr(builder, "create_model", fail)
    argv = ["--model_dir", plain, "--format", "onnx_genai", "--save_dir", str(tmp_path / "out"), "--proof_data", dev]
    with pytest.raises(
        UserError, match=r"builder cannot write .* \(The ours model is not currently supported\.\); use "
    ):
        export_model.main(argv)
