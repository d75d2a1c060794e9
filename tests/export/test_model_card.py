"""The model card says what the folder holds, and nothing of the machine it was made on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import metadata_load
from support.exported import export_run
from support.inputs import write_rows
from support.served import make_run

import eval_creditmix
import sft_train
from common.cli import UserError
from common.export import model_card
from common.export.pipeline import RECORD
from common.files import read_json
from common.models import loading as models
from common.models import tokenizers
from common.models.source import ModelSource
from common.models.torch_runtime import TorchRuntime

FIGURE = {"value": 0.664, "low": 0.65, "high": 0.678}
METRICS = {
    "evaluator": "creditmix",
    "data": "/home/ann/data/creditmix_val.jsonl",
    "data_sha256": "ab" * 32,
    "split": "validation",
    "n": 4500,
    "created": "2026-11-29T02:45:58Z",
    "versions": {"distill-slm": "c0ffee"},
    "models": [
        {"model_dir": "models/base", "accuracy": {"value": 0.1, "low": 0.1, "high": 0.1}},
        {"model_dir": "/home/ann/runs/risk", "accuracy": FIGURE, "contamination": {"rows": 3, "of": 4500}, "n": 4500},
    ],
}
RUN = {
    "state": "done",
    "method": "sft",
    "base_model": "Qwen/Qwen2.5-3B-Instruct",
    "settings": {"learning_rate": 2e-4, "lora_r": 16, "teacher": None, "init_adapter": "/home/ann/runs/first"},
    "data": {"path": "/home/ann/data/creditmix_sft.jsonl", "rows": 11553, "sha256": "cd" * 32},
    "steps": 600,
    "train_loss": 0.50123,
    "versions": {"torch": "2.13.0"},
    "git_commit": "c0ffee",
}
TASK = {"kind": "labels", "name": "creditmix", "labels": ["Good", "Standard", "Bad"], "instruction": "Rate it."}


@pytest.fixture
def risk(tmp_path, base) -> Path:
    """An adapter with all the records that a card reads."""
    folder = Path(make_run(tmp_path / "risk", base, seed=1))
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "task.json").write_text(json.dumps({**TASK, "beginnings": ["Rate it."], "prompt_endings": []}))
    (folder / "report").mkdir()
    (folder / "report" / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "calibration.json").write_text("{}")
    return folder


def test_all_that_is_known_is_said(risk):
    text = model_card.write(risk).read_text()
    assert metadata_load(risk / "README.md") == {
        "base_model": "Qwen/Qwen2.5-3B-Instruct",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["distill-slm", "sft", "creditmix"],
    }
    for said in (
        "# risk",
        "LoRA adapter of `Qwen/Qwen2.5-3B-Instruct`, trained by supervised fine-tuning",
        "Labels: `Good`, `Standard`, `Bad`",
        f"| `creditmix_sft.jsonl` | 11,553 | `{'cd' * 32}` |",
        "| started from | first |",
        "| learning_rate | 0.0002 |",
        "| accuracy | 0.664 [0.650, 0.678] |",
        "of a group that it was trained on: 3 of 4,500",
        "in `calibration.json`",
        "python infer_creditmix.py --model_dir risk",
        'AutoPeftModelForCausalLM.from_pretrained("risk")',
        "python export_model.py --model_dir risk --format gguf",
    ):
        assert said in text, said
    assert "/home/ann" not in text and "More Information Needed" not in text and "0.100 [" not in text


def test_what_is_not_known_is_not_made_up(risk):
    for name in ("task.json", "calibration.json", "report/metrics.json"):
        (risk / name).unlink()
    (risk / "run.json").write_text(json.dumps({"state": "failed", "base_model": "base"}))
    text = model_card.card(risk)
    assert "The run is not done: its state is `failed`" in text and "It was not evaluated yet." in text
    assert "## Task" not in text and "## Calibration" not in text and "## Training data" not in text
    assert "The base's files name no licence." in text


def test_the_licence_of_a_base(risk, tmp_path, base):
    own = shutil.copytree(base, tmp_path / "own base")
    (risk / "run.json").write_text(json.dumps(RUN | {"base_model": str(own)}))
    assert model_card.licence(str(own)) is None
    (own / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    assert metadata_load(model_card.write(risk))["license"] == "apache-2.0"
    assert "The base's licence is `apache-2.0`." in (risk / "README.md").read_text()


def test_a_card_of_ones_own_stays(risk):
    own = "# Mine\n"
    (risk / "README.md").write_text(own)
    model_card.refresh([risk])
    assert (risk / "README.md").read_text() == own
    (risk / "README.md").write_text("# Model Card for Model ID\n[More Information Needed]\n")
    model_card.refresh([risk])
    assert "# risk" in (risk / "README.md").read_text()
    (risk / "README.md").write_text((risk / "README.md").read_text().replace("# risk", "# old"))
    model_card.refresh([risk])  # its own, written anew
    assert "# risk" in (risk / "README.md").read_text()


def test_a_broken_record_costs_the_card_alone(risk, tmp_path, capsys):
    (risk / "report" / "metrics.json").write_text("[")
    with pytest.raises(UserError, match=r"metrics\.json is unreadable"):
        model_card.card(risk)
    model_card.refresh([risk, tmp_path / "nothing", tmp_path])
    assert "risk gets no model card" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"has neither run\.json nor export\.json"):
        model_card.card(tmp_path)


@pytest.mark.processes
def test_training_and_evaluating_write_it(tmp_path, base, rows, dev):
    folder = tmp_path / "trained"
    sft_train.main(["--student", base, "--data", rows["sft"], "--save_dir", str(folder), "--max_steps", "2"])
    before = (folder / "README.md").read_text()
    assert "| steps | 2 |" in before and "It was not evaluated yet." in before and "Information Needed" not in before
    evaluate = ["--model_dir", str(folder), "--data", dev, "--split", "all", "--report_dir", str(folder / "report")]
    eval_creditmix.main(evaluate)
    after = (folder / "README.md").read_text()
    assert "| accuracy | " in after and "(SHA-256 " in after


@pytest.mark.exports
@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("merged", ["Adapter merged into the weights", "AutoModelForCausalLM"]),
        ("onnx", ["ONNX graph of", "onnxruntime.InferenceSession"]),
        ("gguf", ["GGUF file of", "llama-server -m model-Q8_0.gguf", "ollama create out -f Modelfile"]),
        ("gguf_lora", ["LoRA adapter as GGUF of", "--lora adapter.gguf", "ollama create out"]),
    ],
)
def test_an_export_tells_its_proof_and_its_use(run, dev, tmp_path, form, said, request):
    if form.startswith("gguf"):
        pytest.importorskip("xllamacpp")
    out = request.getfixturevalue("onnx") if form == "onnx" else tmp_path / "out"
    record = read_json(out / RECORD) if form == "onnx" else export_run(run, form, out, dev, "--max_metric_drop", "1")
    text = (out / "README.md").read_text()
    figure = record["proof"]["metric"]["export"]["value"]
    for each in ["# out", f"| macro_f1 of the export | {figure:.4f} |", "## Use", *said]:
        assert each in text, each
    assert all(f"`{about['sha256']}`" in text for about in record["files"].values())
    assert str(out.parent) not in text and metadata_load(out / "README.md")["pipeline_tag"]


@pytest.mark.exports
@pytest.mark.parametrize("form", ["run", "merged", "onnx"])
def test_what_it_says_of_running_it_runs(form, run, onnx, dev, tmp_path, monkeypatch, capsys):
    """Pasted into a Python, it writes what the toolkit writes."""
    folder = {"run": Path(run), "onnx": onnx}.get(form, tmp_path / "out")
    if form == "merged":
        export_run(run, "merged", folder, dev)
    model, tokenizer = models.load_for_inference(ModelSource(run, dtype="float32"))
    prompt = tokenizers.encode_prompt(tokenizer, "Age: 23")
    ends = tokenizers.stop_ids(tokenizer, model.generation_config)
    answer = TorchRuntime(model).generate([prompt], 12, ends)[0]
    (code,) = re.findall(r"```python\n(.*?)\n```", model_card.card(folder), re.DOTALL)
    monkeypatch.chdir(folder if form == "onnx" else folder.parent)
    capsys.readouterr()
    exec(code.replace("256", "12").replace("...", "Age: 23"), {})
    assert capsys.readouterr().out == tokenizer.decode(answer, skip_special_tokens=True) + "\n"
    assert len(answer) > 2


def test_rows_are_a_table_whatever_they_hold(risk, tmp_path):
    data = RUN["data"] | {"path": write_rows(tmp_path / "a|b.jsonl", [])}
    (risk / "run.json").write_text(json.dumps(RUN | {"data": data}))
    assert "`a\\|b.jsonl` | 11,553" in model_card.card(risk)
