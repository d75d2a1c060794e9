"""ONNX exports: in ONNX Runtime they equal torch, and whatever uses a run uses them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx as onnx_format
import pytest
import torch
from support.exported import AWKWARD, LINES, STORIES, export_run, stories
from support.inputs import PROMPTS, ROOT
from support.served import serve

import eval_creditmix
import export_model
import infer_codegen
import infer_creditmix
import infer_idp
from common.cli import UserError
from common.export import onnx_writer
from common.models import adapters, tokenizers
from common.models import loading as models
from common.models import onnx_runtime as onnx_model
from common.models.onnx_runtime import OnnxModel
from common.models.source import ModelSource
from common.models.torch_runtime import TorchRuntime
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.onnx_ranker import OnnxRanker
from common.tasks.ranking.rankers import ranker_of
from common.tasks.ranking.torch_ranker import naive_scores

pytestmark = pytest.mark.exports


def reuse(monkeypatch, folder: Path) -> None:
    """Take a graph that is there already: an export takes seconds."""
    monkeypatch.setattr(onnx_writer, "export", lambda model, target: shutil.copy(folder / "model.onnx", target))


def small(architecture: str):
    """A one-layer model of random weights with a head of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}
    config = AutoConfig.for_model(architecture, vocab_size=50, **shape, **heads)
    config.sliding_window = None
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def check_equal(folder: Path, model, allowed: float = 1e-5) -> None:
    prompts = [[5, 6, 7, 8], [9, 3]]
    model.config.save_pretrained(folder)
    exported, reference = OnnxModel(str(folder)), TorchRuntime(model)
    assert np.abs(exported.logits(prompts[0]) - reference.logits(prompts[0])).max() < allowed
    if allowed < 1e-3:
        assert exported.generate(prompts, 8, ()) == reference.generate(prompts, 8, ())


def test_onnx_equals_torch(onnx, torch_model):
    """Logits, scores of one row or many and of labels of many tokens, and greedy text of a padded batch."""
    model, tokenizer = torch_model
    exported = OnnxModel(str(onnx))
    prompts = [tokenizers.encode_prompt(tokenizer, text) for text in PROMPTS[:6]]
    reference = TorchRuntime(model)
    assert np.abs(exported.logits(prompts[0]) - reference.logits(prompts[0])).max() < 1e-4
    assert exported.generate(prompts, 12, ()) == reference.generate(prompts, 12, ())
    for task in (CREDITMIX, AWKWARD):
        expected = naive_scores(model, tokenizer, task, LINES[:5])
        assert np.abs(OnnxRanker(exported, tokenizer, task).raw_scores(LINES[:5]) - expected).max() < 1e-4
        alone = OnnxRanker(exported, tokenizer, task, max_batch_tokens=1).raw_scores(LINES[:5])
        assert np.abs(alone - expected).max() < 1e-4
        assert np.abs(OnnxRanker(exported, tokenizer, task).raw_scores(LINES[:1]) - expected[:1]).max() < 1e-4


def test_an_ended_answer_stops(onnx, torch_model):
    tokenizer = torch_model[1]
    exported = OnnxModel(str(onnx))
    prompts = [tokenizers.encode_prompt(tokenizer, text) for text in PROMPTS[:2]]
    full = exported.generate(prompts, 6, ())
    end = full[0][3]
    stopped = exported.generate(prompts, 6, {end})
    assert stopped == [row[: row.index(end)] if end in row else row for row in full]


