"""Losses against their definitions: those beside a teacher in float64, that of a completion against the model's own."""

from __future__ import annotations

import math
import random

import pytest
import torch

from common.models import chats
from common.models import loading as models
from common.models.source import ModelSource
from common.models.tokenizers import Encoded
from common.training import batches, losses


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(7, 11, dtype=torch.float64), torch.randn(7, 11, dtype=torch.float64)


def kl(p: torch.Tensor, q: torch.Tensor) -> list[float]:
    """By the definition, one item at a time."""
    return [
        sum(a * math.log(a / b) for a, b in zip(*row, strict=True)) for row in zip(p.tolist(), q.tolist(), strict=True)
    ]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_divergences_are_their_definitions(logits, temperature):
    student, teacher = (losses.log_probs(x, temperature) for x in logits)
    q, p = student.exp(), teacher.exp()
    square = temperature**2
    assert (losses.forward_kl(student, teacher, temperature) / square).tolist() == pytest.approx(kl(p, q), rel=1e-12)
    assert (losses.reverse_kl(student, teacher, temperature) / square).tolist() == pytest.approx(kl(q, p), rel=1e-12)
    for beta in (0.1, 0.5, 0.9):
        m = beta * p + (1 - beta) * q
        expected = [beta * a + (1 - beta) * b for a, b in zip(kl(p, m), kl(q, m), strict=True)]
        found = losses.jsd(student, teacher, temperature, beta) / square
        assert found.tolist() == pytest.approx(expected, rel=1e-10)


def test_log_probs_divide_by_the_temperature(logits):
    expected = torch.softmax(logits[0] / 2, dim=-1)
    assert torch.allclose(losses.log_probs(logits[0], 2.0).exp(), expected)
    assert losses.log_probs(logits[0].bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_nothing_to_learn_from_an_equal(logits, name):
    student = logits[0].clone().requires_grad_()
    value = getattr(losses, name)(losses.log_probs(student), losses.log_probs(logits[0]))
    value.sum().backward()
    assert value.abs().max() < 1e-14
    assert student.grad.abs().max() < 1e-14


def test_the_gradient_does_not_shrink_with_the_temperature(logits):
    sizes = []
    for temperature in (4.0, 16.0):
        student = logits[0].clone().requires_grad_()
        losses.forward_kl(
            losses.log_probs(student, temperature), losses.log_probs(logits[1], temperature), temperature
        ).sum().backward()
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)  # without T^2 it would be 16 times smaller


def test_an_outcome_that_is_ruled_out(logits):
    """A teacher that gives a label no chance at all, and a student that does not."""
    student = logits[0][:, :3].clone().requires_grad_()
    teacher = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).log().expand(7, 3)
    value = losses.forward_kl(losses.log_probs(student), teacher)
    value.sum().backward()
    assert torch.allclose(value, -losses.log_probs(student)[:, 0])
    assert torch.isfinite(student.grad).all()
    assert torch.isfinite(losses.jsd(losses.log_probs(student), teacher)).all()


def test_top_k_with_the_rest_is_a_lower_bound(logits):
    student, teacher = map(losses.log_probs, logits)
    whole = losses.forward_kl(student, teacher)
    bounds = []
    for k in (1, 3, 8, 11):
        ids = teacher.topk(k).indices
        parts = losses.with_rest(student, ids), losses.with_rest(teacher, ids)
        assert torch.allclose(parts[1].exp().sum(dim=-1), torch.ones(7, dtype=torch.float64), atol=1e-6)
        bounds.append(losses.forward_kl(*parts))
    for smaller, larger in zip(bounds, [*bounds[1:], whole], strict=True):
        assert (smaller <= larger + 1e-6).all()
    assert torch.allclose(bounds[-1], whole, atol=1e-5)
    assert (bounds[0] < whole - 1e-3).any()


def test_draws_are_unbiased_where_top_k_is_not(logits):
    """The mean gradient of many draws is that of the whole distribution."""
    teacher = losses.log_probs(logits[1])
    entropy = -(teacher.exp() * teacher).sum(dim=-1)
    draws = torch.multinomial(teacher.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))

    def gradient(loss) -> torch.Tensor:
        student = logits[0].clone().requires_grad_()
        value = loss(losses.log_probs(student))
        value.sum().backward()
        return value, student.grad

    whole, right = gradient(lambda ours: losses.forward_kl(ours, teacher))
    drawn, estimate = gradient(lambda ours: losses.sampled_forward_kl(ours, draws, entropy))
    assert torch.allclose(drawn, whole, atol=0.02)
    assert (estimate - right).abs().max() < 0.01
    ids = teacher.topk(2).indices
    renormalised = teacher.gather(-1, ids).log_softmax(dim=-1)
    _, biased = gradient(lambda ours: losses.forward_kl(ours.gather(-1, ids), renormalised))
    assert (biased - right).abs().max() > 0.05


