"""A model that answers documents with JSON of a schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from common.cli import UserError
from common.generation import json_schema
from common.generation.decoding import Decoding
from common.models import tokenizers
from common.models.batching import context_of
from common.models.source import LoadedModel
from common.tasks.idp import documents, long_documents, prompt

if TYPE_CHECKING:
    from common.generation.result import Generation


SMALLEST_PIECE = 32  # tokens that there must be for the document


@dataclass(frozen=True)
class ExtractionSettings:
    """How documents are read.

    Attributes:
        max_new_tokens: budget of one answer.
        max_len: tokens of prompt and answer together; None: the model's context.
        long: "split" or "refuse" a document that does not fit.
    """

    max_new_tokens: int = 512
    max_len: int | None = None
    long: str = "split"


@dataclass(frozen=True)
class Extraction:
    """What became of one document.

    Attributes:
        value: the JSON value; None where the text is not JSON.
        error: why `value` is no valid answer; None when it is one.
        text: what the model wrote, with the answers to several pieces on a line each.
        confidence: mean probability of the tokens of each leaf, by its path, where it was asked for.
        tokens: tokens written.
        pieces: in how many pieces the document was read.
    """

    value: Any
    error: str | None
    text: str
    confidence: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    pieces: int = 1


class Extractor:
    """A model with a schema.

    Args:
        preflight: what `json_schema.preflight` made of the schema; None: the model answers freely.

    Raises:
        UserError: the schema leaves no room for a document, or its shortest JSON is beyond the budget of an answer.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        schema: json_schema.Schema,
        preflight: json_schema.Preflight | None,
        settings: ExtractionSettings,
    ) -> None:
        self.model, self.tokenizer, self.max_batch_tokens = loaded.model, loaded.tokenizer, loaded.max_batch_tokens
        self.schema, self.settings = schema, settings
        max_new_tokens, context = settings.max_new_tokens, context_of(loaded.model.config)
        self.room = min(settings.max_len or context, context) - max_new_tokens  # for the prompt
        bare = len(self.encode(""))
        if self.room < bare + SMALLEST_PIECE:
            raise UserError(
                f"the schema takes {bare} tokens and the answer {max_new_tokens}, which leaves no room for a document "
                f"in {self.room + max_new_tokens}; lower --max_new_tokens, or raise --max_len where the model allows it"
            )
        self.grammar = None
        if preflight is not None:
            from common.generation.json_grammar import JsonGrammar

            columns = loaded.model.config.get_text_config().vocab_size
            self.grammar = JsonGrammar(preflight.grammar_schema, self.tokenizer, columns)
            shortest = self.grammar.shortest
            if shortest is not None and shortest > max_new_tokens:
                raise UserError(f"the shortest JSON of this schema has {shortest} tokens; raise --max_new_tokens")

    def encode(self, document: str) -> list[int]:
        """The token ids of the prompt for a document, or a piece of one."""
        return tokenizers.encode_prompt(self.tokenizer, prompt.user_turn(document, self.schema))

    def pieces(self, document: str, between: Callable[[], None] = lambda: None) -> list[str]:
        """A clean document as pieces whose prompts fit; none where it is to be refused instead.

        Args:
            between: see `extract`.
        """

        def fits(piece: str) -> bool:
            between()
            return len(self.encode(piece)) <= self.room

        if self.settings.long == "refuse" and not fits(document):
            return []
        return long_documents.pieces(document, fits)

    def extract(
        self, texts: Sequence[str], confidence: bool = False, between: Callable[[], None] = lambda: None
    ) -> list[Extraction]:
        """One extraction per document; with `confidence`, each leaf's.

        Args:
            between: called again and again while long documents are cut and their answers are merged, which takes
                seconds for a million characters; what it raises ends the work.
        """
        from common.generation.generate import generate

        pieces = [self.pieces(documents.clean(text), between) for text in texts]
        answers = generate(
            self.model,
            self.tokenizer,
            [self.encode(piece) for of_document in pieces for piece in of_document],
            Decoding(self.settings.max_new_tokens),
            processors=self.grammar.processors(self.settings.max_new_tokens) if self.grammar else None,
            max_batch_tokens=self.max_batch_tokens,
        )
        samples = (sample for (sample,) in answers)
        return [
            self._read(list(islice(samples, len(of_document))), len(text), confidence, between)
            for text, of_document in zip(texts, pieces, strict=True)
        ]

    def _read(
        self, answers: list[Generation], characters: int, confidence: bool, between: Callable[[], None]
    ) -> Extraction:
        if not answers:
            return Extraction(
                None,
                f"the document ({characters:,} characters) does not fit the {self.room:,} tokens that there are for "
                "the prompt; pass --long split, or raise --max_len where the model allows it",
                "",
                pieces=0,
            )
        results = [read_json(answer, self.schema) for answer in answers]
        failed = [f"piece {number}: {error}" for number, (_, error) in enumerate(results, start=1) if error]
        value, error = results[0]
        scores: dict[str, float] = {}
        if len(answers) > 1 and failed:
            value, error = None, failed[0]
        elif not failed and (confidence or len(answers) > 1):
            parts = []
            for answer in answers:
                between()
                parts.append(long_documents.scored(answer, self.tokenizer))
            merged = long_documents.merge(parts)
            value, scores = long_documents.plain(merged), long_documents.confidences(merged)
            error = next(iter(json_schema.errors(value, self.schema)), None)
        return Extraction(
            value,
            error,
            "\n".join(answer.text for answer in answers),
            scores if confidence else {},
            sum(len(answer.tokens) for answer in answers),
            len(answers),
        )


def read_json(answer: Generation, schema: json_schema.Schema) -> tuple[Any, str | None]:
    """(value, why it is no valid answer or None); the value is None where the text is not JSON at all."""
    parsed = json_schema.parse(answer.text, schema)
    if parsed.error is None:
        return parsed.value, None
    try:
        value = json.loads(answer.text)
    except (ValueError, RecursionError):
        value = None
    return value, parsed.error
