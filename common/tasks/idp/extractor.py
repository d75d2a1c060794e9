"""A model that answers documents with JSON of a schema."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from common.cli import UserError
from common.generation import json_schema
from common.generation.decoding import LOOKUP
from common.models import tokenizers
from common.models.batching import context_of
from common.models.source import LoadedModel
from common.processes import OutOfTime, time_limit
from common.tasks.idp import confidence as confidences
from common.tasks.idp import long_documents, prompt, wholeness
from common.tasks.idp.alignment import Haystack
from common.tasks.idp.answer_form import UNTRAINED, AnswerForm
from common.tasks.idp.document_batch import DocumentBatch, Reading
from common.tasks.idp.field_metrics import leaves, path_name
from common.tasks.idp.readers import AS_SHOWN, ReadingSettings
from common.tasks.idp.written_values import TypedFields

if TYPE_CHECKING:
    from common.generation.json_grammar import JsonGrammar
    from common.generation.result import Generation
    from common.tasks.idp.calibration import ConfidenceCalibration


READING_SECONDS = 10.0  # that the typed fields of one answer may take, the whole document searched for its ways
SMALLEST_PIECE = 32  # tokens that there must be for the document


@dataclass(frozen=True)
class ExtractionSettings:
    """How documents are read.

    Attributes:
        max_new_tokens: budget of one answer.
        max_len: tokens of prompt and answer together; None: the model's context.
        long: "split" or "refuse" a document that does not fit.
        on_cut: "retry" an answer that the budget has cut once, with up to twice the budget, or only "flag" it.
        thinking: let a model that reasons think before each answer, within a budget of `max_new_tokens` of its own.
        reading: of fields that are copied as written.
        prompt_lookup_num_tokens: see `Decoding`.
    """

    max_new_tokens: int = 512
    max_len: int | None = None
    long: str = "split"
    on_cut: str = "retry"
    thinking: bool = False
    reading: ReadingSettings = AS_SHOWN
    prompt_lookup_num_tokens: int = LOOKUP

    def as_dict(self) -> dict[str, Any]:
        """Those that decide what is read, for keys of what is kept."""
        settings = asdict(self)
        del settings["prompt_lookup_num_tokens"]
        return settings


@dataclass(frozen=True)
class Extraction:
    """What became of one document.

    Attributes:
        value: the JSON value; None where the text is not JSON.
        error: why `value` is no valid answer; None when it is one.
        text: what the model wrote, with the answers to several pieces on a line each.
        confidence: of each leaf by its path, where it was asked for; see `common.tasks.idp.confidence`.
        tokens: tokens written, those of an answer that was tried again included.
        pieces: in how many pieces the document was read.
        cut: why it is not whole, though it may be valid; None where it is. See `wholeness`.
        written: the value before its typed fields were read; None where the model was to write them in their types.
        notes: what is not sure about typed fields, in sentences that name the field.
    """

    value: Any
    error: str | None
    text: str
    confidence: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    pieces: int = 1
    cut: str | None = None
    written: Any = None
    notes: tuple[str, ...] = ()

    @property
    def as_written(self) -> Any:
        """The value with typed fields as the model wrote them."""
        return self.value if self.written is None else self.written

    @property
    def written_leaves(self) -> dict[str, Any]:
        """Each leaf as the model wrote it, by its path."""
        return {path_name(path): leaf for path, leaf in leaves(self.as_written)}


class Extractor:
    """A model with a schema.

    Args:
        preflight: what `json_schema.preflight` made of the schema; None: the model answers freely.
        form: see `answer_form.form_of`.
        calibration: what confidences become; None: they stay products of probabilities.

    Raises:
        UserError: the schema leaves no room for a document, or its shortest JSON is beyond the budget of an answer.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        schema: json_schema.Schema,
        preflight: json_schema.Preflight | None,
        settings: ExtractionSettings,
        form: AnswerForm = UNTRAINED,
        calibration: ConfidenceCalibration | None = None,
    ) -> None:
        self.calibration = asdict(calibration) if calibration else None
        self.calibrate = calibration.apply if calibration else float
        self.model, self.tokenizer, self.max_batch_tokens = loaded.model, loaded.tokenizer, loaded.max_batch_tokens
        self.schema, self.settings, self.form = schema, settings, form
        self.typed = TypedFields(schema, settings.reading) if form.written else None
        self.asked = self.typed.written_schema if self.typed else schema
        self.asked_of_part = long_documents.optional(self.asked)
        max_new_tokens, context = settings.max_new_tokens, context_of(loaded.model.config)
        self.limit = min(settings.max_len or context, context)  # of prompt, thinking and answer
        written = max_new_tokens * (1 + settings.thinking)
        self.room = self.limit - written  # for the prompt
        bare = len(self.encode(""))
        if self.room < bare + SMALLEST_PIECE:
            raise UserError(
                f"the schema takes {bare} tokens and the answer {written}, which leaves no room for a document "
                f"in {self.limit}; lower --max_new_tokens{', or raise --max_len' if self.limit < context else ''}"
            )
        # asked for a part, a schema can take more: a definition may be in it twice
        self.splits = settings.long == "split" and self.room >= len(self.encode("", True)) + SMALLEST_PIECE
        self.grammar = None
        if preflight is not None:
            self.columns = loaded.model.config.get_text_config().vocab_size
            self.whole = self.typed.grammar_schema("") if self.typed else preflight.grammar_schema
            self.grammar = self._grammar(self.whole)
            shortest = self.grammar.shortest
            if shortest is not None and shortest > max_new_tokens:
                raise UserError(f"the shortest JSON of this schema has {shortest} tokens; raise --max_new_tokens")

    def encode(self, document: str, part: bool = False) -> list[int]:
        """The token ids of the prompt for a document; or for a part of one, whose answer may leave fields out."""
        schema = self.asked_of_part if part else self.asked
        asked = prompt.user_turn(document, schema, self.form.typed_fields, self.form.schema_last)
        return tokenizers.encode_prompt(self.tokenizer, asked, thinking=self.settings.thinking)

    def pieces(self, document: str, between: Callable[[], None] = lambda: None) -> list[str]:
        """A clean document as pieces whose prompts fit; none where it is to be refused instead.

        A piece is asked for as a part, and for what is still required then as a whole document is.

        Args:
            between: see `extract_each`.
        """

        def fits(piece: str) -> bool:
            between()
            return all(len(self.encode(piece, part)) <= self.room for part in {False, piece != document})

        if not self.splits and not fits(document):
            return []
        return long_documents.pieces(document, fits)

    def extract(
        self, texts: Sequence[str], confidence: bool = False, between: Callable[[], None] = lambda: None
    ) -> list[Extraction]:
        """One extraction per document, in their order; see `extract_each`."""
        extractions = dict(self.extract_each(texts, confidence, between))
        return [extractions[number] for number in range(len(texts))]

    def extract_each(
        self,
        texts: Sequence[str],
        confidence: bool = False,
        between: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Extraction]]:
        """(number of a document, its extraction) of each document, as it has been read.

        Args:
            confidence: with each leaf's.
            between: called again and again while long documents are cut and their answers are merged, which takes
                seconds for a million characters; what it raises ends the work.
        """
        work = DocumentBatch(self, confidence, between)
        readings = [work.reading(number, text) for number, text in enumerate(texts)]
        for reading in sorted(readings, key=lambda reading: -max(map(len, reading.pieces), default=0)):
            yield from work.begin(reading)
        yield from work.run()

    def grammar_for(
        self, piece: str, between: Callable[[], None] = lambda: None, part: bool = False
    ) -> JsonGrammar | None:
        """What holds the answer to a piece of a document: typed fields that are copied are copied from there, where the
        grammar of all of them is not too large to be compiled."""
        if self.grammar is None:
            return None
        if self.typed is not None:
            between()
            schema = self.typed.grammar_schema(piece)
            with contextlib.suppress(UserError):
                return self._grammar(long_documents.optional(schema) if part else schema)
        return self.part_grammar if part else self.grammar

    @cached_property
    def part_grammar(self) -> JsonGrammar:
        """What holds the answer to a piece of which nothing is copied."""
        return self._grammar(long_documents.optional(self.whole))

    def _grammar(self, schema: dict[str, Any]) -> JsonGrammar:
        from common.generation.json_grammar import JsonGrammar

        return JsonGrammar(schema, self.tokenizer, self.columns, spaced=self.form.spaced)

    def refused(self, text: str) -> Extraction:
        """What becomes of a document that does not fit."""
        remedy = "pass --long split" if self.settings.long == "refuse" else "lower --max_new_tokens"
        return Extraction(
            None,
            f"the document ({len(text):,} characters) does not fit the {self.room:,} tokens that there are for "
            f"the prompt; {remedy}, or raise --max_len where the model allows it",
            "",
            pieces=0,
        )

    def read(self, reading: Reading, confidence: bool) -> Extraction:
        """What the answers to a document's pieces make of it."""
        if len(reading.pieces) > 1:
            value, error, scores = self._merged(reading)
        else:
            value, error, scores = self._value(reading.answers[0], confidence)
        running = wholeness.ran_on(value, reading.text)
        tries = [*reading.earlier, *reading.tries]
        answers = [of_piece[-1] for of_piece in tries]
        cut = running or any(answer.cut for answer in answers)
        budget = max(len(of_piece) for of_piece in tries) * self.settings.max_new_tokens
        written, notes = None, ()
        if self.typed and error is None:
            written = value
            value, error, notes = self._read_typed(written, reading.text)
        return Extraction(
            value,
            error,
            "\n".join(answer.text for answer in answers),
            scores if confidence else {},
            sum(len(answer.tokens) for of_piece in tries for answer in of_piece),
            len(reading.pieces),
            wholeness.message(budget, running) if cut else None,
            written,
            notes,
        )

    def _value(self, answer: Generation, confidence: bool) -> tuple[Any, str | None, dict[str, float]]:
        """(value, why it is no valid answer or None, confidences) of the answer to a document."""
        # What is copied as written satisfies the schema once it is read.
        value, error = read_json(answer, True if self.typed else self.schema)
        scored = confidence and error is None
        tree = confidences.scored(answer, self.tokenizer, self.calibrate) if scored else {}
        return value, error, confidences.confidences(tree)

    def lacks(self, reading: Reading, between: Callable[[], None]) -> bool:
        """Whether the answers to the pieces leave out what is required, so that it is to be asked for once more.

        Merges them into `reading.merged`, or puts why they cannot be into `reading.error`.
        """
        merged, reading.error = self._merge(reading.pieces, reading.answers, between)
        again = bool(reading.earlier)
        reading.merged = long_documents.fill(reading.merged, merged) if again and not reading.error else merged
        if again or reading.error:
            return False
        return bool(json_schema.errors(confidences.plain(merged), self.asked))

    def _merged(self, reading: Reading) -> tuple[Any, str | None, dict[str, float]]:
        """(value, why it is no valid answer or None, confidences) of the answers to the pieces of a document."""
        if reading.error:
            return None, reading.error, {}
        value = confidences.plain(reading.merged)
        faults = [] if self.typed else json_schema.errors(value, self.schema)
        return value, next(iter(faults), None), confidences.confidences(reading.merged)

    def _merge(
        self, pieces: list[str], answers: list[Generation], between: Callable[[], None]
    ) -> tuple[Any, str | None]:
        """(the answers to the pieces as one tree, why one of them is no valid answer or None)."""
        schema = True if self.typed else long_documents.optional(self.schema)
        parts = []
        for number, (piece, answer) in enumerate(zip(pieces, answers, strict=True), start=1):
            between()
            if error := read_json(answer, schema)[1]:
                return None, f"piece {number}: {error}"
            tree = confidences.scored(answer, self.tokenizer, self.calibrate)
            try:
                with time_limit(READING_SECONDS):
                    parts.append(long_documents.placed(tree, Haystack(piece)))
            except OutOfTime:
                return (
                    None,
                    f"piece {number}: to find its values takes longer than {READING_SECONDS:g} s; ask for fewer",
                )
        return long_documents.merge(parts), None

    def _read_typed(self, written: Any, document: str) -> tuple[Any, str | None, tuple[str, ...]]:
        """(value, why it is no valid answer or None, notes) of an answer with typed fields as the document has them."""
        try:
            with time_limit(READING_SECONDS):  # a schema's patterns can take for ever
                answer = self.typed.read(written, document)
        except OutOfTime:
            return written, f"to read it takes longer than {READING_SECONDS:g} s; make the schema simpler", ()
        faults = answer.faults or json_schema.errors(answer.value, self.schema)
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return answer.value, f"{faults[0]}{more}" if faults else None, answer.notes


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
