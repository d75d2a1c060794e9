"""Documents that are read together: each extraction as its last answer ends, and what is asked again before that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from common.generation.decoding import Decoding
from common.tasks.idp import documents

if TYPE_CHECKING:
    from common.generation.generate import TextBatch
    from common.generation.json_grammar import JsonGrammar, JsonRow
    from common.generation.result import Generation
    from common.tasks.idp.extractor import Extraction, Extractor


@dataclass(eq=False)
class Reading:
    """A document while it is read.

    Attributes:
        pieces: none where it is to be refused.
        left: answers that are still to come.
        tries: at each piece; the last one counts.
        earlier: the same of when the pieces were first asked, where they were asked twice.
        merged, error: of the answers to several pieces.
    """

    number: int
    text: str
    pieces: list[str]
    left: int = 0
    tries: list[list[Generation]] = field(default_factory=list)
    earlier: list[list[Generation]] = field(default_factory=list)
    merged: Any = None
    error: str | None = None

    @property
    def answers(self) -> list[Generation]:
        """The last try at each piece."""
        return [of_piece[-1] for of_piece in self.tries]


@dataclass(frozen=True, eq=False)
class _Question:
    """What a piece of a document is asked; `grammar` makes what holds the answer, `scored`: with log-probabilities."""

    reading: Reading
    index: int
    prompt: list[int]
    grammar: Callable[[], JsonGrammar]
    scored: bool


def _hold(question: _Question, budget: int) -> JsonRow:
    from common.generation.json_grammar import JsonRow

    return JsonRow(question.grammar(), budget)


class DocumentBatch:
    """What one extractor makes of some documents.

    Args:
        confidence: with each leaf's.
        between: see `Extractor.extract_each`.
        batch: where answers are asked for, if others ask there, too; who runs it gives each answer to `take`.
    """

    def __init__(
        self,
        extractor: Extractor,
        confidence: bool = False,
        between: Callable[[], None] = lambda: None,
        batch: TextBatch | None = None,
    ) -> None:
        from common.generation.generate import TextBatch

        self.extractor, self.settings = extractor, extractor.settings
        self.confidence, self.between = confidence, between
        self.batch = batch or TextBatch(extractor.model, extractor.tokenizer, extractor.max_batch_tokens)

    def reading(self, number: int, text: str) -> Reading:
        """A document that is to be read, cut into pieces."""
        return Reading(number, text, self.extractor.pieces(documents.clean(text), self.between))

    def begin(self, reading: Reading) -> list[tuple[int, Extraction]]:
        """Ask for the answers to a document; (its number, its extraction) where it is refused."""
        if not reading.pieces:
            return [(reading.number, self.extractor.refused(reading.text))]
        self._ask(reading)
        return []

    def run(self) -> Iterator[tuple[int, Extraction]]:
        """(number of a document, its extraction) of each, as it has been read."""
        for written in self.batch.run():
            yield from self.take(*written)

    def take(self, question: _Question, sample: int, answer: Generation) -> list[tuple[int, Extraction]]:
        """As in `run`, of what the batch has written; none where the document is still being read."""
        reading = question.reading
        reading.tries[question.index].append(answer)
        if budget := self._longer_budget(question, answer):
            self._put(question, budget, first=True)
            return []
        reading.left -= 1
        if reading.left:
            return []
        if len(reading.pieces) > 1 and self.extractor.lacks(reading, self.between):
            self._ask(reading)
            return []
        return [(reading.number, self.extractor.read(reading, self.confidence))]

    def _ask(self, reading: Reading) -> None:
        """Ask for the answers to the pieces of a document; a second time for what none of them has given."""
        extractor, several = self.extractor, len(reading.pieces) > 1
        again = bool(reading.tries)
        part = several and not again
        reading.left = len(reading.pieces)
        reading.earlier, reading.tries = reading.tries, [[] for _ in reading.pieces]
        for number, piece in enumerate(reading.pieces):
            # made when its answer begins
            grammar = cache(partial(extractor.grammar_for, piece, self.between, part))
            question = _Question(reading, number, extractor.encode(piece, part), grammar, self.confidence or several)
            self._put(question, self.settings.max_new_tokens, first=again)

    def _put(self, question: _Question, budget: int, *, first: bool) -> None:
        self.batch.ask(
            question,
            question.prompt,
            Decoding(
                budget,
                thinking=self.settings.thinking,
                prompt_lookup_num_tokens=self.settings.prompt_lookup_num_tokens,
            ),
            steering=partial(_hold, question, budget) if self.extractor.grammar else None,
            logprobs=question.scored,
            first=first,
        )

    def _longer_budget(self, question: _Question, answer: Generation) -> int | None:
        """What an answer that was cut is tried again with: twice the budget, or what the context leaves of it."""
        if self.settings.on_cut != "retry" or not answer.cut or len(question.reading.tries[question.index]) > 1:
            return None
        left = (self.extractor.limit - len(question.prompt)) // (1 + self.settings.thinking)
        budget = min(2 * self.settings.max_new_tokens, left)
        return budget if budget > self.settings.max_new_tokens else None
