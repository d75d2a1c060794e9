"""Adapters on one base: those that may share it answer as they do alone; any other harms itself alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.served import NAMES, ROWS, make_adapter, make_run, same, serve

from common.models import adapters
from common.models.source import ModelSource
from common.serving import shared_adapters
from common.tasks.ranking import creditmix
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.creditmix import CREDITMIX

pytestmark = pytest.mark.processes

ROW = {"features": ROWS[0]}
LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
REFUSED = {
    "biases": {"bias": "all"},
    "tokens": {"trainable_token_indices": {"embed_tokens": [28, 29, 1041]}},
    "modules": {"modules_to_save": ["lm_head"]},
    "parameters": {"target_parameters": ["model.layers.0.mlp.weight"]},
    "replication": {"layer_replication": [[0, 1], [0, 2]]},
    "principal": {"init_lora_weights": "pissa"},
    "quantised": {"use_qalora": True},
    "activated": {"alora_invocation_tokens": [1, 2]},
    "of_tomorrow": {"use_something_new": True},
    "ia3": {"peft_type": "IA3"},
    "prompts": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
    "of_no_kind": {"peft_type": None},
}
BROKEN = {
    "rank_text": {"r": "eight"},
    "rank_huge": {"r": 10**9},
    "rank_pattern": {"rank_pattern": {"q_proj": -1}},
    "alpha_nan": {"lora_alpha": float("nan")},
    "pattern_list": {"rank_pattern": ["q_proj"]},
    "pattern_none": {"target_modules": "(q_proj"},
    "pattern_long": {"target_modules": "q_proj|" * 200 + "k_proj"},
    "patterns_many": {"target_modules": ["q_proj"] * 2000},
    "numbers": {"target_modules": [1, 2]},
}


def change(folder: Path, **settings: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_more_than_its_own_answers_is_refused(runs, tmp_path, name):
    folder = Path(shutil.copytree(runs / "creditmix_sft", tmp_path / name))
    shared_adapters.check(folder, LAYERS)
    change(folder, **REFUSED[name])
    with pytest.raises(adapters.UserError, match=r"cannot share a base with others: it .*; use it with"):
        shared_adapters.check(folder, LAYERS)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_settings_are_named(runs, tmp_path, name):
    folder = Path(shutil.copytree(runs / "creditmix_sft", tmp_path / name))
    change(folder, **BROKEN[name])
    with pytest.raises(adapters.UserError, match=r"cannot be used: .*; train it again"):
        shared_adapters.check(folder, LAYERS)


def test_patterns_that_take_too_long_are_refused(runs, tmp_path, monkeypatch):
    """Many names take the place of a pattern that takes long on one."""
    monkeypatch.setattr(shared_adapters, "PATTERN_SECONDS", 0.05)
    with pytest.raises(adapters.UserError, match=r"its patterns take longer than 0\.05 s"):
        shared_adapters.check(runs / "creditmix_sft", [f"model.layers.{number}.q_proj" for number in range(500_000)])


def test_refused_adapters_leave_the_others_bit_equal(own):
    """Before an adapter is on the base, and after; at the check of the settings, and half-way through the load."""
    kinds = REFUSED | BROKEN
    for name, settings in kinds.items():
        change(Path(shutil.copytree(own / "creditmix_sft", own / name)), **settings)
    torn = Path(shutil.copytree(own / "creditmix_sft", own / "torn"))
    (torn / "adapter_model.safetensors").write_bytes((torn / "adapter_model.safetensors").read_bytes()[:-100])
    change(Path(shutil.copytree(own / "creditmix_sft", own / "misfit")), r=5)
    config = Path(shutil.copytree(own / "creditmix_sft", own / "tokenless")) / "tokenizer_config.json"
    config.write_text("[" * 10_000)
    with serve(own) as served:

        def scores() -> list[dict]:
            return [served.post(f"/infer/{name}", ROW) for name in NAMES]

        first_refused = served.refused(409, "/infer/torn", ROW)
        assert "does not fit the base" in first_refused
        before = scores()
        for name in [*kinds, "torn", "misfit", "tokenless"]:
            assert served.ask("POST", f"/infer/{name}", ROW)[0] == 409, name
            assert scores() == before, name
        assert served.refused(409, "/infer/torn", ROW) == first_refused


KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "some_layers": {"layers_to_transform": [0]},
    "gaussian": {"init_lora_weights": "gaussian"},
}


def test_what_may_share_a_base_answers_as_it_does_alone(tmp_path, base):
    wanted = {}
    for name, settings in KINDS.items():
        folder = make_adapter(tmp_path / "runs" / name, base, **settings)
        classifier = Classifier.load(ModelSource(str(folder)), CREDITMIX)
        (wanted[name],) = classifier.answers([creditmix.clean_features(ROWS[0])], classifier.calibration(None))
    assert len({answer["raw_scores"]["Good"] for answer in wanted.values()}) == len(KINDS)
    with serve(tmp_path / "runs", base_model=base) as served:
        for _ in range(2):  # as the first one on the base, and beside all others
            for name, answer in wanted.items():
                same(served.post(f"/infer/{name}", ROW), answer)


CONTENTS = ["null", "3", "NaN", "[]", "[" * 20_000, json.dumps("x" * 300), "{", '{"models": [], "method": [1]}', "{}"]


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: content[:12])
@pytest.mark.parametrize("file", ["adapter_config.json", "run.json", "metrics.json", "calibration.json"])
def test_a_broken_file_concerns_its_run_alone(own, base, file, content):
    make_run(own / "broken", base, seed=9)
    (own / "broken" / file).write_text(content)
    with serve(own, base_model=base) as served:
        status, answer, _ = served.ask("POST", "/infer/broken", ROW)
        assert status in (200, 409), answer
        assert served.post("/infer/sft", ROW)["model_name"] == str(own / "creditmix_sft")
        entries = {entry["name"]: entry for entry in served.ask("GET", "/models")[1]["models"]}
        assert entries["creditmix_sft"]["error"] is None
        if file == "calibration.json" or content != "{}":
            assert file in entries["broken"]["error"]
            assert status == 409 or file in ("run.json", "metrics.json")
        listed = [model["id"] for model in served.ask("GET", "/v1/models")[1]["data"]]
        assert "creditmix_sft" in listed
        assert ("broken" in listed) == (file != "adapter_config.json")
