"""Exports and their proofs on a random model: what they are compared with is the run itself, or a definition."""

from __future__ import annotations

import gc
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import f1_score
from support.exported import STORIES, export_run, labelled_rows, stories
from support.inputs import LABELS, PROMPTS, write_rows
from support.models import build_base, weights
from support.served import make_run

import eval_creditmix
import export_model
from common import cli
from common.cli import UserError
from common.export import merge as merging
from common.export import parity
from common.export import pipeline as export
from common.export.parity import Measured
from common.files import sha256_file
from common.models import adapters, tokenizers
from common.models import loading as models
from common.models.source import ModelSource
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.creditmix import CREDITMIX

pytestmark = pytest.mark.exports


@pytest.fixture(scope="module")
def run(tmp_path_factory, base) -> str:
    """An adapter of random weights. Not to be changed."""
    return str(make_run(tmp_path_factory.mktemp("exported") / "creditmix_sft", base, seed=1))


@pytest.fixture(scope="module")
def dev(tmp_path_factory) -> str:
    return labelled_rows(tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="module")
def torch_model(run):
    return models.load_for_inference(ModelSource(run, dtype="float32"))


# Merging.


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
    found = models.load_base(ModelSource(str(tmp_path / "merged"), dtype=dtype)).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        allowed = 0.01 if from_nf4 else 1e-6  # PEFT adds in bfloat16 there
        assert (found[name].float() - tensor.float()).abs().max() <= allowed * max(1, tensor.abs().max()), name


def tensor_bytes() -> int:
    """Of all tensors that are alive on the CPU."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.device.type == "cpu"]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
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
    assert set(record["files"]) == {path.name for path in (tmp_path / "merged").iterdir()} - {export.RECORD}
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last)["metric"] == proof["metric"]

    told = subprocess.run([sys.executable, "-c", PLAIN, tmp_path / "merged"], capture_output=True, text=True)
    model, tokenizer = torch_model
    ids = tokenizers.encode_prompt(tokenizer, "Age: 4")
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, -1].argmax().item()
    assert told.stdout.split() == ["True", str(expected)], told.stderr


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
        (copy / "run.json").write_text(json.dumps({"device": device, "settings": {"load_in_4bit": asked}}))
        return export.trained_in_4bit(str(copy), "auto")

    assert trained("NVIDIA GeForce RTX 4060", "auto") and trained("CPU, 2 cores (x86_64)", "on")
    assert not trained("CPU, 2 cores (x86_64)", "auto") and not trained("NVIDIA GeForce RTX 4060", "off")
    assert export.trained_in_4bit(str(copy), "on") and not export.trained_in_4bit(str(copy), "off")


# The proof.


def measured(logits: list, answers: list, **more) -> Measured:
    return Measured(1.0, 10, np.array(logits, dtype=np.float32), answers, 5.0, **more)


def test_a_proof_by_hand(tmp_path):
    """KL and the inverse perplexity of two rows, computed with pencil and paper."""
    path = write_rows(tmp_path / "rows.jsonl", [{"input": "a", "output": "b"}] * 2)
    material = parity.read_material(path, CREDITMIX, str(tmp_path), None)
    even, skewed = np.log([0.5, 0.5]), np.log([0.8, 0.2])
    one = measured([even, even], [[1, 2, 3], [4]], nll=np.array([[2.0, 2], [1.0, 1]]))
    other = measured([even, skewed], [[1, 9, 3], [4]], nll=np.array([[2.0, 2], [1.3, 1]]))
    proof = parity.compare(one, other, material)
    assert proof["logits"]["mean_kl"] == pytest.approx(
        (0.5 * np.log(0.5 / 0.8) + 0.5 * np.log(0.5 / 0.2)) / 2, abs=1e-6
    )
    assert proof["logits"]["max_difference"] == pytest.approx(np.log(0.5 / 0.2), abs=1e-6)
    assert proof["generated"] == {"prompts": 2, "equal": 1, "tokens_before_they_part": 0.5}
    assert proof["perplexity"]["reference"]["value"] == pytest.approx(np.e, abs=1e-5)
    assert proof["metric"]["export"]["value"] == pytest.approx(np.exp(-1.1), abs=1e-5)
    assert proof["metric"]["difference"]["value"] == pytest.approx(np.exp(-1.1) - np.exp(-1.0), abs=1e-5)
    same = parity.compare(one, one, material)["metric"]["difference"]
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_text_rows(run, tmp_path, torch_model):
    """The NLL behind the perplexity is that of the outputs' tokens and the end of the turn, as training sees them."""
    rows = [{"input": prompt, "output": LABELS[i % 3]} for i, prompt in enumerate(PROMPTS[:6])]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    record = export_run(run, "merged", tmp_path / "merged", path)
    model, tokenizer = torch_model
    nll = tokens = 0
    for row in rows:
        encoded = tokenizers.encode_pair(tokenizer, row["input"], row["output"])
        labels = torch.tensor([encoded.input_ids])
        labels[:, : encoded.prompt_length] = -100
        count = len(encoded.input_ids) - encoded.prompt_length
        with torch.inference_mode():
            nll += model(torch.tensor([encoded.input_ids]), labels=labels).loss.item() * count
        tokens += count
    assert record["proof"]["perplexity"]["reference"]["value"] == pytest.approx(np.exp(nll / tokens), rel=1e-4)
    assert record["proof"]["metric"]["name"] == "inverse_perplexity"


