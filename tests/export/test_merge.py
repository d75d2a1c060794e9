"""Merging: tensor by tensor what PEFT makes, one shard at a time."""

from __future__ import annotations

import gc
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.exported import export_run
from support.models import build_base, weights
from support.served import make_adapter, make_run

import export_model
from common.cli import UserError
from common.export import genai_writer, model_card, packages, parity
from common.export import merge as merging
from common.export import pipeline as export
from common.export.formats import FORMATS
from common.files import sha256_file
from common.models import adapters, tokenizers
from common.models import loading as models
from common.models.source import ModelSource

pytestmark = pytest.mark.exports


@pytest.mark.parametrize("from_nf4", [False, True])
def test_merging_equals_pefts(from_nf4, tmp_path, tokenizer):
    """Tensor by tensor what PEFT makes of the whole model, 4-bit base included."""
    base = build_base(tmp_path / "base", tokenizer, hidden=64)  # bitsandbytes' blocks have 64 weights
    run = str(make_run(tmp_path / "run", base, seed=3))
    (tmp_path / "merged").mkdir()
    dtype = "bfloat16" if from_nf4 else "float32"
    merging.merge(run, Path(base), tmp_path / "merged", dtype=dtype, from_nf4=from_nf4, max_shard_bytes=1 << 30)
    whole = (
        models.load_base(ModelSource(base, load_in_4bit="on")).dequantize()
        if from_nf4
        else models.load_base(ModelSource(base))
    )
    expected = adapters.load_adapter(whole, run).merge_and_unload().state_dict()
    merged = models.load_base(ModelSource(str(tmp_path / "merged"), dtype=dtype)).state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        allowed = 0.01 if from_nf4 else 1e-6  # PEFT adds in bfloat16 there
        assert (merged[name].float() - tensor.float()).abs().max() <= allowed * max(1, tensor.abs().max()), name


