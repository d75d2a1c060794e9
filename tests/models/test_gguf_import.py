"""GGUF files by name: the folder that is made of one, when it is made, and who takes it for a model."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from support.gguf_files import build, write
from support.inputs import CORPUS, ROOT, write_rows
from support.models import run_json

import export_model
import sft_train
from common import cli
from common.cli import UserError
from common.data import task_record
from common.jobs.checks import Reach
from common.models import adapters, flags, gguf_import, loading, tokenizers
from common.models.gguf_file import TASK_KEY
from common.models.gguf_import import model_folder
from common.serving.settings import ServerSettings
from common.vram import model_shape
from common.web.app import Problem


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GGUF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write(build("qwen2", vocab_size=320), "qwen2", tmp_path_factory.mktemp("files") / "small.Q8_0.gguf", "Q8_0")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_made_once_by_content(file, cache, tmp_path, capsys):
    folder = Path(model_folder(str(file)))
    assert folder == cache / f"small.Q8_0-{digest(file)[:16]}"
    assert gguf_import.origin(folder) == {"path": str(file), "sha256": digest(file)}
    assert f"into {folder} (0.00 GB, bfloat16)" in capsys.readouterr().err
    weights = (folder / "model.safetensors").stat()
    moved = tmp_path / "elsewhere" / file.name
    moved.parent.mkdir()
    moved.write_bytes(file.read_bytes())
    assert model_folder(str(moved)) == model_folder(str(moved.parent)) == model_folder(str(file)) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns
    assert capsys.readouterr().err == ""
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    moved.write_bytes(changed)
    assert model_folder(str(moved)) == str(cache / f"small.Q8_0-{digest(moved)[:16]}") != str(folder)


def test_one_place(tmp_path, monkeypatch):
    """A job runs in a folder of its own and finds what the checkout has."""
    monkeypatch.delenv("GGUF_CACHE")
    monkeypatch.chdir(ROOT)
    assert gguf_import.cache_folder() == Path("models/gguf")
    monkeypatch.chdir(tmp_path)
    assert gguf_import.cache_folder() == ROOT / "models" / "gguf"


def test_names(file, tmp_path):
    assert model_folder("Qwen/Qwen2.5-3B-Instruct") == "Qwen/Qwen2.5-3B-Instruct"
    assert model_folder(str(tmp_path)) == str(tmp_path) and model_folder("runs/none") == "runs/none"
    with pytest.raises(UserError, match=r"missing\.gguf does not exist; check the path"):
        model_folder("missing.gguf")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\); name one of them"):
        model_folder(str(tmp_path))
    for name in ("config.json", "model.safetensors"):  # a model that somebody also quantised
        (tmp_path / name).write_text("{}")
    assert model_folder(str(tmp_path)) == str(tmp_path)


def test_a_killed_conversion_leaves_nothing(file, cache, monkeypatch):
    target = cache / f"small.Q8_0-{digest(file)[:16]}"
    partial = cache / f".{target.name}.partial"
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("{}")  # killed before
    (partial / "model-00001-of-00009.safetensors").write_text("")
    whole = gguf_import.write_model

    def interrupted(made, folder, **_):
        whole(made, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_import, "write_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model_folder(str(file))
    assert not target.exists() and not partial.exists()
    monkeypatch.setattr(gguf_import, "write_model", whole)
    assert model_folder(str(file)) == str(target)
    assert not list(target.glob("*-of-*")) and not partial.exists()


def test_two_at_a_time_take_turns(file, monkeypatch):
    whole, made, entered = gguf_import.write_model, [], threading.Event()

    def slow(read, folder, **_):
        entered.set()
        made.append(folder)
        whole(read, folder)

    monkeypatch.setattr(gguf_import, "write_model", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(model_folder(str(file)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(found) == 3 and len(set(found)) == 1


def test_a_full_disk(file, cache, monkeypatch):
    monkeypatch.setattr(gguf_import.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"needs 0\.00 GB and 0\.00 GB are free; free some space, or set GGUF_CACHE"):
        model_folder(str(file))
    assert not list(cache.glob("small*"))


def test_known_without_its_weights(file, cache):
    """Checks and predictions need only the header."""
    name = str(file)
    loading.check_model_dir(name)
    assert loading.load_config(name).hidden_size == 64
    assert tokenizers.load_tokenizer(name).eos_token == "<|im_end|>"
    shape = model_shape.of(name)
    assert (shape.vocabulary, shape.layers, shape.kv_heads, shape.tied) == (320, 2, 2, True)
    assert not list(cache.glob("small*"))


def test_a_name_on_the_hub(file, monkeypatch, capsys):
    files = ["README.md", "x-Q4_K_M.gguf", "x-UD-Q4_K_M.gguf", "x-Q8_0-00001-of-00002.gguf", "mmproj-Q5_0.gguf"]
    found = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo, timeout: found)
    fetched = []

    def fetch(repo, name):
        fetched.append((repo, name))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    folder = model_folder("hf.co/owner/x-GGUF:q4_k_m")
    assert fetched == [("owner/x-GGUF", "x-Q4_K_M.gguf")]
    assert gguf_import.origin(folder) == {"path": "hf.co/owner/x-GGUF:q4_k_m", "sha256": digest(file)}
    assert model_folder("owner/x-GGUF:Q4_K_M") == folder
    with pytest.raises(UserError, match="owner/x has Q8_0 in parts"):
        model_folder("owner/x:Q8_0")
    with pytest.raises(UserError, match=r"owner/x has no GGUF in Q5_0; it has x-Q4_K_M\.gguf, x-UD-Q4_K_M\.gguf"):
        model_folder("owner/x:Q5_0")

    def offline(self, repo, timeout):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **how: str(file.parent))
    fetched.clear()
    assert model_folder("owner/x:Q8_0") == folder and not fetched  # the file that the Hub's cache has
    assert "what is cached is used" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    with pytest.raises(UserError, match=r"owner/x cannot be listed: .*\(ConnectionError\); download its GGUF"):
        model_folder("owner/x:Q8_0")


def test_a_name_on_the_hub_known_without_its_weights(file, monkeypatch, cache):
    monkeypatch.setattr(gguf_import, "hub_gguf", lambda *name: {("owner/x", "Q4_K_M"): file}[name])
    name = "hf.co/owner/x:Q4_K_M"
    assert model_shape.of(name) == model_shape.of(str(file))
    assert loading.load_config(name).to_dict() == loading.load_config(str(file)).to_dict()
    assert tokenizers.load_tokenizer(name).get_vocab() == tokenizers.load_tokenizer(str(file)).get_vocab()
    assert not cache.exists()


def test_flags(file):
    parser = cli.parser("")
    for flag, settings in {"student": {}, "teacher": {}, "base": {}, "model_dir": {"nargs": "+"}}.items():
        parser.add_argument(f"--{flag}", **settings)
    args = flags.parse_args(parser, ["--student", str(file), "--model_dir", "runs/a", str(file), "--base", "o/n"])
    folder = model_folder(str(file))
    assert (args.student, args.teacher, args.base, args.model_dir) == (folder, None, "o/n", ["runs/a", folder])


def test_servers(file, monkeypatch, tmp_path):
    monkeypatch.setenv("BASE_MODEL", str(file))
    assert ServerSettings.from_environment().base_model == model_folder(str(file))
    reach = Reach([file.parent])
    assert reach.model("student", str(file)) == str(file)
    assert reach.model("student", str(file.parent)) == str(file.parent)
    short = file.parent / "short.gguf"
    short.write_bytes(file.read_bytes()[:50_000])
    with pytest.raises(Problem, match=r"student: .*short\.gguf is cut short"):
        reach.model("student", str(short))
    short.unlink()
    with pytest.raises(Problem, match="there is no model"):
        Reach([tmp_path]).model("student", str(file))


def test_a_folder_of_the_hubs_cache(file, tmp_path):
    """A repository's, or a snapshot's; some have the original's config.json beside the files."""
    repo = tmp_path / "models--owner--x-GGUF"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "blobs").mkdir()
    (repo / "blobs" / "1").write_bytes(file.read_bytes())
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "x-Q8_0.gguf").symlink_to(repo / "blobs" / "1")
    (snapshot / "config.json").write_text("{}")
    (snapshot / "mmproj-x.gguf").write_bytes(b"")
    folder = gguf_import.packed_folder(str(repo))
    assert {gguf_import.packed_folder(str(path)) for path in (snapshot, snapshot / "x-Q8_0.gguf")} == {folder}
    assert gguf_import.file_of(folder) == snapshot / "x-Q8_0.gguf"
    assert Path(model_folder(str(repo)), "model.safetensors").is_file()
    (snapshot / "x-Q4_0.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds 2 GGUF files \(x-Q4_0.gguf, x-Q8_0.gguf\); name one of them"):
        gguf_import.packed_folder(str(repo))
    (snapshot / "model.safetensors").write_bytes(b"")  # which is the model, then
    assert gguf_import.packed_folder(str(snapshot)) == str(snapshot)


