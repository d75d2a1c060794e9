"""export_model.py: what is refused, what is kept apart, what an interruption leaves."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.exported import STORIES, export_run, stories
from support.inputs import write_rows
from support.models import build_base
from support.served import make_run

import export_model
from common import cli
from common.cli import UserError
from common.export import merge as merging
from common.export import parity
from common.export import pipeline as export
from common.export.proof_rows import read_proof_rows
from common.models import adapters
from common.tasks.ranking.creditmix import CREDITMIX

pytestmark = pytest.mark.exports


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
    result = json.loads(said.out.splitlines()[-1])
    assert result["passed"] is False and result["changed"]
    first = result["changed"][0]
    assert (
        first["before"] != first["after"]
        and f'row {first["row"]}: "{first["before"]}" -> "{first["after"]}"' in said.out
    )
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


def refused(run: str, dev: str, tmp_path: Path, *more: str, form: str = "merged", proof: bool = True) -> str:
    argv = ["--model_dir", run, "--format", form, "--save_dir", str(tmp_path / "out"), *more]
    argv += ["--proof_data", dev] * proof
    with pytest.raises(UserError) as error:
        export_model.main(argv)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    return str(error.value)


def test_flags_that_do_not_go_together(run, base, dev, tmp_path):
    assert "--dtype bfloat16 is not for --format onnx" in refused(
        run, dev, tmp_path, "--dtype", "bfloat16", form="onnx"
    )
    assert "--dtype float16 is not for --format int8" in refused(run, dev, tmp_path, "--dtype", "float16", form="int8")
    assert "--quant is for --format gguf" in refused(run, dev, tmp_path, "--quant", "F16")
    assert "--imatrix is for --format gguf" in refused(run, dev, tmp_path, "--imatrix", dev)
    assert "--imatrix none.jsonl does not exist" in refused(run, dev, tmp_path, "--imatrix", "none.jsonl", form="gguf")
    assert "--scales is for --format int8" in refused(run, dev, tmp_path, "--scales", "channel")
    assert "--keep_lm_head is for --format int8" in refused(run, dev, tmp_path, "--keep_lm_head")
    for size in ("0", "nan", "inf"):
        assert "--max_shard_gb must be above 0" in refused(run, dev, tmp_path, "--max_shard_gb", size)
    for quant in ("Q8_0", "F16", "BF16"):
        assert (
            f"--imatrix changes nothing in {quant}; leave it out, or give --quant Q4_K_M or Q5_K_M or Q6_K"
            in refused(run, dev, tmp_path, "--imatrix", dev, "--quant", quant, form="gguf")
        )
    assert "is a whole model; leave it out" in refused(base, dev, tmp_path, "--base", base)
    assert "--max_metric_drop must be 0 or above" in refused(run, dev, tmp_path, "--max_metric_drop", "nan")
    for flag, value in (("--proof_rows", ["3"]), ("--max_metric_drop", ["0"]), ("--push_to_hub", ["o/n"])):
        assert f"{flag} goes with a proof; leave it out, or --no_proof" in refused(
            run, dev, tmp_path, "--no_proof", flag, *value, proof=False
        )
    assert "would replace --model_dir" in refused(run, dev, tmp_path, "--save_dir", run, "--overwrite")
    assert "is there already; pass --overwrite" in refused(run, dev, tmp_path, "--save_dir", str(tmp_path))


def test_what_an_export_is_made_of_is_not_replaced(run, base, dev, tmp_path):
    """Neither with the folder itself nor with one that it lies in, nor by an export that fails its proof."""
    for what, path in (("--model_dir", run), ("the base", base), ("--proof_data", dev)):
        parent = str(Path(path).parent)
        if Path(path).is_dir():
            assert f"{path} would replace {what}" in refused(run, dev, tmp_path, "--save_dir", path, "--overwrite")
        assert f"{parent} would replace " in refused(run, dev, tmp_path, "--save_dir", parent, "--overwrite")
        assert Path(path).exists()
    lost = Path(shutil.copytree(run, tmp_path / "mine.rejected"))
    said = refused(str(lost), dev, tmp_path, "--save_dir", str(tmp_path / "mine"))
    assert f"{lost} would replace --model_dir {lost}; choose another --save_dir" in said


def test_an_unknown_architecture(tiny_base, dev, tmp_path):
    strange = Path(shutil.copytree(tiny_base, tmp_path / "strange"))
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps(config | {"model_type": "ours"}))
    assert "onnx is for the architectures llama, mistral, qwen2, qwen3, gemma3_text, smollm3, and" in refused(
        str(strange), dev, tmp_path, form="onnx"
    )
    assert "onnx_genai is for the architectures llama, mistral, qwen2, qwen3, gemma3_text, and" in refused(
        str(strange), dev, tmp_path, form="onnx_genai"
    )
    assert (
        "gguf is for the architectures llama, mistral, qwen2, qwen3, smollm3, gemma3_text, lfm2, qwen3_5_text, and"
        in refused(str(strange), dev, tmp_path, form="gguf")
    )
    assert "is of no known architecture" in refused(str(strange), dev, tmp_path)


def test_an_adapter_without_its_base(run, dev, tmp_path, tokenizer):
    lost = Path(shutil.copytree(run, tmp_path / "lost"))
    config = json.loads((lost / adapters.ADAPTER_CONFIG).read_text())
    (lost / adapters.ADAPTER_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "/not/there"}))
    assert "needs its base /not/there, which is not there" in refused(str(lost), dev, tmp_path)
    assert "the base /not/there does not exist" in refused(run, dev, tmp_path, "--base", "/not/there")
    other = build_base(tmp_path / "other", tokenizer, seed=5)
    assert "was trained on other base weights" in refused(run, dev, tmp_path, "--base", other)
    export_run(str(lost), "merged", tmp_path / "found", dev, "--base", adapters.base_of(run))


def test_proof_rows_that_cannot_be(run, dev, tmp_path):
    assert "does not exist; give rows to compare on" in refused(run, "none.jsonl", tmp_path)
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": "x"}])
    empty, none = write_rows(tmp_path / "empty.jsonl", []), tmp_path / "none.json"
    none.write_text("[]")
    for rows, sentence in (
        (bad, "bad.jsonl, line 1: a row of {0} has question and answer, or input and output; give such rows"),
        (empty, "is empty; give a file with rows"),
        (str(none), "none.json has no rows; give some with {0}"),
    ):
        assert sentence.format("--proof_data") in refused(run, rows, tmp_path)
        with pytest.raises(UserError, match=re.escape(sentence.format("--imatrix"))):
            read_proof_rows(rows, CREDITMIX, run, None, flag="--imatrix", runs_code=True)


# A pretrained model that nobody here made.


@pytest.mark.skipif(not STORIES.is_dir(), reason="the pretrained model is not there")
def test_a_pretrained_model(tmp_path):
    run = str(make_run(tmp_path / "run", str(STORIES), seed=1))
    record = export_run(run, "merged", tmp_path / "out", stories(tmp_path))
    assert record["proof"]["logits"]["mean_kl"] < 1e-9
    assert record["proof"]["generated"]["equal"] == record["proof"]["generated"]["prompts"] == 3