def tensor_bytes() -> int:
    """Of all tensors that are alive on the CPU."""
    gc.collect()
    real = (torch.Tensor, torch.nn.Parameter)  # an exporter's, which an earlier test may have left, have no memory
    tensors = [item for item in gc.get_objects() if type(item) in real and item.device.type == "cpu"]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def test_memory_holds_one_shard(run, base, tmp_path, monkeypatch):
    """At each write, the tensors alive are those of one shard; the files together are the whole model."""
    save, alive = safetensors.torch.save_file, []

    def counted(shard, path, metadata):
        alive.append(tensor_bytes() - before)
        save(shard, path, metadata=metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", counted)
    total = 4 * merging.Checkpoint(base).numbers
    buffers = sum(buffer.nbytes for buffer in merging.empty_model(Path(base)).buffers())
    adapter = sum(tensor.nbytes for tensor in weights(run).values())
    before = tensor_bytes()
    merging.merge(run, Path(base), tmp_path, dtype="float32", from_nf4=False, max_shard_bytes=total // 4)
    assert len(alive) >= 4
    largest = 4 * max(map(math.prod, merging.Checkpoint(base).shapes.values()))  # a tensor is never cut
    assert max(alive) <= max(total // 4, largest) + adapter + buffers < total / 2
    sizes = [path.stat().st_size for path in tmp_path.glob("model-*.safetensors")]
    assert len(sizes) == len(alive) and sum(sizes) >= total


PLAIN = """
import sys
sys.modules["peft"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
turns = [{"role": "user", "content": "Age: 4"}]
ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
print(model.generation_config.eos_token_id == tokenizer.eos_token_id)
print(model(torch.tensor([ids])).logits[0, -1].argmax().item())
"""


def test_merged_needs_no_peft(run, dev, tmp_path, torch_model, capsys):
    record = export_run(run, "merged", tmp_path / "merged", dev, "--max_shard_gb", "0.00002")
    assert (record["passed"], record["merged_into"]) == (True, export.ORIGINAL_BASE)
    assert (tmp_path / "merged" / merging.INDEX).is_file()
    proof = record["proof"]
    assert (proof["rows"], proof["label_agreement"]["value"]) == (48, 1.0)
    assert proof["metric"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert proof["logits"]["max_difference"] < 1e-4 and proof["logits"]["mean_kl"] < 1e-8
    for name, file in record["files"].items():
        path = tmp_path / "merged" / name
        assert (file["bytes"], file["sha256"]) == (path.stat().st_size, sha256_file(path))
    assert set(record["files"]) == {path.name for path in (tmp_path / "merged").iterdir()} - {
        export.RECORD,
        model_card.FILE,
    }
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last)["metric"] == proof["metric"]

    result = subprocess.run([sys.executable, "-c", PLAIN, tmp_path / "merged"], capture_output=True, text=True)
    model, tokenizer = torch_model
    ids = tokenizers.encode_prompt(tokenizer, "Age: 4")
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, -1].argmax().item()
    assert result.stdout.split() == ["True", str(expected)], result.stderr


def test_both_bases_are_compared_where_training_was_in_4_bits(tmp_path, tokenizer, dev):
    base = build_base(tmp_path / "base", tokenizer, hidden=64, embeddings=0.3)
    run = str(make_run(tmp_path / "run", base, seed=3))
    record = export_run(run, "merged", tmp_path / "out", dev, "--load_in_4bit", "on", "--max_metric_drop", "1")
    assert record["origin"]["reference"] == "adapter on its base in NF4"
    proofs = record["also_tried"] | {record["merged_into"]: record["proof"]}
    assert set(proofs) == {export.ORIGINAL_BASE, export.NF4_BASE}
    kl = {into: proof["logits"]["mean_kl"] for into, proof in proofs.items()}
    assert kl[export.NF4_BASE] < 0.1 * kl[export.ORIGINAL_BASE]
    best = max(proof["metric"]["export"]["value"] for proof in proofs.values())
    assert record["proof"]["metric"]["export"]["value"] == best


def test_how_a_run_was_trained(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")

    def trained(device: str, asked: str) -> bool:
        (copy / "run.json").write_text(
            json.dumps({"state": "done", "device": device, "settings": {"load_in_4bit": asked}})
        )
        return export.trained_in_4bit(str(copy), "auto")

    assert trained("NVIDIA GeForce RTX 4060", "auto") and trained("CPU, 2 cores (x86_64)", "on")
    assert not trained("CPU, 2 cores (x86_64)", "auto") and not trained("NVIDIA GeForce RTX 4060", "off")
    assert export.trained_in_4bit(str(copy), "on") and not export.trained_in_4bit(str(copy), "off")


def test_rslora_is_merged_as_pefts(base, tmp_path):
    run = str(make_adapter(tmp_path / "run", base, use_rslora=True))
    (tmp_path / "merged").mkdir()
    merging.merge(run, Path(base), tmp_path / "merged", dtype="float32", from_nf4=False, max_shard_bytes=1 << 30)
    whole = models.load_base(ModelSource(base, dtype="float32"))
    expected = adapters.load_adapter(whole, run).merge_and_unload().state_dict()
    merged = models.load_base(ModelSource(str(tmp_path / "merged"), dtype="float32")).state_dict()
    assert all((merged[name] - tensor).abs().max() < 1e-5 for name, tensor in expected.items())


OTHER_ADAPTERS = [
    ({"use_dora": True}, "has use_dora=True"),
    ({"modules_to_save": ["lm_head"]}, "has modules_to_save="),
    ({"bias": "all"}, "has bias=all"),
    ({"lora_bias": True}, "has lora_bias=True"),
    ({"rank_pattern": {"q_proj": 2}}, "has rank_pattern="),
    ({"alora_invocation_tokens": [1, 2]}, "has alora_invocation_tokens="),
    ({"target_parameters": ["experts"]}, "has target_parameters="),
    ({"some_later_setting": True}, "has some_later_setting=True"),
    ({"init_lora_weights": "pissa"}, "has init_lora_weights=pissa"),
    ({"peft_type": "ADALORA"}, "is of the kind ADALORA"),
]


@pytest.mark.parametrize(("change", "what"), OTHER_ADAPTERS)
def test_other_adapters_are_refused(change, what, run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    config = json.loads((copy / adapters.ADAPTER_CONFIG).read_text())
    (copy / adapters.ADAPTER_CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=f"{what}.*, which cannot be exported; train a plain LoRA adapter"):
        merging.Deltas(copy)


@pytest.mark.parametrize("proof", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_they_are_refused_before_anything_is_measured(form, proof, base, run, dev, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "check", lambda *args, **more: None)
    monkeypatch.setattr(genai_writer, "check", lambda folder: None)
    monkeypatch.setattr(parity, "Measurement", None)
    rows = ["--proof_data", dev] if proof else ["--no_proof"]
    dora = str(make_adapter(tmp_path / "dora", base, use_dora=True))
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / adapters.ADAPTER_WEIGHTS).write_bytes(b"0")
    for model_dir, sentence in ((dora, "has use_dora=True, which"), (damaged, "is damaged or missing .*; copy it")):
        argv = ["--model_dir", str(model_dir), "--format", form, "--save_dir", str(tmp_path / "out"), *rows]
        with pytest.raises(UserError, match=sentence):
            export_model.main(argv)
        assert not list(tmp_path.glob("*out*"))
