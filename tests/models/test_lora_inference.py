"""LoRA in place: what PEFT's own layers compute, wherever the short way is taken, and theirs wherever it is not."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from support.inputs import CORPUS

from common.models import adapters
from common.models import loading as models
from common.models import lora_inference as lean_lora
from common.models.source import ModelSource


def adapted(base: str, **loading):
    """A base with two adapters of random weights, "default" active."""
    model = adapters.add_lora(models.load_base(ModelSource(base, **loading)), r=4, alpha=8, dropout=0.1, seed=0)
    model.add_adapter("other", model.peft_config["default"])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3
    return model.eval()


def logits(model, tokenizer) -> torch.Tensor:
    ids = torch.tensor([tokenizer.encode(CORPUS[0])])
    return model(input_ids=ids).logits.float()


@pytest.mark.parametrize("four_bit", ["off", "on"])
def test_it_computes_what_peft_computes(four_bit, base, tokenizer):
    model = adapted(base, load_in_4bit=four_bit)
    with torch.inference_mode():
        wanted = {}
        for name in ("default", "other"):
            model.set_adapter(name)
            wanted[name] = logits(model, tokenizer)
        with model.disable_adapter():
            plain = logits(model, tokenizer)
        lean_lora.install(model)
        lean_lora.install(model)
        for name in ("other", "default"):
            model.set_adapter(name)
            close = {"atol": 1e-5} if four_bit == "off" else {"atol": 0.1, "rtol": 0.1}  # bfloat16 rounds elsewhere
            torch.testing.assert_close(logits(model, tokenizer), wanted[name], rtol=close.pop("rtol", 1e-5), **close)
        with model.disable_adapter():
            torch.testing.assert_close(logits(model, tokenizer), plain)
    assert (wanted["default"] - wanted["other"]).abs().max() > 0.1
    assert (wanted["default"] - plain).abs().max() > 0.1


def test_rows_with_adapters_of_their_own_are_left_to_peft(base, tokenizer):
    model = adapted(base)
    ids = torch.tensor([tokenizer.encode(CORPUS[0])] * 3)
    names = ["default", "other", "__base__"]
    with torch.inference_mode():
        wanted = model(input_ids=ids, adapter_names=names).logits
        lean_lora.install(model)
        torch.testing.assert_close(model(input_ids=ids, adapter_names=names).logits, wanted)


@pytest.mark.parametrize("four_bit", ["off", "on"])
def test_rows_in_segments_have_the_logits_of_their_adapters(four_bit, base, tokenizer):
    model = adapted(base, load_in_4bit=four_bit)
    texts = [tokenizer.encode(text)[:12] for text in CORPUS[:6]]
    parts = [("other", 2), (None, 1), ("default", 2), ("other", 1)]
    lean_lora.install(model)
    with torch.inference_mode():
        wanted = []
        for name in ("other", "other", None, "default", "default", "other"):
            ids = torch.tensor(texts[len(wanted)])[None]
            model.set_adapter(name or "default")
            with contextlib.nullcontext() if name else model.disable_adapter():
                wanted.append(model(input_ids=ids).logits[0].float())
        model.set_adapter("default")
        with lean_lora.segments(parts):
            logits = model(input_ids=torch.tensor(texts)).logits.float()
        close = {"atol": 1e-4, "rtol": 1e-5} if four_bit == "off" else {"atol": 0.1, "rtol": 0.1}
        torch.testing.assert_close(logits, torch.stack(wanted), **close)
        after = model(input_ids=torch.tensor(texts[3:4])).logits.float()  # the active one is so again
        torch.testing.assert_close(after[0], wanted[3], **close)


def test_segments_of_tokens_count_those_of_all_texts(base):
    model = adapted(base)
    lean_lora.install(model)
    layer = next(module for name, module in model.named_modules() if name.endswith("gate_proj"))
    x = torch.randn(1, 7, layer.in_features)
    parts = {"default": slice(0, 2), None: slice(2, 6), "other": slice(6, 7)}
    with torch.inference_mode():
        wanted = []
        for name, tokens in parts.items():
            with lean_lora.segments([(name, 1)]):
                wanted.append(layer(x[:, tokens]))
        model.set_adapter("other")
        active = layer(x)
        with lean_lora.segments([("default", 2), (None, 4), ("other", 1)], of_tokens=True):
            torch.testing.assert_close(layer(x), torch.cat(wanted, dim=1))
            torch.testing.assert_close(layer(x[0]), torch.cat(wanted, dim=1)[0])  # a layer that has no rows
            with lean_lora.segments(None):
                torch.testing.assert_close(layer(x), active)
    assert len({float(part.sum()) for part in (*wanted, active)}) == 4


def test_segments_that_are_not_the_rows_are_an_error(base, tokenizer):
    model = adapted(base)
    lean_lora.install(model)
    with torch.inference_mode(), lean_lora.segments([("default", 2)]), pytest.raises(ValueError, match="has 1 rows"):
        logits(model, tokenizer)


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, True),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 2}}, True),
        ({"use_dora": True}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    ],
    ids=["plain", "scaled", "dora", "embedding"],
)
def test_which_adapters_can_share_a_pass(base, tmp_path, settings, shares):
    from support.served import make_adapter

    folder = str(make_adapter(tmp_path / "adapter", base, **settings))
    model = adapters.load_adapter(models.load_base(ModelSource(base)), folder, name="a1")
    assert lean_lora.can_share(model, "a1") is shares
    assert not lean_lora.can_share(model, "a2")


def test_offloaded_adapters_are_fetched(base, tokenizer):
    from accelerate import cpu_offload

    model = adapted(base)
    with torch.inference_mode():
        wanted = logits(model, tokenizer)
        lean_lora.install(model)
        cpu_offload(model.get_base_model(), execution_device=torch.device("cpu"))
        torch.testing.assert_close(logits(model, tokenizer), wanted)
        assert not lean_lora.can_share(model, "default")


def test_gradients_go_the_usual_way(base, tokenizer):
    model = adapted(base)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        logits(model, tokenizer).logsumexp(-1).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        lean_lora.install(model)
    assert gradients[0]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_adapters_that_are_only_used_take_it_and_the_precision_of_their_base(base, tmp_path):
    adapted(base).save_pretrained(tmp_path)
    bfloat16 = models.load_base(ModelSource(base, dtype="bfloat16"))
    model = adapters.load_adapter(bfloat16, str(tmp_path))
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
    assert isinstance(layer.forward, types.MethodType)
    assert layer.forward.__func__ is lean_lora.forward
    trainable = adapters.load_adapter(models.load_base(ModelSource(base)), str(tmp_path), trainable=True)
    layer = trainable.get_base_model().model.layers[0].mlp.up_proj
    assert "forward" not in vars(layer)
