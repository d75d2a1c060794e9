"""LoRA's short way in training against PEFT's own: outputs, gradients, dropout, and where it is not taken."""

from __future__ import annotations

import pytest
import torch

from common.models import adapters, lora_training
from common.models import loading as models
from common.models.source import ModelSource


@pytest.fixture
def student(base):
    model = models.load_base(ModelSource(base, dtype="float32"), training=True).requires_grad_(False)
    student = adapters.add_lora(model, r=4, alpha=8, dropout=0.0, seed=0)
    torch.manual_seed(1)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return student.train()


IDS = torch.arange(5, 35).view(2, 15)


def step(student) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = student(input_ids=IDS).logits
    logits.float().logsumexp(-1).sum().backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    return logits.detach(), gradients


def test_outputs_and_gradients_are_pefts(student):
    logits, gradients = step(student)
    lora_training.install(student)
    ours, of_ours = step(student)
    assert torch.allclose(ours, logits, atol=1e-5)
    assert of_ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(of_ours[name], gradient, atol=1e-4, rtol=1e-4), name


def test_the_formula():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(6, 8).double(), torch.randn(6).double()
    down, up = torch.randn(2, 8).double().requires_grad_(), torch.randn(6, 2).double().requires_grad_()
    x.requires_grad_()
    y = lora_training.LoraProduct.apply(x, weight, bias, down, up, 0.5)
    assert torch.allclose(y, x @ weight.t() + bias + 0.5 * x @ down.t() @ up.t())

    def value(*inputs: torch.Tensor) -> torch.Tensor:
        x, down, up = inputs
        return x @ weight.t() + bias + 0.5 * x @ down.t() @ up.t()

    seed = torch.randn_like(y)
    expected = torch.autograd.grad(value(x, down, up), (x, down, up), seed)
    for ours, theirs in zip(torch.autograd.grad(y, (x, down, up), seed), expected, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-5)


def test_bfloat16_loses_no_small_update(student):
    """Weights and gradients of the adapter stay float32 on a base of bfloat16."""
    for module in student.get_base_model().modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                module._parameters[name] = torch.nn.Parameter(parameter.data.bfloat16(), requires_grad=False)
    lora_training.install(student)
    logits, gradients = step(student)
    assert logits.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}


def test_dropout_drops_inputs_and_keeps_the_mean(student):
    torch.manual_seed(0)
    factors = torch.stack([lora_training.kept_inputs(torch.zeros(2, 1000), 0.2) for _ in range(50)])
    assert set(factors.unique().tolist()) == {0.0, 1.25}
    assert factors.mean().item() == pytest.approx(1, abs=0.01)
    dropped = (factors == 0).float().mean(dim=1)
    assert dropped.std().item() == pytest.approx((0.2 * 0.8 / 1000) ** 0.5, rel=0.5)  # drawn one by one


def test_dropout_is_of_training_alone(base):
    model = models.load_base(ModelSource(base, dtype="float32"), training=True).requires_grad_(False)
    student = adapters.add_lora(model, r=4, alpha=8, dropout=0.5, seed=0)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    lora_training.install(student)
    student.train()
    assert not torch.equal(step(student)[0], step(student)[0])
    student.eval()
    assert torch.equal(step(student)[0], step(student)[0])


def test_switched_off_it_is_the_base(student):
    with student.disable_adapter():
        expected = student(input_ids=IDS).logits
    lora_training.install(student)
    with student.disable_adapter():
        assert torch.equal(student(input_ids=IDS).logits, expected)


def test_what_a_young_adapter_says_is_heard_in_bfloat16():
    """A thousandth of what it is added to, far less than a step of bfloat16, has its effect over many numbers."""
    torch.manual_seed(0)
    x, weight = torch.randn(2048, 64).bfloat16(), torch.randn(256, 64).bfloat16()
    down, up = torch.randn(4, 64) / 8, torch.randn(256, 4) * 1e-3
    exact = x.float() @ down.bfloat16().float().t() @ up.t()
    said = lora_training.LoraProduct.apply(x, weight, None, down, up, 1.0).float() - (x @ weight.t()).float()
    share = float((said * exact).sum() / exact.square().sum())
    assert float(exact.abs().mean()) < 0.01 * float((x @ weight.t()).float().abs().mean())
    assert share == pytest.approx(1, abs=0.1)
    added = (x @ weight.t() + exact.bfloat16()).float() - (x @ weight.t()).float()
    assert float((added * exact).sum() / exact.square().sum()) < 0.5  # which is why it is one product