def test_nobody_has_to_ask_for_fewer_logits(onnx):
    """A consumer that knows the usual inputs alone gets the logits of every position."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx / "model.onnx"))
    feeds = {
        "input_ids": np.array([[5, 6, 7]]),
        "attention_mask": np.ones((1, 3), dtype=np.int64),
        "position_ids": np.arange(3)[None],
    }
    assert {each.name for each in session.get_inputs() if not each.name.startswith("past_key_values.")} == set(feeds)
    for each in session.get_inputs():
        if each.name not in feeds:
            feeds[each.name] = np.zeros((1, each.shape[1], 0, each.shape[3]), dtype=np.float32)
    logits, *cache = session.run(None, feeds)
    assert logits.shape[1] == 3 and all(tensor.shape[2] == 3 for tensor in cache)
    assert np.abs(logits[0] - OnnxModel(str(onnx)).logits([5, 6, 7])).max() < 1e-5


def test_large_weights_lie_beside_the_graph(tmp_path):
    """Those of a graph that is quantised then, too."""
    model = small("qwen3")
    onnx_writer.export(model, tmp_path, protobuf_limit=1000)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert (tmp_path / onnx_writer.DATA_FILE).stat().st_size > 0.9 * parameters
    check_equal(tmp_path, model)
    for scales in ("block", "channel"):
        (folder := tmp_path / scales).mkdir()
        path = onnx_writer.quantize(tmp_path, folder, scales=scales)
        assert path.stat().st_size < parameters / 10 + 50_000  # the graph alone
        assert 0.2 * parameters < sum(file.stat().st_size for file in folder.glob("*data")) < 0.6 * parameters
        check_equal(folder, model, allowed=0.1)


@pytest.mark.parametrize(("scales", "operator"), [("block", "MatMulNBits"), ("channel", "MatMulInteger")])
def test_an_untied_head_is_quantised_unless_kept(scales, operator, mistral, tmp_path):
    model, folder = mistral
    for keep, expected in ((True, 7), (False, 8)):
        (tmp_path / str(keep)).mkdir()
        path = onnx_writer.quantize(folder, tmp_path / str(keep), scales=scales, keep_lm_head=keep)
        graph = onnx_format.load(str(path)).graph
        assert sum(node.op_type == operator for node in graph.node) == expected
        model.config.save_pretrained(tmp_path / str(keep))
        logits = OnnxModel(str(tmp_path / str(keep))).logits([5, 6, 7, 8])
        assert 0 < np.abs(logits - TorchRuntime(model).logits([5, 6, 7, 8])).max() < 0.1


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """(a model, the folder with its graph)"""
    model, folder = small("mistral"), tmp_path_factory.mktemp("mistral")
    onnx_writer.export(model, folder)
    check_equal(folder, model)
    return model, folder


def test_float16(tmp_path):
    model = small("llama")
    onnx_writer.export(small("llama").half(), tmp_path)
    check_equal(tmp_path, model, allowed=1e-2)
    assert OnnxModel(str(tmp_path)).dtype == "float16"


def test_int8(run, dev, onnx, tmp_path, monkeypatch):
    """Every weight of the layers is in 8 bits; speed and size stand beside those of float32."""
    reuse(monkeypatch, onnx)
    record = export_run(run, "int8", tmp_path / "int8", dev, "--max_metric_drop", "1")
    graph = onnx_format.load(str(tmp_path / "int8" / "model.onnx")).graph
    layers = models.load_base(ModelSource(adapters.base_of(run))).config.num_hidden_layers
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == 7 * layers
    assert 0 < record["proof"]["logits"]["mean_kl"] < 0.1
    exported, tokenizer = onnx_model.load(str(tmp_path / "int8"))
    alone, together = (ranker_of(exported, tokenizer, CREDITMIX, size).raw_scores(LINES[:24]) for size in (1, 4096))
    assert np.abs(alone - together).max() < 0.05  # a row's answer is its own
    speed = record["proof"]["speed"]
    assert speed["float32_onnx"]["bytes"] == (onnx / "model.onnx").stat().st_size > speed["export"]["bytes"]


@pytest.mark.skipif(not STORIES.is_dir(), reason="the pretrained model is not there")
def test_a_pretrained_model(tmp_path, monkeypatch):
    """Of weights that nobody here made, two layers of them since each takes seconds: the graph equals torch, by a whole
    proof, and INT8 stays close.
    """
    from transformers import AutoModelForCausalLM

    monkeypatch.undo()
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(STORIES, num_hidden_layers=2).save_pretrained(base)
    tokenizers.load_tokenizer(str(STORIES)).save_pretrained(base)
    record = export_run(str(base), "onnx", tmp_path / "onnx", stories(tmp_path))
    assert record["proof"]["logits"]["mean_kl"] < 1e-9
    assert record["proof"]["generated"]["equal"] == record["proof"]["generated"]["prompts"] == 3
    reuse(monkeypatch, tmp_path / "onnx")
    record = export_run(str(base), "int8", tmp_path / "int8", stories(tmp_path))
    assert record["proof"]["logits"]["mean_kl"] < 0.05


# Their use.


def test_the_scripts_answer_with_an_export(onnx, run, dev, tmp_path, capsys):
    answers = []
    for model_dir in (run, str(onnx)):
        infer_creditmix.main(["--model_dir", model_dir, "--features", LINES[0]])
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0].pop("model_name") == run and answers[1].pop("model_name") == str(onnx)
    assert answers[0].pop("prediction") == answers[1].pop("prediction")
    for key, value in answers[0].items():
        assert answers[1][key] == pytest.approx(value, abs=1e-4), key
    eval_creditmix.main(["--model_dir", run, str(onnx), "--data", dev, "--split", "all"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["models"][0]["macro_f1"] == result["models"][1]["macro_f1"]


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        (infer_idp, ["--schema", "recipes/receipts_schema.json", "--document", "x"]),
        (infer_codegen, ["--prompt", "x"]),
        (export_model, ["--format", "gguf", "--save_dir", "nowhere"]),
    ],
)
def test_what_an_export_cannot_do_is_said_before_anything_is_loaded(script, argv, onnx):
    with pytest.raises(UserError, match="is an ONNX export, which ranks labels and no more here; give the run"):
        script.main(["--model_dir", str(onnx), *argv])
    with pytest.raises(UserError, match="is an ONNX export"):
        models.check_model_dir(str(onnx), onnx=False)


@pytest.mark.parametrize("flags", [("--dtype", "float32"), ("--load_in_4bit", "on"), ("--base", "x")])
def test_an_exports_precision_is_its_own(onnx, flags):
    with pytest.raises(UserError, match="is an ONNX export; leave --base, --load_in_4bit and --dtype out"):
        infer_creditmix.main(["--model_dir", str(onnx), "--features", "Age: 4", *flags])


WITHOUT = """
import runpy, sys
class Without:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("torch", "peft", "accelerate", "onnx", "onnxscript", "bitsandbytes")
        return None if hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name): return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_export_answers_where_torch_is_not_installed(onnx, capsys):
    argv = ["--model_dir", str(onnx), "--features", LINES[0]]
    infer_creditmix.main(argv)
    expected = json.loads(capsys.readouterr().out)
    words = [sys.executable, "-c", WITHOUT, "infer_creditmix.py", *argv]
    told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout) == expected


def test_the_server_takes_an_export(onnx, run, tmp_path):
    shutil.copytree(onnx, tmp_path / "onnx")
    shutil.copytree(run, tmp_path / "creditmix_sft")
    with serve(tmp_path, base_model=adapters.base_of(run)) as served:
        one, other = (served.post(f"/infer/{name}", {"features": LINES[0]}) for name in ("onnx", "sft"))
        assert one["raw_scores"] == pytest.approx(other["raw_scores"], abs=1e-3)
        assert one["prediction"] == other["prediction"]
        chat = {"model": "onnx", "messages": [{"role": "user", "content": "Hi"}]}
        assert "which ranks labels alone" in served.refused(422, "/v1/chat/completions", chat)
        entry = next(entry for entry in served.ask("GET", "/models")[1]["models"] if entry["name"] == "onnx")
        assert entry["loaded"] and entry["error"] is None
