"""All losses: of a completion its cross-entropy; of a student beside its teacher divergences of distributions, of
hidden states and of attention maps.

Those are pure functions, each giving one number an item (a token, or a row with a few labels), so that a caller sums
them and divides by the items of the whole optimizer step: accumulation then changes nothing. Divergences take
log-probabilities over any set of outcomes: a vocabulary, the teacher's top k with the rest as one more outcome, or the
labels of a task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from common.models.batching import CHUNK_LOGITS
from common.training.batches import IGNORE

TAIL_FLOOR = 1e-7  # probability; the float32 rounding of 1 - sum(p) is as large


def completion_loss(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], num_items: torch.Tensor | int | None = None
) -> tuple[torch.Tensor, Any]:
    """Cross-entropy of the completion tokens, in nats, with the LM head applied at those columns alone.

    Args:
        batch: `input_ids`, `attention_mask`, `labels`, each [rows, tokens]; labels IGNORE on prompt and padding.
        num_items: completion tokens of the whole optimizer step, so that accumulation 2x1 equals 1x2; None: this batch.

    Returns:
        (scalar loss, model output). The loss of a batch without completion tokens is 0.
    """
    columns, targets = completion_columns(batch)
    output = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, logits_to_keep=columns
    )
    if num_items is None:
        num_items = (targets != IGNORE).sum().clamp(min=1)
    loss = functional.cross_entropy(
        output.logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return loss / num_items, output


def completion_columns(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns before completion tokens [columns], at least one, and the tokens that follow them [rows, columns]."""
    targets = batch["labels"][:, 1:]
    columns = (targets != IGNORE).any(0).nonzero()[:, 0]
    if len(columns) == 0:  # keep the graph, so that backward still works
        columns = torch.zeros(1, dtype=torch.long, device=targets.device)
    return columns, targets[:, columns]


class FrozenHeadCrossEntropy(torch.autograd.Function):
    """The cross-entropy of tokens through a frozen LM head, a chunk of logits at a time, and never made twice.

    Where the head is not trained, the gradient of each token's hidden state follows from its logits at once, so that it
    is made with the loss and the logits are dropped (as in Hsu et al. 2024, Liger Kernel, arXiv:2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden: [n, width], of the type of `weight`.
            weight: [vocabulary, width].
            targets: token ids [n].

        Returns:
            The sum over tokens, in nats, and how many of them are the likeliest ones; both float32.
        """
        size = max(1, CHUNK_LOGITS // len(weight))
        total, gradient = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
        hits = torch.zeros((), device=hidden.device)
        for rows, ids, out in zip(hidden.split(size), targets.split(size), gradient.split(size), strict=True):
            logits = (rows @ weight.t()).float()
            logprobs = logits.sub_(logits.logsumexp(dim=-1, keepdim=True))
            total -= logprobs.gather(1, ids[:, None]).sum()
            hits += (logprobs.argmax(dim=-1) == ids).sum()
            if ctx.needs_input_grad[0]:
                # d loss / d logits = softmax - one-hot
                difference = logprobs.exp_().scatter_add_(1, ids[:, None], -torch.ones_like(logprobs[:, :1]))
                torch.mm(difference.to(weight.dtype), weight, out=out)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of `hidden`."""
        (of_sum,) = ctx.saved_tensors
        return of_sum * gradient.to(of_sum.dtype), None, None


def log_probs(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log softmax(logits / temperature) over the last dimension, in float32 at least."""
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(dim=-1)


def _divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats of log-probabilities [..., K]; an outcome that p excludes adds nothing, also no gradient."""
    possible = p > -math.inf
    gap = torch.where(possible, p, 0) - torch.where(possible, q, 0)
    return (p.exp() * gap).sum(dim=-1)


def forward_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """T^2 KL(teacher || student), Hinton et al. 2015 (arXiv:1503.02531), section 2: covers all the teacher's modes.

    Args:
        student, teacher: log-probabilities [..., K] at that temperature (see `log_probs`).

    Returns:
        Nats an item [...]; 0 where the two are equal. T^2 keeps the gradient's size independent of the temperature.
    """
    return temperature**2 * _divergence(teacher, student)


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """T^2 KL(student || teacher), as in MiniLLM (Gu et al. 2023, arXiv:2306.08543): settles on the main modes.

    Arguments and result as of `forward_kl`.
    """
    return temperature**2 * _divergence(student, teacher)


def jsd(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0, beta: float = 0.5) -> torch.Tensor:
    """T^2 times the generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2023, arXiv:2306.13649, eq. 1).

    beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student, 0 < beta < 1.
    Arguments and result as of `forward_kl`.
    """
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return temperature**2 * (beta * _divergence(teacher, mixture) + (1 - beta) * _divergence(student, mixture))


def with_rest(logprobs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [n, k + 1] of the outcomes `ids` [n, k] and of all others together, from those of all [n, V].

    A divergence over them is a lower bound of the one over all V (data processing inequality), and 0 where that is 0.
    """
    chosen = logprobs.gather(-1, ids)
    rest = (1 - chosen.exp().sum(dim=-1, keepdim=True)).clamp(min=TAIL_FLOOR).log()
    return torch.cat([chosen, rest], dim=-1)


