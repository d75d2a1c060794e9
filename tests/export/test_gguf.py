"""GGUF exports: read by llama.cpp they equal transformers, in every quantisation, as whole models and as adapters."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from support.exported import AWKWARD, LINES, STORIES, export_run, stories
from support.models import build_base
from support.served import make_run
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as bpe
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import export_model
from common import cli
from common.cli import UserError
from common.data import task_record
from common.export import parity
from common.export.formats import QUANTS
from common.export.gguf_quants import Mixture, quantize
from common.export.gguf_vocabulary import pre_tokenizer_name
from common.export.importance import importance_of
from common.models import chats, gguf_import, llama_cpp
from common.models import loading as models
from common.models.gguf_model import GgufModel
from common.models.source import ModelSource
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.rankers import ranker_of
from common.tasks.ranking.torch_ranker import TorchRanker

pytestmark = pytest.mark.exports


# Files beside the weights.


def test_every_stop_token_survives(tmp_path, tokenizer, dev):
    """Of a base with two: in the merged folder's settings, in the Modelfile, and as llama.cpp sees the file."""
    pytest.importorskip("xllamacpp")
    base = Path(build_base(tmp_path / "base", tokenizer, embeddings=0.3))
    other = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert other not in (tokenizer.eos_token_id, tokenizer.pad_token_id)
    settings = json.loads((base / "generation_config.json").read_text())
    settings["eos_token_id"] = [tokenizer.eos_token_id, other]
    (base / "generation_config.json").write_text(json.dumps(settings))
    run = str(make_run(tmp_path / "run", str(base), seed=1))
    export_run(run, "merged", tmp_path / "merged", dev)
    merged = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert merged["eos_token_id"] == [tokenizer.eos_token_id, other]
    export_run(run, "gguf", tmp_path / "gguf", dev, "--max_metric_drop", "1")
    stops = {tokenizer.eos_token_id, other, tokenizer.pad_token_id}
    written = (tmp_path / "gguf" / "Modelfile").read_text()
    assert all(f"PARAMETER stop {json.dumps(token)}\n" in written for token in tokenizer.convert_ids_to_tokens(stops))
    model = GgufModel(tmp_path / "gguf" / "model-Q8_0.gguf", 64)
    assert {tokenizer.eos_token_id, other} <= model.ends()
    model.close()


def test_stops_that_a_gguf_has_no_place_for_are_named(tmp_path, tokenizer, capsys):
    base = Path(build_base(tmp_path / "base", tokenizer))
    settings = json.loads((base / "generation_config.json").read_text())
    words = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids][50:54]
    settings["eos_token_id"] = [tokenizer.eos_token_id, *words]
    (base / "generation_config.json").write_text(json.dumps(settings))
    argv = ["--model_dir", str(base), "--format", "gguf", "--save_dir", str(tmp_path / "gguf"), "--no_proof"]
    assert export_model.main(argv) == cli.DONE
    names = tokenizer.convert_ids_to_tokens(words)
    assert f"a GGUF has no place for {names[2]}, {names[3]}, at which answers end" in capsys.readouterr().err
    written = (tmp_path / "gguf" / "Modelfile").read_text()
    assert all(f"PARAMETER stop {json.dumps(name)}\n" in written for name in names)
    fields = gguf.GGUFReader(tmp_path / "gguf" / "model-Q8_0.gguf").fields
    assert [fields[f"tokenizer.ggml.{key}_token_id"].contents() for key in ("eot", "eom")] == words[:2]
    read, _ = models.load_gguf(ModelSource(gguf_import.packed_folder(str(tmp_path / "gguf")), engine="llama_cpp"), 64)
    with contextlib.closing(read):
        assert read.generation_config.eos_token_id == [tokenizer.eos_token_id, *words]


def test_a_file_alone_tells_its_task(tmp_path, base, dev, monkeypatch):
    """What a run was trained for goes into the GGUF, and comes out where the file is a model again."""
    pytest.importorskip("xllamacpp")
    monkeypatch.setenv("GGUF_CACHE", str(tmp_path / "cache"))
    run = Path(make_run(tmp_path / "run", base, seed=1))
    task_record.write(run, CREDITMIX.record())
    export_run(str(run), "gguf", tmp_path / "gguf", dev, "--max_metric_drop", "1")
    alone = shutil.copy(tmp_path / "gguf" / "model-Q8_0.gguf", tmp_path / "alone.gguf")
    assert task_record.read(gguf_import.model_folder(str(alone))) == CREDITMIX.record()


# Kinds of tensors.


