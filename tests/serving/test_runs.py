"""Runs, their versions and their bases, as the inference server finds, loads and leaves them."""

from __future__ import annotations

import json
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.inputs import LABELS, ROOT
from support.models import build_base
from support.processes import wait_for
from support.served import (
    NAMES,
    ROWS,
    make_run,
    replace_adapter,
    same,
    serve,
)

from common.models.source import ModelSource
from common.serving.run_registry import LOOK, BadName, Registry, UnknownRun
from common.serving.settings import ServerSettings
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.loading import load_task

pytestmark = pytest.mark.processes


def test_models_lists_every_run(served, runs):
    served.post("/infer/sft", {"features": ROWS[0]})
    listed = served.ask("GET", "/models")[1]
    assert (listed["task"], listed["labels"]) == ("creditmix", ["Good", "Standard", "Bad"])
    assert listed["short_names"] == {"sft": "creditmix_sft", "kd": "creditmix_kd", "dpo": "creditmix_dpo"}
    entries = {entry["name"]: entry for entry in listed["models"]}
    assert list(entries) == ["base", "creditmix_dpo", "creditmix_kd", "creditmix_sft"]
    sft = entries["creditmix_sft"]
    assert (sft["method"], sft["created"], sft["loaded"]) == ("sft", "2026-01-02T03:04:05Z", True)
    assert sft["address"] == f"creditmix_sft@{sft['adapter_sha256'][:16]}"
    assert len(sft["adapter_sha256"]) == 64
    assert listed["base_model"] == sft["base"] == listed["bases"][0]
    assert [model["id"] for model in served.ask("GET", "/v1/models")[1]["data"]] == list(entries)


def test_figures_of_an_evaluated_run(runs, tmp_path, base):
    run = Path(shutil.copytree(runs / "creditmix_sft", tmp_path / "runs" / "sft"))
    figures = {"evaluator": "creditmix", "split": "validation", "n": 90, "models": [
        {"model_dir": "elsewhere/kd", "accuracy": {"value": 0.1}},
        {"model_dir": "runs/sft", "accuracy": {"value": 0.75, "low": 0.7}, "confusion": [[1]]}]}  # fmt: skip
    (run / "metrics.json").write_text(json.dumps(figures))
    (tmp_path / "runs" / "broken" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "broken" / "adapter_config.json").write_text("{")
    with serve(tmp_path / "runs", base_model=base) as served:
        base_entry, broken, sft = served.ask("GET", "/models")[1]["models"]
    assert sft["metrics"] == {"evaluator": "creditmix", "split": "validation", "n": 90, "accuracy": 0.75}
    assert sft["evaluations"][0]["figures"] == {"accuracy": {"value": 0.75, "low": 0.7}}
    assert base_entry["metrics"] is None
    assert "adapter_config.json is broken" in broken["error"]


def test_a_changed_adapter_is_picked_up_and_the_old_one_stays_within_reach(own, runs, expected, monkeypatch):
    monkeypatch.setattr("common.serving.run_registry.LOOK", 0.0)
    row = {"features": ROWS[0]}
    with serve(own) as served:
        before = served.post("/infer/sft", row)
        old = served.server.registry.find("sft")
        replace_adapter(own / "creditmix_sft", runs / "creditmix_kd")
        after = served.post("/infer/sft", row)
        assert after["raw_scores"] == pytest.approx(expected["kd"][0]["raw_scores"], abs=1e-4)
        assert served.post(f"/infer/{old.address}", row) == before
        assert served.post(f"/infer/sft@{old.sha256[:8]}", row) == before
        entries = [entry for entry in served.ask("GET", "/models")[1]["models"] if entry["name"] == "creditmix_sft"]
        assert [(entry["current"], entry["adapter_sha256"] == old.sha256) for entry in entries] == [
            (True, False),
            (False, True),
        ]
        assert "has no version 0123456789; there are: creditmix_sft@" in served.refused(
            404, "/infer/sft@0123456789", row
        )
        (own / "creditmix_sft" / "adapter_config.json").touch()  # the same weights: no version of its own
        assert served.post("/infer/sft", row) == after
        assert len(served.server.registry.versions("creditmix_sft")) == 2


def test_only_the_last_versions_stay_loaded(own, tmp_path, base, monkeypatch):
    monkeypatch.setattr("common.serving.run_registry.LOOK", 0.0)
    with serve(own) as served:
        answers = []
        for seed in range(5):
            replace_adapter(own / "creditmix_sft", make_run(tmp_path / f"other{seed}", base, seed=10 + seed))
            answers.append(served.post("/infer/sft", {"features": ROWS[0]})["raw_scores"]["Good"])
        (process,) = served.processes
        assert len({*answers}) == 5
        assert len([version for version in process.state.views if version.name == "creditmix_sft"]) == 3


