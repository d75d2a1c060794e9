"""GGUF files in the server: every task as the scripts do it on the same file, whatever else goes on, and its limits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
from support.gguf_files import build, write
from support.host import run_host
from support.inputs import read_rows, write_rows
from support.served import ROWS, chat_turn, make_run, serve, settings

import infer_codegen
import infer_creditmix
import infer_idp
from common import cli
from common.cli import UserError
from common.data import task_record
from common.files import write_json
from common.models import gguf_import, unproven
from common.models.onnx_runtime import OnnxModel
from common.models.source import CannotDo
from common.serving.run_registry import Registry
from common.serving.settings import ServerSettings
from common.serving.view import View
from common.serving.work import Chat, ChatTurn, Classify
from common.tasks.ranking.calibration import Calibration
from common.tasks.ranking.creditmix import CREDITMIX
from common.vram import preflight as vram

pytest.importorskip("xllamacpp")
pytestmark = [pytest.mark.exports, pytest.mark.processes]

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "n": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
ENGINE = ["--engine", "llama_cpp"]
RUN = "creditmix_sft"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGUF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write(build("llama"), "llama", tmp_path_factory.mktemp("files") / "model-F32.gguf")


@pytest.fixture(scope="module")
def gguf_runs(file, tmp_path_factory) -> Path:
    """An export of a run that was trained on CreditMix, with its calibration, and a file alone. Not to be changed."""
    runs = tmp_path_factory.mktemp("served") / "runs"
    for name in (RUN, "alone"):
        (runs / name).mkdir(parents=True)
        shutil.copy(file, runs / name / file.name)
    write_json(runs / RUN / "export.json", {"format": "gguf", "unproven": True})
    task_record.write(runs / RUN, CREDITMIX.record())
    fitted = Calibration(CREDITMIX.labels, "fitted", bias=(1.5, -0.5, 0.0), temperature=2.0, fitted_on={"file": "dev"})
    fitted.save(runs / RUN / "calibration.json")
    return runs


@pytest.fixture(scope="module")
def served(gguf_runs):
    with serve(gguf_runs, base_model=gguf_import.packed_folder(str(gguf_runs / "alone"))) as running:
        yield running


def printed(script, capsys, *argv: str) -> str:
    script.main([*argv, *ENGINE])
    return capsys.readouterr().out


def test_labels_as_infer_creditmix_ranks_them(served, gguf_runs, capsys):
    """With the calibration that lies beside the export; the file alone has none."""
    for run in (RUN, "alone"):
        folder = str(gguf_runs / run)
        for row in ROWS[:2]:
            wanted = json.loads(printed(infer_creditmix, capsys, "--model_dir", folder, "--features", row))
            assert served.post(f"/infer/{run}", {"features": row}) == wanted
        assert (wanted["scores"] != pytest.approx(served.post("/infer/base", {"features": row})["scores"])) == (
            run == RUN
        )
    batch = served.post(f"/infer/{RUN}/batch", [{"features": row} for row in ROWS[:5]])
    assert [answer["prediction"] for answer in batch[:2]] == [
        served.post("/infer/sft", {"features": row})["prediction"] for row in ROWS[:2]
    ]


def test_documents_and_code_as_the_scripts_write_them(served, gguf_runs, tmp_path, capsys):
    schema = write_rows(tmp_path / "schema.json", [SCHEMA])
    folder, more = str(gguf_runs / "alone"), ("--max_new_tokens", "60")
    argv = ("--model_dir", folder, "--schema", schema, "--typed_fields", "held", "--document", "Anna, 12", *more)
    fields = json.loads(printed(infer_idp, capsys, *argv))
    asked = {"document": "Anna, 12", "schema": SCHEMA, "typed_fields": "held", "max_new_tokens": 60, "run": "alone"}
    assert served.post("/infer/idp", asked | {"confidence": True})["fields"] == fields
    code = printed(infer_codegen, capsys, "--model_dir", folder, "--prompt", "add two numbers", *more)
    asked = {"prompt": "add two numbers", "max_new_tokens": 60}
    assert served.post("/infer/codegen", asked)["code"] == code.removesuffix("\n")  # by the base: RUN is of labels
    _, events, _ = served.ask("POST", "/infer/codegen", asked | {"stream": True})
    assert json.loads(events.rsplit("data: ", 1)[1])["code"] == code.removesuffix("\n")


def test_chats_and_questions(served):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    chat = {"model": "alone", "messages": [chat_turn("user")], "max_tokens": 60}
    held = served.post("/v1/chat/completions", chat | {"response_format": form, "n": 2, "temperature": 1, "seed": 3})
    assert all(json.loads(choice["message"]["content"]).keys() == {"name", "n"} for choice in held["choices"])
    question = {"type": "predicate", "name": "q", "instructions": "It is late."}
    decided = served.post("/v1/decisions", {"model": "alone", "input": "x", "questions": [question]})
    assert 0 < decided["answers"][0]["probability"] < 1


def test_what_the_server_says_of_them(served):
    models = {model["name"]: model for model in served.ask("GET", "/models")[1]["models"]}
    assert {name: (about["engine"], about["unproven"], about["error"]) for name, about in models.items()} == {
        "base": ("llama_cpp", False, None),
        "alone": ("llama_cpp", False, None),
        RUN: ("llama_cpp", True, None),
    }
    assert models[RUN]["labels"] == list(CREDITMIX.labels)


def test_rows_are_ranked_between_the_tokens_of_a_text(gguf_runs):
    """Which goes on as if nothing had been."""
    version = Registry(str(gguf_runs), None).find("alone")
    turn = ChatTurn([{"role": "user", "content": ROWS[0]}])
    chat = (version, Chat(40, 0.0, 1.0, 1, 0, (), None)), turn
    rows = (version, Classify()), [CREDITMIX.prompt(ROWS[1])]
    host = settings(gguf_runs).host
    alone = [run_host(version.base, host, asked, adapters=0).answers() for asked in ([chat], [rows, rows])]
    together = run_host(version.base, host, [chat, rows, rows], adapters=0)
    assert [number for number, _ in together.numbered()] == [1, 2, 0]
    answers = dict(together.numbered())
    assert answers[0].choices == alone[0][0].choices and [answers[1], answers[2]] == alone[1]


def test_a_file_that_is_too_large_for_the_memory(gguf_runs, monkeypatch):
    version = Registry(str(gguf_runs), None).find("alone")
    plan = vram.packed_plan(SimpleNamespace(model_dir=version.base), max_batch_tokens=8192)
    monkeypatch.setattr(vram, "free_machine_bytes", lambda: vram.predict(plan).total - 1)
    host = settings(gguf_runs, max_batch_tokens=8192).host
    messages = run_host(version.base, host, [((version, Classify()), [CREDITMIX.prompt(ROWS[0])])], adapters=0)
    assert messages.sent[0].reason.endswith("are free; MAX_BATCH_TOKENS=4096")


def test_recurrent_layers_rank_and_write(tmp_path):
    (tmp_path / "runs" / "lfm").mkdir(parents=True)
    write(build("lfm2"), "lfm2", tmp_path / "runs" / "lfm" / "model.gguf")
    with serve(tmp_path / "runs") as served:
        assert served.post("/infer/lfm", {"features": ROWS[0]})["prediction"] in CREDITMIX.labels
        assert served.post("/infer/codegen", {"prompt": "add", "run": "lfm", "max_new_tokens": 4})


def test_an_adapter_is_put_on_no_gguf(file, base, tmp_path):
    runs = tmp_path / "runs"
    for name in ("exported", "adapter_alone"):
        (runs / name).mkdir(parents=True)
    shutil.copy(file, runs / "exported" / file.name)
    writer = gguf.GGUFWriter(runs / "adapter_alone" / "adapter.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    run = make_run(runs / "sft_idp", base, seed=1)
    config = json.loads((run / "adapter_config.json").read_text())
    write_json(run / "adapter_config.json", config | {"base_model_name_or_path": str(runs / "exported")})
    registry = Registry(str(runs), None)
    with pytest.raises(
        UserError, match=r"a GGUF that llama.cpp runs as it is, and no adapter can be put on one; train"
    ):
        registry.find("sft_idp")
    with pytest.raises(UserError, match=r"is a LoRA adapter alone, which is put on no GGUF here .*; give the run"):
        registry.find("adapter_alone")
    assert not registry.writes("adapter_alone") and registry.writes("exported")
    shutil.copy(file, runs / "exported" / "other.gguf")
    with pytest.raises(UserError, match=r"holds 2 GGUF files .*; name one of them"):
        registry.find("exported")


def test_a_file_that_is_written_anew_is_another_version(file, tmp_path, monkeypatch):
    monkeypatch.setattr("common.serving.run_registry.SETTLING", 0.0)
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    shutil.copy(file, run / file.name)
    registry = Registry(str(tmp_path / "runs"), None)
    first = registry.find("a")
    write(build("llama", hidden_size=32), "llama", run / file.name)
    assert registry.find("a").sha256 != first.sha256


def test_the_engine_of_the_base(file, base, monkeypatch):
    def set_to(**variables: str) -> str | None:
        for name in ("BASE_MODEL", "ENGINE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return ServerSettings.from_environment().base_model

    assert set_to(BASE_MODEL=str(file)) == gguf_import.model_folder(str(file))
    assert set_to(BASE_MODEL=str(file), ENGINE="llama_cpp") == gguf_import.packed_folder(str(file))
    for variables, sentence in (
        ({"ENGINE": "llama_cpp"}, "runs the GGUF that BASE_MODEL names; set BASE_MODEL to one, or unset ENGINE"),
        ({"ENGINE": "llama_cpp", "BASE_MODEL": base}, f"BASE_MODEL={base} is none; make one with export_model.py"),
        ({"ENGINE": "onnx"}, "ENGINE=onnx is none of torch, llama_cpp"),
    ):
        with pytest.raises(UserError, match=sentence):
            set_to(**variables)


def test_a_row_beyond_the_context_is_known_before_a_gguf_is_run(gguf_runs, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"features": ROWS[0]}, {"features": "9 " * 5000}])
    argv = ["--model_dir", str(gguf_runs / RUN), *ENGINE, "--input", rows, "--output", str(tmp_path / "out.jsonl")]
    assert cli.run(infer_creditmix.main, argv) == cli.BAD_INPUT
    assert "rows.jsonl, line 2: the row has " in capsys.readouterr().err
    assert cli.run(infer_creditmix.main, [*argv, "--skip_bad_rows"]) == cli.DONE
    assert len(read_rows(tmp_path / "out.jsonl")) == 1


def test_an_onnx_export_writes_no_text():
    view = View(SimpleNamespace(model=OnnxModel.__new__(OnnxModel)), SimpleNamespace(name="onnx"), None, None)
    with pytest.raises(CannotDo, match="ranks labels alone; ask for the run it is of, or a GGUF export of that"):
        _ = view.model


def test_what_is_unproven_says_so_once(gguf_runs, capsys):
    assert unproven.is_unproven(gguf_runs / RUN) and not unproven.is_unproven(gguf_runs / "alone")
    copy = Path(shutil.copytree(gguf_runs / RUN, gguf_runs.parent / "exports" / "copy"))
    for _ in range(2):
        argv = ["--model_dir", str(copy), "--features", ROWS[0], *ENGINE]
        assert cli.run(infer_creditmix.main, argv) == cli.DONE
    assert capsys.readouterr().err.count(f"{copy} is unproven: it was exported with --no_proof") == 1