def test_a_mixture_keeps_more_bits_where_llama_cpp_does():
    """Of 8 layers the first eighth, the last eighth and every third between; heads and the fallbacks of odd rows."""
    mixture = Mixture("Q4_K_M", 8, tied=False)
    kinds = [mixture.kind_of(f"blk.{layer}.attn_v.weight", (64, 256)).name for layer in range(8)]
    assert kinds == ["Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K"]
    assert [mixture.kind_of(f"blk.{layer}.ffn_down.weight", (64, 256)).name for layer in range(2)] == ["Q6_K", "Q4_K"]
    assert mixture.kind_of("output.weight", (64, 256)).name == "Q6_K"
    assert mixture.kind_of("token_embd.weight", (64, 256)).name == "Q4_K"
    assert Mixture("Q5_K_M", 8, tied=True).kind_of("token_embd.weight", (64, 256)).name == "Q6_K"
    assert mixture.kind_of("blk.0.attn_q.weight", (64, 96)).name == "Q5_0"  # no blocks of 256
    assert Mixture("Q5_K_M", 8, tied=False).kind_of("blk.0.attn_q.weight", (64, 96)).name == "Q5_1"
    assert Mixture("Q6_K", 8, tied=False).kind_of("blk.0.attn_q.weight", (64, 96)).name == "Q8_0"
    assert Mixture("Q8_0", 8, tied=False).kind_of("blk.0.attn_q.weight", (64, 24)).name == "F16"
    assert mixture.kind_of("blk.0.attn_norm.weight", (256,)).name == "F32"


@pytest.mark.parametrize(
    ("kind", "error"),
    [("BF16", 0.004), ("Q8_0", 0.006), ("Q6_K", 0.03), ("Q5_K", 0.05), ("Q4_K", 0.1), ("Q5_0", 0.06), ("Q5_1", 0.06)],
)
def test_quantised_weights_are_near(kind, error):
    """Read back by the gguf package, in the root mean square of what they stand for."""
    pytest.importorskip("xllamacpp")
    array = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[kind]
    back = gguf.quants.dequantize(quantize(array, kind), kind)
    relative = np.sqrt(np.square(back - array).mean() / np.square(array).mean())
    assert error / 10 < relative < error


def test_importance_moves_errors_to_where_they_count_less():
    pytest.importorskip("xllamacpp")
    rng = np.random.default_rng(0)
    array, importance = rng.normal(size=(32, 512)).astype(np.float32), np.where(np.arange(512) % 8, 0.01, 10.0)
    kind = gguf.GGMLQuantizationType.Q4_K

    def weighted(result: np.ndarray) -> float:
        return float((np.square(gguf.quants.dequantize(result, kind) - array) * importance).mean())

    assert weighted(quantize(array, kind, importance)) < 0.7 * weighted(quantize(array, kind))


def test_importance_is_the_mean_square_of_a_layers_inputs(tiny_base, tokenizer):
    rows = [chats.encode(tokenizer, text, "Good") for text in LINES[:3]]
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    seen = []
    layer = model.model.layers[1].self_attn.q_proj
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        for row in rows:
            model(torch.tensor([row.input_ids]))
    handle.remove()
    found = importance_of(Path(tiny_base), rows)["model.layers.1.self_attn.q_proj.weight"]
    assert found == pytest.approx(torch.cat(seen).square().mean(dim=0).numpy(), rel=1e-4)


# In llama.cpp.


