"""A teacher's distributions in the tokens of a student that has another vocabulary.

Both read the same text, each in its own tokens. Where one of the student's begins, the teacher's distribution for what
comes is the one behind its last token that ends there, or before: then the student has said the beginning of the
teacher's next token already, and only tokens with that beginning are left (renormalised). Each of the teacher's tokens,
or what is left of it, counts for the longest of the student's that begins it. The student's own next token, where it is
longer than the teacher's, gets the product of the teacher's probabilities along it (the chain rule). The outcome is
over the student's vocabulary, so that all else, cache and losses, is as between models of one vocabulary, for which
this is the identity.

It is an approximation in one respect: a token of the student's that begins with one of the teacher's is told apart from
it only where the text goes on with it. Spans with merged probabilities are those of GOLD (Patino et al. 2025), which
like ULD (Boizard et al. 2024, arXiv:2402.12030) compares sorted probabilities where two tokens differ; here they are
given to tokens by their text.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from common.distillation.alignment import Place, Vocabulary, places
from common.distillation.teacher_cache import row_key
from common.models.batching import CHUNK_LOGITS
from common.models.tokenizers import Encoded
from common.training import losses

FLOOR = 1e-9  # probability of an outcome that the teacher excludes, so that it has a logarithm


class Translation:
    """From a teacher's vocabulary to a student's.

    Args:
        readings: the teacher's row by the key (`row_key`) of the student's; both learn the same text.
    """

    def __init__(self, teacher: Vocabulary, student: Vocabulary, readings: Mapping[bytes, Encoded]) -> None:
        self.teacher, self.student, self.readings = teacher, student, readings
        self._continued: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}

    @cached_property
    def fingerprint(self) -> str:
        """Of the student's vocabulary, in which a cache is written."""
        return hashlib.sha256(b"\0".join(self.student.words)).hexdigest()[:16]

    @cached_property
    def columns(self) -> torch.Tensor:
        """The student's token that each of the teacher's counts for [teacher's vocabulary]; `len(student)`: none."""
        columns = [self.column(word) for word in self.teacher.words]
        for stop in self.teacher.stops:
            columns[stop] = self.student.end
        return torch.tensor(columns)

    def column(self, text: bytes) -> int:
        """The student's token that a text counts for."""
        token = self.student.first_of(text)
        return len(self.student) if token is None else token

    def reading(self, row: Encoded) -> Encoded:
        """The teacher's row of a student's."""
        return self.readings[row_key(row)]

    def continued(self, said: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's tokens that begin with these bytes and go on [n]; those that what is left counts for [n]."""
        if said not in self._continued:
            longer = [(word, token) for word, token in self.teacher.beginning_with(said) if word != said]
            pairs = [(token, self.column(word[len(said) :])) for word, token in longer]
            self._continued[said] = tuple(torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(dim=1))
        return self._continued[said]

    def outcomes(
        self, rows: Sequence[Encoded], logits_of: Callable[[slice], torch.Tensor], k: int, own: bool = False
    ) -> dict[str, torch.Tensor]:
        """`teacher_cache.pack`'s arguments for the student's learnt tokens of `rows`, one row behind the other.

        Args:
            logits_of: the teacher's logits [n, columns] for a slice of the tokens that it learns in its own rows.
            k: outcomes.
            own: the token that the row goes on with is one of them, in the place of the least likely.
        """
        wanted: list[Place] = []
        tokens: list[int] = []  # the teacher's, of all rows
        for row in rows:
            theirs = self.teacher.runs(self.reading(row))
            found = places(self.student.runs(row), theirs)
            wanted += [replace(place, at=place.at + len(tokens)) for place in found]
            tokens += [token for run in theirs for token in run.tokens]
        return _Reader(self, tokens, wanted, k, own).read(logits_of)


class _Reader:
    """The places of a batch, read from the last to the first: a product along a token needs what comes behind."""

    def __init__(
        self, translation: Translation, tokens: Sequence[int], wanted: Sequence[Place], k: int, keep_own: bool
    ) -> None:
        self.translation, self.tokens, self.wanted = translation, tokens, wanted
        self.k, self.keep_own = k, keep_own
        self.starting: dict[int, list[int]] = defaultdict(list)  # numbers of the places by their `at`
        self.parts: dict[int, set[bytes]] = defaultdict(set)  # beginnings whose mass is wanted, by position
        for number, place in enumerate(wanted):
            self.starting[place.at].append(number)
            if place.part:
                self.parts[place.at + place.whole].add(place.part)
        self.own = torch.ones(len(tokens), dtype=torch.float64)  # probability of each of the teacher's tokens
        self.mass: dict[tuple[int, bytes], float] = {}

    def read(self, logits_of: Callable[[slice], torch.Tensor]) -> dict[str, torch.Tensor]:
        vocabulary = len(self.translation.teacher)
        size = max(1, CHUNK_LOGITS // (4 * max(vocabulary, len(self.translation.student))))
        found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for stop in range(len(self.tokens), 0, -size):
            start = max(0, stop - size)
            p = losses.log_probs(logits_of(slice(start, stop))[:, :vocabulary]).exp()
            own = torch.tensor(self.tokens[start:stop], device=p.device)
            self.own[start:stop] = p.gather(1, own[:, None])[:, 0].double().cpu()
            for at in range(start, stop):
                for part in self.parts[at]:
                    tokens = [token for _, token in self.translation.teacher.beginning_with(part)]
                    self.mass[at, part] = float(p[at - start, tokens].sum())
            numbers = [number for at in range(start, stop) for number in self.starting[at]]
            if numbers:
                found |= zip(numbers, zip(*self._kept(p, start, numbers), strict=True), strict=True)
        kept = zip(*map(found.__getitem__, range(len(self.wanted))), strict=True)
        ids, probabilities = map(torch.stack, kept)
        rest = (1 - probabilities.sum(dim=-1)).clamp(min=0)
        return {"ids": ids, "rest": rest, "logprobs": probabilities.clamp(min=FLOOR).log()}

    def _kept(self, p: torch.Tensor, start: int, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The k likeliest of the student's tokens [places, k] at some places, and their probabilities.

        Args:
            p: of the teacher's tokens [n, vocabulary], from its token `start` on.
        """
        at = [self.wanted[number].at - start for number in numbers]
        given = p.new_zeros(len(numbers), len(self.translation.student) + 1)
        given.index_add_(1, self.translation.columns[: p.shape[1]].to(p.device), p[at])
        for row, number in enumerate(numbers):
            place = self.wanted[number]
            token, word = self.tokens[place.at], self.translation.teacher.words[self.tokens[place.at]]
            column, left = int(self.translation.columns[token]), 1.0
            if place.said:
                tokens, columns = (ids.to(p.device) for ids in self.translation.continued(place.said))
                shares = p[at[row], tokens]
                left = float(shares.sum().clamp(min=FLOOR))
                given[row].zero_().index_add_(0, columns, shares / left)
                column = self.translation.column(word[len(place.said) :])
            if column != place.own:
                along = self._along(place) / left
                given[row, column] = (given[row, column] - along).clamp(min=0)
                given[row, place.own] += along
        ids = given[:, :-1].topk(self.k).indices
        if self.keep_own:
            own = torch.tensor([self.wanted[number].own for number in numbers], device=p.device)
            ids = losses.with_own(ids, own)
        return ids, given.gather(1, ids)

    def _along(self, place: Place) -> float:
        """The teacher's probability of its tokens along the student's, as far as that goes."""
        behind = place.at + max(1, place.whole)
        product = float(self.own[place.at : behind].prod())
        return product * self.mass[behind, place.part] if place.part else product
