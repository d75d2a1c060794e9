"""Drafts of what comes next in an answer that copies: from where its last tokens stood before, in it or its prompt.

Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding; transformers'
`prompt_lookup_num_tokens`). A draft is read together with the newest token, and those of its tokens stay that the
model would have written itself, so that nothing but time hangs on how good it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

LONGEST, SHORTEST = 3, 1  # tokens that have to be the same where a draft is taken from
FIRST_SHARE = 0.5  # of the tokens of drafts that are right, before any was tried
WEIGHT = 4  # tokens of drafts that what is known of a batch counts as, beside those of one text
MEMORY = 256  # tokens of drafts after which what is known of a batch counts half


class Record:
    """How many tokens of drafts were right, by how many tokens had been the same; of a batch, or of one text."""

    def __init__(self) -> None:
        self.tried: Counter[int] = Counter()
        self.right: Counter[int] = Counter()

    def add(self, width: int, tried: int, right: int) -> None:
        self.tried[width] += tried
        self.right[width] += right

    def share(self, width: int, before: float) -> float:
        """Of the next token of a draft that is right, by all that is known; `before`: what was thought before."""
        return (self.right[width] + WEIGHT * before) / (self.tried[width] + WEIGHT)


class PromptLookup:
    """Where each few tokens of one text stood last.

    Args:
        most: tokens of a draft.
        of_batch: what is known of the texts that are written beside it.
    """

    def __init__(self, prompt: Sequence[int], most: int, of_batch: Record) -> None:
        self._ids = list(prompt)
        self._prompt, self._most = len(prompt), most
        self._behind: dict[tuple[int, ...], int] = {}  # the place behind the last n-gram, but for that at the end
        self._known = 0  # tokens of which the n-grams that end before them are in there
        self._of_batch, self._own = of_batch, Record()
        self._width = 0  # of the n-gram that the last draft stood behind

    def draft(self, answer: Sequence[int], most: int, least_share: float, least_right: float = 0.0) -> list[int]:
        """What stood behind the last tokens of the text before, as far as it pays.

        Args:
            answer: begins with that of the call before.
            least_share: a token pays that is likelier to be read to some purpose, those before it right, too.
            least_right: a draft pays of which more tokens are to be expected to be right.
        """
        ids = self._ids
        ids += answer[len(ids) - self._prompt :]
        for end in range(max(self._known, 1), len(ids)):
            for width in range(SHORTEST, min(LONGEST, end) + 1):
                self._behind[tuple(ids[end - width : end])] = end
        self._known = len(ids)
        for width in range(min(LONGEST, len(ids)), SHORTEST - 1, -1):
            place = self._behind.get(tuple(ids[len(ids) - width :]))
            if place is not None:
                self._width = width
                return ids[place : place + self._worth(width, min(most, self._most), least_share, least_right)]
        return []

    def learn(self, tried: int, right: int) -> None:
        """So many tokens of the last draft were tried, and so many of them, from its first on, were right."""
        tried = min(tried, right + 1)  # what comes behind a wrong one tells nothing
        for record in (self._own, self._of_batch):
            record.add(self._width, tried, right)
        if self._of_batch.tried[self._width] > MEMORY:
            self._of_batch.tried[self._width] /= 2
            self._of_batch.right[self._width] /= 2

    def _worth(self, width: int, most: int, least_share: float, least_right: float) -> int:
        share = self._own.share(width, self._of_batch.share(width, FIRST_SHARE))
        count, expected, all_right = 0, 0.0, share
        while count < most and all_right > least_share:
            count, expected, all_right = count + 1, expected + all_right, all_right * share
        return count if expected > least_right else 0
