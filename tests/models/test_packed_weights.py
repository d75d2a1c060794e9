"""Weights that are packed for a CPU: who may be, when, and that what is written stays the same."""

from __future__ import annotations

import pytest
import torch
from support.inputs import CORPUS
from support.models import build_base
from support.served import make_run

from common.generation.decoding import Decoding
from common.generation.generate import generate
from common.models import heads, loading, packed_weights, tokenizers
from common.models.packed_weights import PackedLinear
from common.models.source import ModelSource
from common.vram import preflight

pytestmark = pytest.mark.skipif(
    torch.cpu.get_capabilities()["architecture"] != "x86_64" or not torch.backends.mkldnn.is_available(),
    reason="weights are packed on x86 alone",
)


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """The miniature counts as a model that people use."""
    monkeypatch.setattr(packed_weights, "is_large", lambda config: True)


def load(folder: str):
    return loading.load_for_inference(ModelSource(folder, dtype="float32"))[0]


def packed(model) -> int:
    return sum(isinstance(module, PackedLinear) for module in model.modules())


def write(model, tokenizer, number: int) -> list[str]:
    prompts = [tokenizers.encode_prompt(tokenizer, text) for text in CORPUS[:number]]
    return [answer.text for (answer,) in generate(model, tokenizer, prompts, Decoding(12))]


def test_several_texts_are_written_by_packed_weights(tiny_base, tokenizer):
    model = load(tiny_base)
    plain = write(model, tokenizer, 6)
    assert packed(model) == 0  # it was not allowed
    packed_weights.allow(model)
    write(model, tokenizer, packed_weights.FEWEST_ROWS - 1)
    assert packed(model) == 0  # it does not pay
    assert write(model, tokenizer, 6) == plain
    linear = [module for module in load(tiny_base).modules() if type(module) is torch.nn.Linear]
    assert packed(model) == len(linear) > 2
    assert not any(type(module) is torch.nn.Linear for module in model.modules())
    assert write(model, tokenizer, 6) == plain


def test_an_adapter_stays_as_it_is(base, tokenizer, tmp_path):
    model = load(str(make_run(tmp_path / "run", base, seed=1)))
    plain = write(model, tokenizer, 6)
    packed_weights.allow(model)
    assert write(model, tokenizer, 6) == plain
    assert packed(model) > 2
    assert any(type(module) is torch.nn.Linear for module in model.modules())  # its own matrices


def test_a_bias_and_any_number_of_rows():
    linear = torch.nn.Linear(48, 32)
    module = PackedLinear(linear, keep_weight=False)
    with torch.inference_mode():
        for shape in ((1, 1, 48), (5, 1, 48), (2, 7, 48), (64, 48)):
            x = torch.randn(shape)
            assert torch.allclose(module(x), linear(x), atol=1e-5)
    assert module.weight is None


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on a CPU without AVX512"
)
def test_a_packed_head_is_multiplied_in_float32_where_labels_are_compared(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(packed_weights, "has_bfloat16", lambda: True)
    folder = build_base(tmp_path / "base", tokenizer)
    model = loading.load_for_inference(ModelSource(folder, dtype="bfloat16"))[0]
    ids = torch.tensor([tokenizers.encode_prompt(tokenizer, CORPUS[0])])

    def logits() -> torch.Tensor:
        with torch.inference_mode(), heads.exact_logits(model, [5, 9]):
            return model(ids, logits_to_keep=1).logits[0, -1, [5, 9]]

    plain = logits()
    packed_weights.allow(model)
    packed_weights.pack_for(model, 8)
    assert packed(model) > 2
    assert torch.allclose(logits(), plain, atol=0.02) and (logits() != logits().bfloat16().float()).any()


def test_its_memory_is_foreseen(tiny_base, monkeypatch):
    source = ModelSource(tiny_base, dtype="float32")
    monkeypatch.setattr(preflight.models, "is_large", lambda config: True)
    plain, packs = (preflight.inference_plan(source, text_only=text_only) for text_only in (False, True))
    config = loading.load_config(tiny_base)
    more = preflight.predict(packs).total - preflight.predict(plain).total
    assert more == config.vocab_size * config.hidden_size * 4
