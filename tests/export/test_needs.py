"""What an export needs of the machine is asked for, with numbers, before anything is loaded: of every format."""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import export_model
from common.cli import UserError
from common.export import genai_writer, gguf_writer, needs, parity
from common.export import merge as merging
from common.export.formats import FORMATS
from common.export.pipeline import ExportSettings
from common.export.proof_rows import ProofRows
from common.models import adapters, llama_cpp
from common.vram import preflight as vram

pytestmark = pytest.mark.exports
ROWS = ProofRows("dev.jsonl", ["prompt"], ["output"])


@pytest.fixture
def plan(run) -> ExportSettings:
    base = Path(adapters.base_of(run))
    return ExportSettings("gguf", run, base, False, "float32", "F16", "block", False, 1000, False, proof_rows=ROWS)


def refused(run: str, dev: str, tmp_path: Path, form: str, *more: str) -> str:
    argv = ["--model_dir", run, "--format", form, "--save_dir", str(tmp_path / "out"), *more]
    with pytest.raises(UserError) as error:
        export_model.main([*argv, *([] if "--no_proof" in more else ["--proof_data", dev])])
    assert list(tmp_path.iterdir()) == []
    return str(error.value)


def test_room_that_is_asked_for(plan):
    """Bytes a parameter of what is on the disk at once: the merged weights and what is made of them."""
    numbers = merging.Checkpoint(plan.base).numbers
    half = gguf_writer.predicted_bytes(plan.base, "F16")
    assert 2 * numbers <= half < 2.1 * numbers  # norms are in float32
    adapter = 2 * Path(plan.model_dir, adapters.ADAPTER_WEIGHTS).stat().st_size
    for changes, beside, temporary in (
        ({"format": "merged", "dtype": "bfloat16"}, 2 * numbers, 0),
        ({"format": "merged", "dtype": "bfloat16", "four_bit": True}, 4 * numbers, 0),  # two of them, to compare
        ({"format": "merged", "dtype": "bfloat16", "four_bit": True, "proof_rows": None}, 2 * numbers, 0),
        ({"format": "onnx"}, 8 * numbers, 0),
        ({"format": "onnx", "dtype": "float16"}, 6 * numbers, 0),
        ({"format": "int8"}, 8 * numbers, 0),
        ({"format": "gguf"}, 4 * numbers + half, half),
        ({"format": "gguf_lora"}, half + adapter, half),
        ({"format": "gguf_lora", "proof_rows": None}, adapter, 0),
    ):
        found = needs.disk_bytes(replace(plan, **changes))
        assert found == (int(beside * needs.ROOM), int(temporary * needs.ROOM)), changes


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M"])
def test_the_bytes_of_a_gguf_are_known_beforehand(quant, plan, tmp_path):
    pytest.importorskip("xllamacpp")
    _, tokenizer = merging.texts_of(str(plan.base), plan.base)
    gguf_writer.write(plan.base, tmp_path / "model.gguf", quant, tokenizer, [tokenizer.eos_token_id])
    size = (tmp_path / "model.gguf").stat().st_size
    texts = 60_000  # names, tokens and settings, which weigh something on a miniature alone
    predicted = gguf_writer.predicted_bytes(plan.base, quant)
    assert predicted < size < needs.ROOM * predicted + texts


