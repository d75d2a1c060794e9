"""Exports without a proof: nothing is measured, the files say so themselves, and so does whatever runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import onnx as onnx_format
import pytest
from support.exported import LINES

import export_model
import infer_creditmix
from common import cli
from common.export import onnx_writer, parity
from common.models import gguf_import, unproven
from common.models.gguf_file import UNPROVEN_KEY, GgufFile
from common.models.onnx_runtime import OnnxModel

pytestmark = pytest.mark.exports


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(parity, "Measurement", None)
    monkeypatch.setenv("GGUF_CACHE", str(tmp_path / "cache"))


def made(run: str, form: str, folder: Path, capsys, *more: str) -> dict:
    """The export.json of an unproven export."""
    argv = ["--model_dir", run, "--format", form, "--save_dir", str(folder), "--no_proof", *more]
    assert export_model.main(argv) == cli.DONE
    out = capsys.readouterr().out
    assert out.startswith("unproven: ")
    last = json.loads(out.splitlines()[-1])
    assert last["unproven"] is True and last["passed"] is None
    record = json.loads((folder / "export.json").read_text())
    assert record["unproven"] is True and "proof" not in record
    card = (folder / "README.md").read_text()
    assert "**Unproven.** It was exported with `--no_proof`" in card and "- unproven" in card
    assert unproven.is_unproven(folder)
    return record


def test_a_plain_folder(run, tmp_path, capsys):
    record = made(run, "merged", tmp_path / "out", capsys)
    assert record["merged_into"] == "original base"
    infer_creditmix.main(["--model_dir", str(tmp_path / "out"), "--features", LINES[0]])
    assert f"{tmp_path / 'out'} is unproven: it was exported with --no_proof" in capsys.readouterr().err


def test_a_base_in_4_bits_is_merged_once(run, tmp_path, capsys):
    record = made(run, "merged", tmp_path / "out", capsys, "--load_in_4bit", "on")
    assert record["merged_into"] == "de-quantised NF4 base" and "also_tried" not in record


def test_an_onnx_file(onnx, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(onnx_writer, "export", lambda model, target: shutil.copy(onnx / "model.onnx", target))
    assert not OnnxModel(str(onnx)).unproven and not unproven.is_unproven(onnx)
    for form in ("onnx", "int8"):
        folder = tmp_path / form
        made(run, form, folder, capsys)
        (folder / "export.json").unlink()  # the file alone says so, too
        infer_creditmix.main(["--model_dir", str(folder), "--features", LINES[0]])
        assert f"{folder} is unproven" in capsys.readouterr().err


def test_weights_beside_an_onnx_file_stay(onnx, tmp_path):
    for name in ("model.onnx", "config.json"):
        shutil.copy(onnx / name, tmp_path / name)
    model = onnx_format.load(str(tmp_path / "model.onnx"))
    onnx_format.save(model, str(tmp_path / "model.onnx"), save_as_external_data=True, location="model.onnx_data")
    before = (tmp_path / "model.onnx_data").read_bytes()
    onnx_writer.mark_unproven(tmp_path)
    assert (tmp_path / "model.onnx_data").read_bytes() == before
    assert OnnxModel(str(tmp_path)).unproven


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M"])
def test_a_gguf(quant, run, tmp_path, capsys):
    pytest.importorskip("xllamacpp")
    made(run, "gguf", tmp_path / "out", capsys, "--quant", quant)
    file = tmp_path / "out" / f"model-{quant}.gguf"
    assert GgufFile(file).get(UNPROVEN_KEY) is True
    alone = shutil.copy(file, tmp_path / "alone.gguf")
    for more in ((), ("--engine", "llama_cpp")):  # as a model folder that is made of it, and as it is
        infer_creditmix.main(["--model_dir", str(alone), "--features", LINES[0], *more])
        assert capsys.readouterr().err.count(" is unproven: it was exported with --no_proof") == 1
    assert gguf_import.origin(gguf_import.model_folder(str(alone)))["unproven"] is True


def test_an_adapter_alone(run, tmp_path, capsys):
    """Its base, which only the proof needs, is not written."""
    made(run, "gguf_lora", tmp_path / "out", capsys)
    assert gguf.GGUFReader(tmp_path / "out" / "adapter.gguf").fields[UNPROVEN_KEY].contents() is True