@pytest.mark.parametrize("quant", QUANTS)
def test_gguf_in_llama_cpp(quant, run, dev, tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp")
    if quant == "F16":
        monkeypatch.undo()  # a whole proof
    record = export_run(run, "gguf", tmp_path / "gguf", dev, "--quant", quant, "--max_metric_drop", "1")
    assert {"Modelfile", "tokenizer.json", f"model-{quant}.gguf"} <= set(record["files"])
    proof = record["proof"]
    assert proof["prompts_tokenized_alike"] == "48 of 48"
    assert proof["logits"]["mean_kl"] < {"F16": 1e-5, "BF16": 1e-4, "Q8_0": 1e-2, "Q6_K": 1e-2}.get(quant, 0.3)
    if quant == "F16":
        assert proof["generated"]["prompts"] == proof["generated"]["equal"] == 20
    model, tokenizer = models.load_for_inference(ModelSource(run, dtype="float32"))
    exported = GgufModel(tmp_path / "gguf" / f"model-{quant}.gguf", 256)
    expected = TorchRanker(model, tokenizer, AWKWARD).raw_scores(LINES[:4])
    scores = ranker_of(exported, tokenizer, AWKWARD).raw_scores(LINES[:4])
    exported.close()
    assert np.abs(scores - expected).max() < {"F16": 0.02, "BF16": 0.1, "Q8_0": 0.5, "Q6_K": 0.5}.get(quant, 3)


def test_an_importance_matrix_of_rows(run, dev, tmp_path):
    pytest.importorskip("xllamacpp")
    more = ("--quant", "Q4_K_M", "--imatrix", dev, "--max_metric_drop", "1")
    record = export_run(run, "gguf", tmp_path / "gguf", dev, *more)
    assert record["imatrix"]["rows"] == 48 and record["imatrix"]["data"] == dev
    plain = export_run(run, "gguf", tmp_path / "plain", dev, *more[:2], *more[4:])
    assert "imatrix" not in plain
    assert record["files"]["model-Q4_K_M.gguf"]["sha256"] != plain["files"]["model-Q4_K_M.gguf"]["sha256"]


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_alone(rslora, run, dev, tmp_path):
    """Beside its base in F16 the adapter answers as in PEFT; alpha and rank are llama.cpp's."""
    pytest.importorskip("xllamacpp")
    source = Path(shutil.copytree(run, tmp_path / "run"))
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": rslora}))
    record = export_run(str(source), "gguf_lora", tmp_path / "lora", dev, "--quant", "F16", "--max_metric_drop", "1")
    assert record["proof"]["logits"]["mean_kl"] < 1e-5 and record["base_quant"] == "F16"
    assert {"adapter.gguf", "Modelfile"} <= set(record["files"])
    assert not any(name.startswith("base") for name in record["files"])
    fields = gguf.GGUFReader(tmp_path / "lora" / "adapter.gguf").fields
    rank = config["r"]
    alpha = config["lora_alpha"] * (rank**0.5 if rslora else 1)
    assert fields["adapter.lora.alpha"].contents() == pytest.approx(alpha)
    assert fields["general.type"].contents() == "adapter"


def test_a_whole_model_is_no_adapter(tiny_base, dev, tmp_path):
    with pytest.raises(UserError, match="is a whole model; use --format gguf"):
        export_run(tiny_base, "gguf_lora", tmp_path / "lora", dev)


@pytest.mark.skipif(not STORIES.is_dir(), reason="the pretrained model is not there")
@pytest.mark.parametrize("quant", ["F16", "Q8_0"])
def test_a_pretrained_model(quant, tmp_path, monkeypatch):
    """Of weights that nobody here made, and of the other architecture and kind of tokenizer; by a whole proof."""
    pytest.importorskip("xllamacpp")
    monkeypatch.undo()
    proof = export_run(str(STORIES), "gguf", tmp_path / "gguf", stories(tmp_path), "--quant", quant)["proof"]
    assert proof["prompts_tokenized_alike"] == "3 of 3"
    assert proof["logits"]["mean_kl"] < (1e-4 if quant == "F16" else 0.05)
    if quant == "F16":
        assert proof["generated"]["equal"] == proof["generated"]["prompts"] == 3


# Tokens.

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(*steps, **more) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes that cuts a text by these steps first."""
    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(bpe.BPE(vocab=vocabulary, merges=[], **more))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_pre_tokenizers_have_llama_cpps_names():
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    by_threes = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
    for steps, more, name in (
        ((pre_tokenizers.Split(Regex(QWEN), "isolated"), plain), {}, "qwen2"),
        ((pre_tokenizers.Split(Regex(by_threes), "isolated"), plain), {"ignore_merges": True}, "llama-bpe"),
        ((pre_tokenizers.Split(Regex(by_threes), "isolated"), plain), {}, "smaug-bpe"),
        ((pre_tokenizers.Digits(individual_digits=True), words), {}, "smollm"),
        ((words,), {}, "gpt-2"),
    ):
        assert pre_tokenizer_name(byte_level(*steps, **more)) == name
    with pytest.raises(UserError, match="no pre-tokenizer that cuts a text as this model's does"):
        pre_tokenizer_name(byte_level(pre_tokenizers.Whitespace(), plain))


def test_other_tokens_are_refused(run, dev, tmp_path, monkeypatch):
    """The gate: a file that llama.cpp cuts otherwise is not written, whatever the figures say."""
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(GgufModel, "tokenize", lambda self, text: [0])
    with pytest.raises(UserError, match="reads other tokens than the model was trained on"):
        export_run(run, "gguf", tmp_path / "gguf", dev)
    assert list(tmp_path.iterdir()) == []


def test_gguf_without_llama_cpp(run, dev, tmp_path, monkeypatch):
    """It is asked before anything is measured."""
    monkeypatch.setattr(parity, "Measurement", None)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    llama_cpp.library.cache_clear()
    with pytest.raises(UserError, match=r"pip install -r requirements/export.txt"):
        export_run(run, "gguf", tmp_path / "gguf", dev)
    assert list(tmp_path.iterdir()) == []