@pytest.mark.parametrize("form", FORMATS)
def test_no_room(form, run, dev, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime_genai" if form == "onnx_genai" else "xllamacpp")
    monkeypatch.setattr(parity, "Measurement", None)
    monkeypatch.setattr(genai_writer, "HEAD_STEP", 1)  # it would refuse the miniature's heads
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    said = refused(run, dev, tmp_path, form)
    assert f"--format {form} needs about 0.0" in said
    assert said.endswith("GB on the disk of " + f"{tmp_path}, and 0.00 GB are free; free some space, or choose another "
                         "--save_dir")  # fmt: skip


def test_no_room_for_temporary_files(plan, tmp_path, monkeypatch):
    """Where they are on another disk, that one is asked, too."""
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one disk alone")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(other))
    monkeypatch.setattr(shutil, "disk_usage", lambda at: SimpleNamespace(free=1000 if Path(at) == other else 1 << 40))
    with pytest.raises(UserError, match=r"on the disk of /dev/shm, and .*; free some space, or set TMPDIR to a folder"):
        needs.check_room(plan, tmp_path / "out")
    needs.check_room(replace(plan, format="onnx"), tmp_path / "out")


@pytest.mark.parametrize("form", FORMATS)
def test_no_memory(form, run, dev, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime_genai" if form == "onnx_genai" else "xllamacpp")
    monkeypatch.setattr(parity, "Measurement", None)
    monkeypatch.setattr(genai_writer, "HEAD_STEP", 1)  # it would refuse the miniature's heads
    for name in ("free_bytes", "free_machine_bytes"):
        monkeypatch.setattr(vram, name, lambda: 1 << 20)
    said = refused(run, dev, tmp_path, form)
    assert f"--format {form} takes about 0." in said
    assert said.endswith("GB of memory (the run itself), and 0.0 GB are free; pass --no_proof, or take a machine "
                         "with more memory")  # fmt: skip
    if form != "gguf_lora":
        said = refused(run, dev, tmp_path, form, "--no_proof")
        assert said.endswith("GB of memory (merging), and 0.0 GB are free; lower --max_shard_gb")


def test_each_part_of_an_export_is_asked_for(plan):
    """The part that is short is named, with what helps against it."""
    parts = {form: [phase.what for phase in needs.phases(replace(plan, format=form))] for form in FORMATS}
    assert parts == {
        "merged": ["the run itself", "merging", "its proof"],
        "onnx": ["the run itself", "merging", "the graph", "its proof in ONNX Runtime"],
        "int8": ["the run itself", "merging", "the graph", "its proof in ONNX Runtime"],
        "onnx_genai": ["the run itself", "merging", "the graph", "its proof in onnxruntime-genai"],
        "gguf": ["the run itself", "merging", "writing the GGUF", "its proof in llama.cpp"],
        "gguf_lora": ["the run itself", "writing the GGUF", "its proof in llama.cpp"],
    }
    without = [phase.what for phase in needs.phases(replace(plan, proof_rows=None, imatrix=ROWS))]
    assert without == ["merging", "--imatrix", "writing the GGUF"]
    for phase in needs.phases(plan):
        larger = {other.size for other in needs.phases(plan) if other.size > phase.size}
        if not larger:
            with pytest.raises(UserError, match=phase.what):
                needs.check_memory(plan, lambda on_device, most=phase.size: most - 1)
    needs.check_memory(plan, lambda on_device: None)  # not known


@pytest.mark.parametrize(
    ("form", "package", "sentence"),
    [
        ("onnx", "onnxscript", "onnx is written with onnxscript, which is not installed; pip install -r"),
        ("onnx", "onnxruntime", r"is proven in onnxruntime, .* pip install -r requirements.txt, or pass --no_proof"),
        ("int8", "onnxruntime", "int8 is written with onnxruntime, which is not installed; pip install -r"),
        ("onnx_genai", "onnxruntime_genai", r"genai, which is not installed; pip install -r requirements/export.txt"),
    ],
)
def test_a_runtime_that_is_not_there(form, package, sentence, run, dev, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "Measurement", None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=sentence):
        needs.check_runtime(form, run, "Q8_0")
    if form == "onnx":
        monkeypatch.undo()
        needs.check_runtime(form, run, "Q8_0")


def test_what_needs_no_llama_cpp(run, monkeypatch):
    """Q8_0 is written without it; what is to be proven, or rounded by its kernels, is not."""
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    llama_cpp.library.cache_clear()
    needs.check_runtime("gguf", run, "Q8_0", proves=False)
    needs.check_runtime("gguf_lora", run, "Q4_K_M", proves=False)
    for quant, proves in (("Q8_0", True), ("Q4_K_M", False)):
        with pytest.raises(UserError, match=r"pip install -r requirements/export.txt"):
            needs.check_runtime("gguf", run, quant, proves=proves)
    llama_cpp.library.cache_clear()