def test_rows_are_taken_evenly(dev):
    every = parity.read_material(dev, CREDITMIX, "none", None)
    some = parity.read_material(dev, CREDITMIX, "none", 3)
    assert len(every.prompts) == 48
    assert some.texts == [every.texts[place] for place in (0, 24, 47)] and some.y.tolist() == [0, 0, 2]


def test_the_labels_are_those_of_the_runs_calibration(run, dev, tmp_path):
    """What the proof judges is what infer_creditmix.py would answer, fitted calibration included."""
    fitted = shutil.copytree(run, tmp_path / "run")
    (fitted / "train_groups.txt").write_text("0123456789abcdef\n")
    eval_creditmix.main(["--model_dir", str(fitted), "--fit_calibration", dev])
    record = export_run(str(fitted), "merged", tmp_path / "merged", dev)
    assert {"calibration.json", "train_groups.txt"} <= set(record["files"])
    classifier = Classifier.load(ModelSource(str(fitted)), CREDITMIX)
    rows = [json.loads(line) for line in Path(dev).read_text().splitlines()]
    texts = [CREDITMIX.clean(row["question"]) for row in rows]
    scores = classifier.calibration(None).apply(classifier.raw_scores(texts))
    f1 = f1_score([row["answer"] for row in rows], [LABELS[i] for i in scores.predictions], average="macro")
    assert record["proof"]["metric"]["export"]["value"] == pytest.approx(f1, abs=1e-5)


# What goes wrong.


def test_a_loss_is_refused_and_kept_apart(run, dev, tmp_path, monkeypatch, capsys):
    merge = merging.merge

    def spoil(*args, **settings):
        merge(*args, **settings)
        file = args[2] / "model.safetensors"
        weights = load_file(file)
        weights["model.norm.weight"] *= -1
        save_file(weights, file)

    monkeypatch.setattr(merging, "merge", spoil)
    argv = ["--model_dir", run, "--format", "merged", "--save_dir", str(tmp_path / "out"), "--proof_data", dev]
    assert cli.run(export_model.main, argv) == cli.FAILED
    said = capsys.readouterr()
    assert "macro_f1 has fallen by" in said.err and "more than --max_metric_drop 0.01" in said.err
    assert json.loads(said.out.splitlines()[-1])["passed"] is False
    assert [path.name for path in tmp_path.iterdir()] == ["out.rejected"]
    assert json.loads((tmp_path / "out.rejected" / export.RECORD).read_text())["passed"] is False


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_leaves_what_was_there(run, dev, tmp_path, monkeypatch, fault):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("kept")
    monkeypatch.setattr(parity, "compare", lambda *_: (_ for _ in ()).throw(fault))
    argv = ["--model_dir", run, "--format", "merged", "--save_dir", str(tmp_path / "out"), "--proof_data", dev]
    assert cli.run(export_model.main, [*argv, "--overwrite"]) == (1 if isinstance(fault, OSError) else cli.INTERRUPTED)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/old"]


def test_a_killed_exports_remains_go(run, dev, tmp_path):
    """What a kill leaves is hidden, and gone after the next export, which also replaces what is there where asked."""
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    export_run(run, "merged", tmp_path / "out", dev, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "old").exists()


def refused(run: str, dev: str, tmp_path: Path, *more: str, form: str = "merged") -> str:
    argv = ["--model_dir", run, "--format", form, "--save_dir", str(tmp_path / "out"), "--proof_data", dev, *more]
    with pytest.raises(UserError) as error:
        export_model.main(argv)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    return str(error.value)