def test_an_export_that_is_run_as_it_is_keeps_its_folder(file, tmp_path):
    """Its calibration and its task lie there, and what is fitted and measured goes there."""
    exported = tmp_path / "exports" / "gguf"
    exported.mkdir(parents=True)
    (exported / file.name).write_bytes(file.read_bytes())
    assert gguf_import.packed_folder(str(exported)).endswith("-packed")
    (exported / "export.json").write_text("{}")
    assert gguf_import.packed_folder(str(exported)) == gguf_import.packed_folder(str(exported / file.name))
    assert gguf_import.packed_folder(str(exported)) == str(exported)
    assert adapters.adapter_hash(exported) == digest(file)
    assert gguf_import.file_of(model_folder(str(exported))) is None  # which has weights of its own


@pytest.mark.parametrize("text", ["{", '{"kind": "none"}', "[" * 5000])
def test_a_task_that_cannot_be_read_is_left_out(tmp_path, capsys, text):
    path = write(build("llama"), "llama", tmp_path / "told.gguf", keys={TASK_KEY: text})
    assert task_record.read(model_folder(str(path))) is None
    assert f"its {TASK_KEY} cannot be read and is left out" in capsys.readouterr().err


@pytest.mark.processes
def test_trained_and_exported(file, tmp_path):
    """An adapter on a GGUF and what is exported of it name the file."""
    rows = [{"input": text, "output": "Good"} for text in CORPUS[:8]]
    data, run, dev = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", tmp_path / "merged"
    argv = ["--student", str(file), "--data", data, "--save_dir", str(run), "--max_steps", "1", "--max_len", "512"]
    sft_train.main(argv)
    folder, made = model_folder(str(file)), {"path": str(file), "sha256": digest(file)}
    record = run_json(run)
    assert record["gguf"] == {"student": made} and record["base_model"] == folder
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == folder
    argv = ["--model_dir", str(run), "--format", "merged", "--save_dir", str(dev), "--proof_data", data]
    assert export_model.main([*argv, "--max_metric_drop", "1"]) == cli.DONE
    assert json.loads((dev / "export.json").read_text())["origin"]["gguf"] == {"base": made}
