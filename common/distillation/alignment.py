"""One text in the tokens of two vocabularies: where each of the student's tokens stands among the teacher's."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from common.models import tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.models.tokenizers import Encoded


UNKNOWN = b"\xff"  # a special token in the midst of an answer; no text has this byte


class Vocabulary:
    """A tokenizer's tokens as bytes.

    Attributes:
        words: by token id; empty for special tokens, which have no text.
        end: the token that ends a turn.
        stops: all tokens that end one.
    """

    def __init__(self, words: Sequence[bytes], end: int, stops: Sequence[int]) -> None:
        self.words, self.end, self.stops = words, end, stops

    @staticmethod
    @lru_cache(maxsize=4)
    def of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        """A tokenizer's; it takes seconds for a large one, so that it is kept."""
        return Vocabulary(tokenizers.token_bytes(tokenizer), tokenizer.eos_token_id, tokenizers.stop_ids(tokenizer))

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The token of each word; of several the last, since those that stand for single bytes come first."""
        return {word: token for token, word in enumerate(self.words) if word}

    @cached_property
    def _ordered(self) -> list[tuple[bytes, int]]:
        return sorted((word, token) for token, word in enumerate(self.words) if word)

    def beginning_with(self, start: bytes) -> list[tuple[bytes, int]]:
        """(word, token) of those that begin with these bytes, in the order of their words."""
        first = bisect_left(self._ordered, (start,))
        after = bisect_left(self._ordered, start, lo=first, key=lambda entry: entry[0][: len(start)]) if start else 0
        last = bisect_right(self._ordered, start, lo=after, key=lambda entry: entry[0][: len(start)])
        return self._ordered[first:last]

    def first_of(self, text: bytes) -> int | None:
        """The longest token that begins a text; None where none does."""
        lengths = range(len(text), 0, -1)
        return next((token for length in lengths if (token := self.ids.get(text[:length])) is not None), None)

    def runs(self, row: Encoded) -> list[Run]:
        """The stretches of a row that are learnt, one a turn."""
        runs: list[Run] = []
        before = None
        for position in row.learnt:
            if position != before or runs[-1].ends:
                runs.append(Run([], []))
            before = position + 1
            token = row.input_ids[position]
            runs[-1].tokens.append(token)
            runs[-1].words.append(b"" if token == self.end else self.words[token] or UNKNOWN)
        return runs


@dataclass(frozen=True)
class Run:
    """Tokens that are learnt of one turn, and their bytes (none for the end of the turn)."""

    tokens: list[int]
    words: list[bytes]

    @property
    def ends(self) -> bool:
        """Whether it ends its turn."""
        return bool(self.words) and not self.words[-1]

    @property
    def text(self) -> bytes:
        return b"".join(self.words)

    @property
    def bounds(self) -> list[int]:
        """Bytes before each token, and those of all."""
        return list(accumulate(map(len, self.words), initial=0))


@dataclass(frozen=True)
class Place:
    """Where a token of the student's stands in the teacher's row.

    Attributes:
        own: the token.
        at: the teacher's token, of those it learns, in which it begins.
        said: the beginning of that token, which the student has said before.
        whole: how many of the teacher's tokens end within it.
        part: the beginning of the teacher's token behind these with which it ends.
    """

    own: int
    at: int
    said: bytes = b""
    whole: int = 1
    part: bytes = b""


def same_text(ours: Sequence[Run], theirs: Sequence[Run]) -> bool:
    """Whether two rows learn the same, turn by turn."""
    return [(run.text, run.ends) for run in ours] == [(run.text, run.ends) for run in theirs]


def places(ours: Sequence[Run], theirs: Sequence[Run]) -> list[Place]:
    """Where the student's tokens stand in the teacher's row, which learns the same text (see `same_text`)."""
    found: list[Place] = []
    before = 0
    for mine, their in zip(ours, theirs, strict=True):
        bounds, text = their.bounds, their.text
        starts = bounds[: len(their.words) - their.ends]  # of tokens with text
        for token, word, start in zip(mine.tokens, mine.words, mine.bounds[:-1], strict=True):
            if not word:
                found.append(Place(token, before + len(starts)))
                continue
            at, stop = bisect_right(starts, start) - 1, start + len(word)
            behind = bisect_right(bounds, stop, hi=len(starts) + 1) - 1  # tokens that end by then
            whole = max(0, behind - at)
            part = text[bounds[behind] : stop] if whole else b""
            found.append(Place(token, before + at, text[bounds[at] : start], whole, part))
        before += len(their.words)
    return found