def with_own(ids: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Outcomes [n, k], the likeliest first, of which the last gives way to `own` [n] where that is not among them."""
    lacking = (ids != own[:, None]).all(dim=1)
    last = torch.where(lacking, own, ids[:, -1])
    return torch.cat([ids[:, :-1], last[:, None]], dim=1)


def sampled_forward_kl(
    student: torch.Tensor, draws: torch.Tensor, entropy: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """An unbiased estimate of `forward_kl` from outcomes that were drawn from the teacher.

    Random sampling KD (Anshumann et al. 2025, arXiv:2503.16870): top k alone is a biased target, draws are not.

    Args:
        student: log-probabilities [n, V].
        draws: outcomes [n, k], drawn with replacement.
        entropy: of the teacher's whole distribution [n], nats.
    """
    return temperature**2 * (-student.gather(-1, draws).mean(dim=-1) - entropy)


def hidden_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference [...] of hidden states [..., width] (FitNets, Romero et al. 2014, arXiv:1412.6550)."""
    return (student.float() - teacher.float()).square().mean(dim=-1)


def hidden_cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 - cosine similarity [...] of hidden states [..., width] (DistilBERT, Sanh et al. 2019, arXiv:1910.01108)."""
    return 1 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1)


def attention_mse(maps: Sequence[tuple[torch.Tensor, torch.Tensor]], queries: torch.Tensor) -> torch.Tensor:
    """Squared difference of attention maps, means over heads (head counts may differ), summed over the keys.

    After TinyBERT (Jiao et al. 2019, arXiv:1909.10351, eq. 7), which compares head by head.

    Args:
        maps: (student's, teacher's) of each pair of layers, [rows, heads, tokens, tokens].
        queries: boolean [rows, tokens]: the tokens whose attention counts.

    Returns:
        A number per such query [n], the mean over the layers.

    Raises:
        ValueError: no maps, as models give under any attention but "eager".
    """
    if not maps:
        raise ValueError('no attention maps: load both models with attn_implementation="eager"')
    layers = [
        (ours.float().mean(dim=1) - theirs.float().mean(dim=1))[queries].square().sum(dim=-1) for ours, theirs in maps
    ]
    return torch.stack(layers).mean(dim=0)


def summed_in_chunks(
    terms_of: Callable[..., torch.Tensor], *per_token: torch.Tensor, width: int, chunk_logits: int = CHUNK_LOGITS
) -> torch.Tensor:
    """Sums over tokens of `terms_of(*slices)`, which makes logits that must never all exist at once.

    Each chunk's inner tensors are made again in the backward pass, so memory is one chunk's however many tokens.

    Args:
        terms_of: slices of `per_token` -> sums of the terms over the slice's tokens [terms].
        per_token: tensors [n, ...].
        width: logits a token.
    """
    size = max(1, chunk_logits // width)
    tokens = len(per_token[0])
    if tokens <= size:
        return terms_of(*per_token)
    chunks = ([tensor[start : start + size] for tensor in per_token] for start in range(0, tokens, size))
    return torch.stack([checkpoint(terms_of, *chunk, use_reentrant=False) for chunk in chunks]).sum(dim=0)