def test_hidden_states(logits):
    a, b = logits
    assert torch.allclose(losses.hidden_mse(a, b).double(), ((a - b) ** 2).mean(dim=-1), atol=1e-6)
    expected = 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    assert torch.allclose(losses.hidden_cosine(a, b).double(), expected, atol=1e-6)
    assert losses.hidden_mse(a, a).abs().max() == 0
    assert losses.hidden_cosine(a, a).abs().max() < 1e-6


def test_attention_maps():
    torch.manual_seed(0)
    student = [torch.rand(2, 4, 5, 5).softmax(dim=-1) for _ in range(2)]
    teacher = [torch.rand(2, 8, 5, 5).softmax(dim=-1) for _ in range(2)]  # more heads
    queries = torch.tensor([[False, True, True, False, False], [False, False, False, True, False]])
    found = losses.attention_mse(list(zip(student, teacher, strict=True)), queries)
    expected = [
        sum(
            sum(
                (student[i][row, :, query, key].mean() - teacher[i][row, :, query, key].mean()) ** 2 for key in range(5)
            )
            for i in range(2)
        )
        / 2
        for row, query in ((0, 1), (0, 2), (1, 3))
    ]
    assert found.tolist() == pytest.approx([float(value) for value in expected], rel=1e-5)
    assert losses.attention_mse([(student[0], student[0])], queries).abs().max() == 0
    with pytest.raises(ValueError, match="eager"):
        losses.attention_mse([], queries)


@pytest.mark.parametrize("tokens", [0, 1, 5, 7])
def test_chunks_equal_the_whole(logits, tokens):
    def gradients(chunk_logits: int):
        weight, hidden = logits[0].clone().requires_grad_(), logits[1][:tokens].clone().requires_grad_()
        live = []

        def terms(h, gold):
            live.append(len(h))
            scores = h @ weight.T
            return torch.stack(
                [torch.nn.functional.cross_entropy(scores, gold, reduction="sum"), scores.square().sum()]
            )

        gold = torch.arange(tokens) % 7
        sums = losses.summed_in_chunks(terms, hidden, gold, width=7, chunk_logits=chunk_logits)
        (sums * torch.tensor([1.0, 0.1])).sum().backward()
        return sums.detach(), weight.grad, hidden.grad, max(live)

    whole, parts = gradients(10_000), gradients(14)
    for one, other in zip(whole[:3], parts[:3], strict=True):
        assert torch.allclose(one, other)
    assert parts[3] <= 2  # tokens whose logits existed at a time
    assert whole[3] == tokens


# Of a completion.


@pytest.fixture(scope="module")
def model(base):
    return models.load_base(ModelSource(base, dtype="float32"))


@pytest.fixture(scope="module")
def batch():
    rng = random.Random(0)
    rows = [Encoded([rng.randrange(400) for _ in range(n)], prompt) for n, prompt in ((9, 4), (14, 11), (6, 1))]
    return batches.collate(rows, pad_id=0)


def test_completion_loss_is_the_full_models(model, batch):
    loss, output = losses.completion_loss(model, batch)
    assert loss.item() == pytest.approx(model(**batch).loss.item(), abs=1e-6)
    columns = {t - 1 for row in batch["labels"].tolist() for t, label in enumerate(row) if label != batches.IGNORE}
    assert output.logits.shape == (3, len(columns), model.config.vocab_size)
    assert len(columns) < batch["labels"].shape[1] - 1


def test_a_chats_loss_is_that_of_its_answers_one_by_one(model, tokenizer):
    texts = ("Age: 23?", "Good", "And 24?", "Bad", "Age: 5")
    chat = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    whole = chats.encode(tokenizer, chat, "Standard")
    answers = ((1, "Good"), (3, "Bad"), (5, "Standard"))
    single = [chats.encode(tokenizer, nothing_learnt(chat[:number]), text) for number, text in answers]
    assert sum(len(row.learnt) for row in single) == len(whole.learnt)
    total = losses.completion_loss(model, batches.collate([whole], 0), 1)[0].item()
    parts = [losses.completion_loss(model, batches.collate([row], 0), 1)[0].item() for row in single]
    assert total == pytest.approx(sum(parts), rel=1e-5)


def nothing_learnt(chat):
    return [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in chat]


def test_completion_loss_of_parts_adds_up(model, batch):
    items = (batch["labels"] != batches.IGNORE).sum()
    parts = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    total = sum(losses.completion_loss(model, part, items)[0].item() for part in parts)
    assert total == pytest.approx(losses.completion_loss(model, batch)[0].item(), abs=1e-6)


def test_an_all_masked_batch_gives_zero(base, batch):
    model = models.load_base(ModelSource(base), training=True)
    masked = batch | {"labels": torch.full_like(batch["labels"], batches.IGNORE)}
    loss, _ = losses.completion_loss(model, masked)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
