"""What an answer's scores go through before its next token is chosen: masks of a grammar, and draws of a sample."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch

FEW = 256  # of the likeliest tokens, which are looked at first


class Steering(ABC):
    """Changes the scores of one answer, from its first token to its last.

    Attributes:
        closed: it has brought the text to an end that the model, by its likeliest token, did not want.
    """

    closed: bool = False

    @abstractmethod
    def change(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores [columns] of the next token as they are to be; may work in place.

        It can be asked twice for one token, where another answer's steering has failed.
        """

    def consume(self, token: int) -> None:  # noqa: B027 (many need not know)
        """The token that was chosen, also the one that ends the answer."""

    def forced(self) -> int | None:
        """The token that comes next whatever the scores are; None where they count, or that is not known.

        It is `consume`d like any other, and no scores are changed for it.
        """
        return None

    def fitting(self, tokens: Sequence[int]) -> int:
        """How many of some tokens could come next, one after another, as far as that is known without scores."""
        return len(tokens)

    @classmethod
    def change_all(cls, rows: Sequence[Self], scores: torch.Tensor) -> torch.Tensor:
        """`change` of answers that are written together; scores [rows, columns]."""
        return torch.stack([row.change(own) for row, own in zip(rows, scores, strict=True)])


def sample_stream(seed: int, number: int, prompt: Sequence[int]) -> torch.Generator:
    """The random numbers of one sample: they follow from the prompt, the sample's number and the seed alone."""
    digest = hashlib.sha256(repr((seed, number, list(prompt))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def draw(
    scores: torch.Tensor, streams: Sequence[torch.Generator], temperature: float, top_p: float = 1.0
) -> torch.Tensor:
    """A token [rows] from each row's distribution, by the Gumbel-max trick.

    The argmax of log-probabilities plus Gumbel noise is a sample of the distribution.

    Args:
        scores: [rows, columns], float32.
        streams: one of each row's own.
        top_p: see `Decoding`.
    """
    logits = scores / temperature
    noise = torch.stack([torch.rand(scores.shape[1], generator=stream) for stream in streams])
    if top_p == 1:
        return (logits + _gumbel(noise, logits)).argmax(dim=1)
    ordered, indices = _likeliest(logits, top_p)
    probabilities = (ordered - logits.logsumexp(dim=1, keepdim=True)).exp()
    beyond = probabilities.cumsum(dim=1) - probabilities >= top_p  # the best token always stays
    noisy = ordered.masked_fill(beyond, float("-inf")) + _gumbel(noise.gather(1, indices.cpu()), logits)
    return indices.gather(1, noisy.argmax(dim=1, keepdim=True))[:, 0]


def _likeliest(logits: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logits [rows, some] in order, with their places: so many that they have `top_p` together.

    Most texts need few, and to order a whole vocabulary takes longer than a small model's step.
    """
    if logits.shape[1] > FEW:
        ordered, indices = logits.topk(FEW, dim=1)
        if bool(((ordered.logsumexp(dim=1) - logits.logsumexp(dim=1)).exp() > top_p).all()):
            return ordered, indices
    return logits.sort(dim=1, descending=True)


def _gumbel(noise: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return -torch.log(-torch.log(noise.clamp(min=1e-20, max=1 - 1e-7))).to(like.device)