def test_a_run_that_was_deleted_is_answered_for_no_more(tmp_path):
    """At once, by its name and by its hash; another on the same base is found as before."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
        (tmp_path / name / "adapter_model.safetensors").write_text(name)
    registry = Registry(str(tmp_path), None)
    gone, other = registry.find("a"), registry.find("b")
    registry.find(gone.address)
    assert registry.known("a") == registry.known(gone.address) == gone
    (tmp_path / "a").rename(tmp_path / ".a.deleted")
    for address in ("a", gone.address):
        assert registry.known(address) is None
        with pytest.raises(UnknownRun, match="there is no run 'a'; there are: base, b"):
            registry.find(address)
    assert registry.known("b") == other


def test_files_that_are_being_written_are_left_alone(own, runs, monkeypatch):
    monkeypatch.setattr("common.serving.run_registry.LOOK", 0.0)
    monkeypatch.setattr("common.serving.run_registry.SETTLING", 3.0)
    with serve(own) as served:
        before = served.post("/infer/sft", {"features": ROWS[0]})
        weights = own / "creditmix_sft" / "adapter_model.safetensors"
        whole = (runs / "creditmix_kd" / "adapter_model.safetensors").read_bytes()
        weights.write_bytes(whole[:1000])
        assert served.post("/infer/sft", {"features": ROWS[0]}) == before
        weights.write_bytes(whole)
        wait_for(lambda: served.post("/infer/sft", {"features": ROWS[0]}) != before)


def test_a_new_calibration_is_picked_up(own):
    from common.tasks.ranking.calibration import Calibration

    with serve(own) as served:
        before = served.post("/infer/sft", {"features": ROWS[0]})
        Calibration(LABELS, "fitted", bias=(0.0, 40.0, 0.0)).save(own / "creditmix_sft" / "calibration.json")
        time.sleep(1.1 * LOOK)
        after = served.post("/infer/sft", {"features": ROWS[0]})
        assert (after["prediction"], after["raw_scores"]) == ("Standard", before["raw_scores"])
        (own / "creditmix_sft" / "calibration.json").write_text("{}")
        time.sleep(1.1 * LOOK)
        assert "is not a calibration file" in served.refused(409, "/infer/sft", {"features": ROWS[0]})


def test_another_label_set(own, monkeypatch):
    task = load_task(str(ROOT / "recipes" / "ticket_severity.yaml"))
    shutil.copytree(own / "creditmix_sft", own / "ticket_severity_sft")
    wanted = Classifier.load(ModelSource(str(own / "ticket_severity_sft")), task)
    text = "Mail. Users affected: 3, Hours open: 2, mails arrive an hour late, no workaround"
    with serve(own, task=task, num_null_prompts=len(task.null_inputs)) as served:
        answer = served.post("/infer/sft", {"features": text})
        listed = served.ask("GET", "/models")[1]
    same(answer, wanted.answers([text], wanted.calibration(None))[0])
    assert (listed["task"], listed["labels"]) == ("ticket_severity", list(task.labels))
    monkeypatch.setenv("TASK", str(ROOT / "recipes" / "ticket_severity.yaml"))
    chosen = ServerSettings.from_environment().host
    assert (chosen.task, chosen.num_null_prompts) == (task, 4)


def test_an_adapter_that_does_not_fit_is_refused_and_harms_nobody(
    own, tokenizer, tmp_path, base, expected, monkeypatch
):
    monkeypatch.setattr("common.serving.run_registry.LOOK", 0.0)
    other = build_base(tmp_path / "wide", tokenizer, hidden=64)
    misfit = make_run(own / "misfit", other, seed=1)
    config = json.loads((misfit / "adapter_config.json").read_text())
    (misfit / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    bare = Path(shutil.copytree(misfit, own / "bare"))
    (bare / "run.json").unlink()
    empty = Path(shutil.copytree(misfit, own / "empty"))
    (empty / "adapter_model.safetensors").unlink()
    homeless = Path(shutil.copytree(misfit, own / "homeless"))
    (homeless / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    row = {"features": ROWS[0]}
    with serve(own) as served:
        for _ in range(2):  # before another adapter is on the base, and after
            assert "does not fit the base" in served.refused(409, "/infer/bare", row)
            assert "was trained on other base weights" in served.refused(409, "/infer/misfit", row)
            assert "has no adapter_model.safetensors" in served.refused(409, "/infer/empty", row)
            assert "needs its base /gone/base, which is not there" in served.refused(409, "/infer/homeless", row)
            for name in NAMES:
                same(served.post(f"/infer/{name}", row), expected[name][0] | {"model_name": model_name(served, name)})
        replace_adapter(bare, own / "creditmix_kd")
        for file in ("adapter_config.json", "run.json"):
            shutil.copy(own / "creditmix_kd" / file, bare / file)
        wait_for(lambda: served.ask("POST", "/infer/bare", row)[0] == 200)  # once its files have settled
        assert served.post("/infer/bare", row)["raw_scores"] == served.post("/infer/kd", row)["raw_scores"]


def model_name(served, name: str) -> str:
    return served.server.registry.find(name).model_dir


def test_bases_leave_memory_in_the_order_of_their_last_use(tmp_path, tokenizer):
    runs = tmp_path / "runs"
    for seed in range(3):
        make_run(runs / f"run{seed}", build_base(tmp_path / f"base{seed}", tokenizer, seed=seed), seed=1)
    with serve(runs) as served:

        def loaded() -> list[str]:
            return [Path(base).name for base in served.ask("GET", "/models")[1]["bases"]]

        first = served.post("/infer/run0", {"features": ROWS[0]})
        served.post("/infer/run1", {"features": ROWS[0]})
        served.post("/infer/run0", {"features": ROWS[0]})
        assert sorted(loaded()) == ["base0", "base1"]
        served.post("/infer/run2", {"features": ROWS[0]})
        assert sorted(loaded()) == ["base0", "base2"]
        names = [f"run{random.Random(turn).randrange(3)}" for turn in range(6)]
        with ThreadPoolExecutor(4) as pool:  # while they push each other out
            answers = list(pool.map(lambda name: (name, served.post(f"/infer/{name}", {"features": ROWS[0]})), names))
        for name, answer in answers:
            if name == "run0":
                same(answer, first)
        wait_for(lambda: len(loaded()) == 2)


def test_a_whole_model_among_the_runs(tmp_path, base, expected):
    shutil.copytree(base, tmp_path / "runs" / "merged")
    with serve(tmp_path / "runs", base_model=base) as served:
        answer = served.post("/infer/merged", {"features": ROWS[0]})
        assert answer["raw_scores"] == pytest.approx(expected["base"][0]["raw_scores"], abs=1e-4)
        assert served.ask("GET", "/models")[1]["models"][1]["adapter_sha256"] is None


def test_a_changed_base_is_not_passed_off_as_loaded(tmp_path, base, monkeypatch):
    monkeypatch.setattr("common.serving.run_registry.LOOK", 0.0)
    monkeypatch.setattr("common.serving.run_registry.SETTLING", 0.0)
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    with serve(tmp_path / "runs", base_model=str(copy)) as served:
        served.post("/infer/base", {"features": ROWS[0]})
        (copy / "config.json").touch()
        assert "has changed on the disk since" in served.refused(409, "/infer/base", {"features": ROWS[0]})


def test_an_export_that_is_written_anew_is_another_version(tmp_path, monkeypatch):
    monkeypatch.setattr("common.serving.run_registry.SETTLING", 0.0)
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "model.onnx").write_bytes(b"1")
    registry = Registry(str(tmp_path / "runs"), None)
    first = registry.find("a")
    (run / "model.onnx").write_bytes(b"2")
    assert registry.find("a").sha256 != first.sha256


def test_names_of_runs(runs, tmp_path):
    registry = Registry(str(runs), None)
    for name in ("../runs/creditmix_sft", "/etc", "..", ".", "", "a/b", "a\\b", "creditmix_sft@", "sft@xyz", "x" * 200):
        with pytest.raises(BadName, match=r"is not the name of a run; give .* there are: base, creditmix_dpo, "):
            registry.find(name)
    with pytest.raises(UnknownRun, match="no run 'nope'; there are: base, creditmix_dpo, creditmix_kd, creditmix_sft"):
        registry.find("nope")
    with pytest.raises(UnknownRun, match=r"no run 'creditmix_sft'; there are: base$"):
        Registry(str(tmp_path / "none"), None).find("sft")
    assert Registry(str(tmp_path / "none"), None).base_model() == "Qwen/Qwen2.5-3B-Instruct"


def test_a_missing_base_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with serve(tmp_path, base_model=str(tmp_path / "empty")) as served:
        for _ in range(2):
            message = served.refused(409, "/infer/base", {"features": "Age: 1"})
            assert "holds neither adapter_config.json nor config.json" in message
