"""Adapters: which kinds are right alone, which may share a base, and weights that do not belong to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.cli import UserError
from common.files import sha256_file
from common.models import adapters, gguf_import
from common.models import loading as models
from common.models.source import ModelSource
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.torch_ranker import TorchRanker, naive_scores

TEXTS = ["Age: 23, Occupation: Scientist", "Age: 4", "Age: 51, Occupation: Engineer, Annual Income: 9.5"]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
# What PEFT makes of each: its config class, its settings, and whether it may share a base.
KINDS = {
    "plain": ("LoraConfig", LORA, True),
    "rslora": ("LoraConfig", LORA | {"use_rslora": True}, True),
    "dora": ("LoraConfig", LORA | {"use_dora": True}, True),
    "patterns": ("LoraConfig", LORA | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, True),
    "one layer": ("LoraConfig", LORA | {"layers_to_transform": [1]}, True),
    "all linear": ("LoraConfig", LORA | {"target_modules": "all-linear"}, True),
    "biases of its own": ("LoraConfig", LORA | {"lora_bias": True}, True),
    "the base's biases": ("LoraConfig", LORA | {"bias": "all"}, False),
    "a head": ("LoraConfig", LORA | {"modules_to_save": ["norm"]}, False),
    "tokens": ("LoraConfig", LORA | {"trainable_token_indices": {"embed_tokens": [28, 29]}}, False),
    "pissa": ("LoraConfig", LORA | {"init_lora_weights": "pissa"}, False),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, False),
    "loha": ("LoHaConfig", {"r": 4, "target_modules": ["q_proj"]}, False),
    "lokr": ("LoKrConfig", {"r": 4, "target_modules": ["q_proj"]}, False),
    "vera": ("VeraConfig", {"r": 4, "target_modules": ["q_proj"]}, False),
    "norms": ("LNTuningConfig", {"target_modules": ["norm"]}, False),
    "tokens alone": ("TrainableTokensConfig", {"token_indices": [28, 29], "target_modules": ["embed_tokens"]}, False),
}
REFUSED = {
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}, "is of the kind PROMPT_TUNING"),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3}, "is of the kind PREFIX_TUNING"),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3}, "is of the kind P_TUNING"),
    "alora": ("LoraConfig", LORA | {"alora_invocation_tokens": [1, 2]}, "has alora_invocation_tokens"),
    "replicated": ("LoraConfig", LORA | {"layer_replication": [[0, 2], [0, 2]]}, "has layer_replication"),
}


def make(folder: Path, base: str, kind: str, settings: dict, seed: int = 0) -> Path:
    """An adapter of random weights on `base`."""
    import peft

    torch.manual_seed(seed)
    model = models.load_base(ModelSource(base, dtype="float32"))
    adapted = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **settings))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def of_kind(base, tmp_path_factory):
    """`of_kind(name)` is an adapter of that kind."""
    folder, made = tmp_path_factory.mktemp("kinds"), {}

    def get(name: str) -> Path:
        if name not in made:
            kind, settings, _ = (KINDS | REFUSED)[name]
            made[name] = make(folder / name.replace(" ", "_"), base, kind, settings)
        return made[name]

    return get


@pytest.fixture
def plain(of_kind, tmp_path) -> Path:
    return Path(shutil.copytree(of_kind("plain"), tmp_path / "plain"))


def load(folder: Path | str):
    return models.load_for_inference(ModelSource(str(folder), dtype="float32"))


def logits(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


IDS = [5, 28, 29, 60, 7]


@pytest.mark.processes
@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_alone_on_its_base(name, of_kind, base):
    from peft import PeftModel

    model, tokenizer = load(of_kind(name))
    fresh = models.load_base(ModelSource(base, dtype="float32"))
    plain = logits(fresh, IDS)
    expected = logits(PeftModel.from_pretrained(fresh, of_kind(name)).eval(), IDS)
    assert (logits(model, IDS) - expected).abs().max() < 1e-4
    assert (expected - plain).abs().max() > 1e-4
    scores = TorchRanker(model, tokenizer, CREDITMIX).raw_scores(TEXTS)
    assert np.abs(scores - naive_scores(model, tokenizer, CREDITMIX, TEXTS)).max() < 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_cannot_be_used(name, of_kind):
    folder = of_kind(name)
    with pytest.raises(UserError, match=f"the adapter {folder} {REFUSED[name][2]}, which cannot be used here; train a"):
        load(folder)


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_beside_another(name, of_kind, base):
    """It is right, or refused before the other one's answers change."""
    shared = KINDS[name][2]
    alone = logits(load(of_kind(name))[0], IDS)
    model = models.load_base(ModelSource(base, dtype="float32"))
    bare = logits(model, IDS)
    model = adapters.load_adapter(model, str(of_kind("plain")), name="first").eval()
    first = logits(model, IDS)
    if shared:
        model = adapters.load_adapter(model, str(of_kind(name)), name="second")
        model.set_adapter("second")
        assert (logits(model, IDS) - alone).abs().max() < 1e-4
        model.set_adapter("first")
    else:
        with pytest.raises(
            UserError, match=f"the adapter {of_kind(name)} cannot share a base with others: it .*; use it with"
        ):
            adapters.load_adapter(model, str(of_kind(name)), name="second")
    assert torch.equal(logits(model, IDS), first)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), bare)