def test_flags_that_do_not_go_together(run, dev, tmp_path):
    assert "--dtype bfloat16 is not for --format onnx" in refused(
        run, dev, tmp_path, "--dtype", "bfloat16", form="onnx"
    )
    assert "--dtype float16 is not for --format int8" in refused(run, dev, tmp_path, "--dtype", "float16", form="int8")
    assert "--quant is for --format gguf" in refused(run, dev, tmp_path, "--quant", "F16")
    assert "--scales is for --format int8" in refused(run, dev, tmp_path, "--scales", "channel")
    assert "--keep_lm_head is for --format int8" in refused(run, dev, tmp_path, "--keep_lm_head")
    assert "--max_shard_gb must be above 0" in refused(run, dev, tmp_path, "--max_shard_gb", "0")
    assert "--max_metric_drop must be 0 or above" in refused(run, dev, tmp_path, "--max_metric_drop", "nan")
    assert "would replace --model_dir" in refused(run, dev, tmp_path, "--save_dir", run, "--overwrite")
    assert "is there already; pass --overwrite" in refused(run, dev, tmp_path, "--save_dir", str(tmp_path))


def test_no_room(run, dev, tmp_path, monkeypatch):
    """It is asked before anything is measured."""
    monkeypatch.setattr(parity, "measure", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert re.search(r"needs about 0.00 GB beside .* and 0.00 GB are free", refused(run, dev, tmp_path))


def test_room_that_is_asked_for(run, tmp_path):
    """Bytes a parameter of what is on the disk at once: the merged weights and what is made of them."""
    facts = {
        "model_dir": run,
        "base": Path(adapters.base_of(run)),
        "quant": "F16",
        "scales": "block",
        "keep_lm_head": False,
    }
    facts |= {"max_shard_bytes": 1, "trust_remote_code": False}
    for form, dtype, four_bit, expected in (
        ("merged", "bfloat16", False, 2),
        ("merged", "bfloat16", True, 4),  # two of them, to compare
        ("onnx", "float32", False, 8),
        ("onnx", "float16", True, 6),
        ("int8", "float32", False, 8),
        ("gguf", "float32", False, 6),
    ):
        needed = export.Request(format=form, dtype=dtype, four_bit=four_bit, **facts).bytes_needed()
        assert needed == int(merging.Checkpoint(facts["base"]).numbers * expected * export.ROOM), form


def test_an_unknown_architecture(tiny_base, dev, tmp_path):
    strange = Path(shutil.copytree(tiny_base, tmp_path / "strange"))
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps(config | {"model_type": "ours"}))
    assert "with full attention, and" in refused(str(strange), dev, tmp_path, form="onnx")
    assert "gguf is for the architectures llama, qwen2" in refused(str(strange), dev, tmp_path, form="gguf")
    assert "is of no known architecture" in refused(str(strange), dev, tmp_path)
    (strange / "config.json").write_text(json.dumps(config | {"use_sliding_window": True, "sliding_window": 8}))
    assert "with a sliding window" in refused(str(strange), dev, tmp_path, form="onnx")


def test_an_adapter_without_its_base(run, dev, tmp_path, tokenizer):
    lost = Path(shutil.copytree(run, tmp_path / "lost"))
    config = json.loads((lost / adapters.ADAPTER_CONFIG).read_text())
    (lost / adapters.ADAPTER_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "/not/there"}))
    assert "needs its base /not/there, which is not there" in refused(str(lost), dev, tmp_path)
    other = build_base(tmp_path / "other", tokenizer, seed=5)
    assert "was trained on other base weights" in refused(run, dev, tmp_path, "--base", other)
    export_run(str(lost), "merged", tmp_path / "found", dev, "--base", adapters.base_of(run))


def test_other_adapters_are_refused(run, dev, tmp_path):
    for change, what in (
        ({"use_dora": True}, "has use_dora"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"bias": "all"}, "LORA with bias all"),
        ({"rank_pattern": {"q_proj": 2}}, "has rank_pattern"),
    ):
        copy = Path(shutil.copytree(run, tmp_path / what))
        config = json.loads((copy / adapters.ADAPTER_CONFIG).read_text())
        (copy / adapters.ADAPTER_CONFIG).write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=what):
            merging.Deltas(copy)


def test_proof_rows_that_cannot_be(run, dev, tmp_path):
    assert "does not exist; give rows to compare on" in refused(run, "none.jsonl", tmp_path)
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": "x"}])
    assert "bad.jsonl, line 1: a row of a proof has question and answer, or input and output" in refused(
        run, bad, tmp_path
    )
    empty = write_rows(tmp_path / "empty.jsonl", [])
    assert "a row of a proof has" in refused(run, empty, tmp_path)


# A pretrained model that nobody here made.


@pytest.mark.skipif(not STORIES.is_dir(), reason="the pretrained model is not there")
def test_a_pretrained_model(tmp_path):
    run = str(make_run(tmp_path / "run", str(STORIES), seed=1))
    record = export_run(run, "merged", tmp_path / "out", stories(tmp_path))
    assert record["proof"]["logits"]["mean_kl"] < 1e-9
    assert record["proof"]["generated"]["equal"] == record["proof"]["generated"]["prompts"] == 3
