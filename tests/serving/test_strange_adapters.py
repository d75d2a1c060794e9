"""Adapters that do not belong to their base, or would change it: refused by name, and their neighbours unharmed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.host import run_host
from support.served import ROWS, make_runs, settings

from common.models import loading as models
from common.models.source import ModelSource
from common.serving.messages import Unusable
from common.serving.run_registry import Registry
from common.serving.work import Classify
from common.tasks.ranking import creditmix
from common.tasks.ranking.creditmix import CREDITMIX

pytestmark = pytest.mark.processes
PROMPT = CREDITMIX.prompt(creditmix.clean_features(ROWS[0]))


def ask(base: str, runs, names: list[str]) -> list:
    """What each of these runs answers to the first row, asked one after the other in one process."""
    registry = Registry(str(runs), base)
    asked = [((registry.find(name), Classify()), [PROMPT]) for name in names]
    numbered = run_host(base, settings(runs).host, asked).numbered()
    return [answer for _, answer in sorted(numbered, key=lambda pair: pair[0])]


def raw_scores(answers: list) -> list[dict[str, float]]:
    return [answer["raw_scores"] for (answer,) in answers]


def tokens(folder, base: str) -> None:
    """A LoRA that trains some rows of the embedding, too."""
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [28, 29, 41]}
    )
    model = peft.get_peft_model(models.load_base(ModelSource(base, dtype="float32")), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter)
    model.save_pretrained(folder)


def ia3(folder, base: str) -> None:
    import peft

    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    peft.get_peft_model(models.load_base(ModelSource(base, dtype="float32")), config).save_pretrained(folder)


def other_names(folder, base: str) -> None:
    """A LoRA of a model whose layers have other names: without effect, if it were taken."""
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name.replace("layers", "blocks"): tensor.clone() for name, tensor in weights.items()}, file)


STRANGE = {
    tokens: "cannot share a base with others: it has trainable_token_indices",
    ia3: "cannot share a base with others: it is of the kind IA3",
    other_names: "have no place there, such as base_model.model.model.blocks",
}


@pytest.mark.parametrize("make", STRANGE)
def test_neighbours_of_a_strange_adapter_answer_as_before(make, base, tmp_path):
    runs = make_runs(tmp_path / "runs", base)
    healthy = sorted(folder.name for folder in runs.iterdir() if (folder / "adapter_config.json").is_file())
    expected = [pytest.approx(scores, abs=1e-5) for scores in raw_scores(ask(base, runs, healthy))]
    strange = shutil.copytree(runs / healthy[0], runs / "strange")
    make(strange, base)
    config = json.loads((strange / "adapter_config.json").read_text())
    (strange / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    first, *between, last = ask(base, runs, ["strange", *healthy, "strange"])
    assert raw_scores(between) == expected
    for refusal in (first, last):
        assert isinstance(refusal, Unusable)
        assert f"the adapter {strange} " in str(refusal)
        assert STRANGE[make] in str(refusal)
    after = ask(base, runs, [*healthy, "strange", *healthy])[-len(healthy) :]
    assert raw_scores(after) == expected