def test_settings_that_are_not_known_yet(plain):
    """A LoRA of a later PEFT, with a setting that says something, does not share a base."""
    file = plain / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"use_something_new": False}))
    adapters.check_sharing(plain)
    file.write_text(json.dumps(config | {"use_something_new": True}))
    adapters.check_kind(plain)
    with pytest.raises(UserError, match="cannot share a base with others: it has use_something_new=True"):
        adapters.check_sharing(plain)


def nothing(weights: dict) -> dict:
    return {name.replace("model.layers", "model.blocks"): tensor for name, tensor in weights.items()}


def part(weights: dict) -> dict:
    return {name: tensor for name, tensor in weights.items() if "layers.1" not in name}


def more(weights: dict) -> dict:
    further = {
        name.replace("layers.1", "layers.7"): tensor.clone() for name, tensor in weights.items() if "layers.1" in name
    }
    return weights | further


def embedding(weights: dict) -> dict:
    return weights | {"base_model.model.model.embed_tokens.weight": torch.zeros(448, 32)}


def bare_names(weights: dict) -> dict:
    return {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}


WRONG = {
    nothing: "12 of its 12 weights have no place there, such as base_model.model.model.blocks.0",
    part: "it lacks 6 of 12 weights, such as base_model.model.model.layers.1",
    more: "6 of its 18 weights have no place there, such as base_model.model.model.layers.7",
    embedding: "base_model.model.model.embed_tokens.weight",
    bare_names: "12 of its 12 weights have no place there, such as model.layers.0",
}


@pytest.mark.parametrize("change", WRONG)
@pytest.mark.parametrize("beside_another", [False, True])
def test_weights_that_are_not_the_adapters(change, beside_another, plain, of_kind, base):
    file = plain / "adapter_model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(weights), file)
    model = models.load_base(ModelSource(base, dtype="float32"))
    if beside_another:
        model = adapters.load_adapter(model, str(of_kind("dora")), name="first").eval()
        before = logits(model, IDS)
    with pytest.raises(
        UserError, match=rf"the adapter {plain} does not fit the base .* \(.*{WRONG[change]}.*; give its own"
    ):
        adapters.load_adapter(model, str(plain), name="second")
    if beside_another:
        assert torch.equal(logits(model, IDS), before)
        assert list(model.peft_config) == ["first"]


def test_weights_that_are_cut_short(plain):
    file = plain / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"the adapter {plain} does not fit the base"):
        load(plain)


@pytest.mark.parametrize("text", ["{", "[]", '{"base_model_name_or_path": null}', "{}"])
def test_a_broken_config(text, plain):
    (plain / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"adapter_config.json is broken.*; train the adapter again"):
        adapters.base_of(plain)


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("adapter_model.safetensors", ["adapter_config.json"]),
        ("model.safetensors", ["config.json"]),
        ("model-00002-of-00002.safetensors", ["config.json", "model.safetensors.index.json"]),
        ("model.safetensors-00002-of-00002.safetensors", ["config.json", "model.safetensors.index.json"]),
        ("model.onnx", ["config.json", "export.json"]),
        ("model.onnx_data", ["config.json", "model.onnx"]),  # the weights of a large export
        ("model.onnx.data", ["config.json", "model.onnx"]),  # of a large one that is quantised
        ("model.onnx", ["config.json", "model.safetensors"]),  # ONNX Runtime runs there
    ],
)
def test_the_weights_tell_one_model_from_another(name, beside, tmp_path):
    """Two folders that differ in nothing else, as exports of two runs on one base do."""
    hashes = set()
    for folder, weights in (("one", b"1"), ("same", b"1"), ("other", b"2")):
        (tmp_path / folder).mkdir()
        for file in beside:
            (tmp_path / folder / file).write_text("{}")
        (tmp_path / folder / name).write_bytes(weights)
        hashes.add(adapters.adapter_hash(tmp_path / folder))
    assert len(hashes) == 2


def test_the_hash_of_one_file_is_its_own(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert adapters.adapter_hash(tmp_path) == sha256_file(tmp_path / "config.json")
    (tmp_path / "model.onnx").write_bytes(b"weights")
    assert adapters.adapter_hash(tmp_path) == sha256_file(tmp_path / "model.onnx")


def test_large_weights_are_hashed_once(tmp_path, monkeypatch):
    read = []
    monkeypatch.setenv("GGUF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_import, "NOTED", 4)
    monkeypatch.setattr(gguf_import, "sha256_file", lambda path: read.append(path) or sha256_file(path))
    weights = tmp_path / "model.safetensors"
    for content in (b"weights", b"other weights"):
        weights.write_bytes(content)
        assert {adapters.adapter_hash(tmp_path) for _ in range(3)} == {sha256_file(weights)}
    assert read == [weights] * 2
