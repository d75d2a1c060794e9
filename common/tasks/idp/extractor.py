"""IDP (documents to JSON): the prompt, and a model that answers it with JSON of a schema, also for long documents."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from common import cli
from common.cli import UserError
from common.data import splits
from common.generation import json_schema
from common.models import tokenizers
from common.models.batching import context_of
from common.models.flags import add_model_flags
from common.models.source import LoadedModel
from common.tasks.idp import documents
from common.tasks.idp.field_metrics import path_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.generation.result import Generation

INSTRUCTION = "Extract from the document what the JSON Schema asks for. Return only the JSON."
SMALLEST_PIECE = 32  # tokens that there must be for the document
OVERLAP = 200  # characters that two pieces of a long document share, so that a line item is whole in one of them


def prompt(document: str, schema: json_schema.Schema) -> str:
    """The user turn for one document; prepare, train, infer, eval and serve all build it here."""
    described = {key: value for key, value in schema.items() if key != "$schema"} if schema is not True else {}
    compact = json.dumps(described, ensure_ascii=False, separators=(",", ":"))
    return f"{INSTRUCTION}\n\nJSON Schema: {compact}\n\nDocument:\n{documents.clean(document)}"


def group_of(document: str) -> str:
    """The group hash of a document: the same for texts that differ in case, punctuation and white space alone."""
    return splits.group_hash(" ".join(re.findall(r"\w+", document.casefold())))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of everything that extracts: the schema, the budget, long documents, the model."""
    parser.add_argument("--schema", required=True, help="JSON Schema (draft 2020-12) of the fields")
    parser.add_argument("--best_effort", action="store_true", help="check afterwards what decoding cannot enforce")
    parser.add_argument("--max_new_tokens", type=cli.positive_int, default=512, help="budget of one answer")
    parser.add_argument(
        "--max_len", type=cli.positive_int, help="tokens of prompt and answer together; default: the model's context"
    )
    parser.add_argument(
        "--long",
        choices=("split", "refuse"),
        default="split",
        help="a document beyond --max_len: split at line ends and merge by confidence, or refuse (default: split)",
    )
    add_model_flags(parser)


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
        found: what preflight made of the schema; None: the model answers freely.
        max_len: tokens of prompt and answer together; None: the model's context.
        long: "split" or "refuse" a document that does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        schema: json_schema.Schema,
        found: json_schema.Preflight | None,
        *,
        max_new_tokens: int = 512,
        max_len: int | None = None,
        long: str = "split",
        max_batch_tokens: int = 8192,
    ) -> None:
        self.model, self.tokenizer, self.schema = model, tokenizer, schema
        self.max_new_tokens, self.long, self.max_batch_tokens = max_new_tokens, long, max_batch_tokens
        context = context_of(model.config)
        self.room = min(max_len or context, context) - max_new_tokens  # for the prompt
        bare = len(tokenizers.encode_prompt(tokenizer, prompt("", schema)))
        if self.room < bare + SMALLEST_PIECE:
            raise UserError(
                f"the schema takes {bare} tokens and the answer {max_new_tokens}, which leaves no room for a document "
                f"in {self.room + max_new_tokens}; lower --max_new_tokens, or raise --max_len where the model allows it"
            )
        self.grammar = None
        if found is not None:
            from common.generation.json_grammar import JsonGrammar

            self.grammar = JsonGrammar(found.grammar_schema, tokenizer, model.config.get_text_config().vocab_size)
            shortest = self.grammar.shortest
            if shortest is not None and shortest > max_new_tokens:
                raise UserError(f"the shortest JSON of this schema has {shortest} tokens; raise --max_new_tokens")

    @classmethod
    def from_flags(
        cls,
        args: argparse.Namespace,
        loaded: LoadedModel,
        schema: json_schema.Schema,
        found: json_schema.Preflight | None,
    ) -> Extractor:
        """The extractor that a command's flags (`add_flags`) ask for, of a `load`ed model and tokenizer."""
        return cls(
            loaded.model,
            loaded.tokenizer,
            schema,
            found,
            max_new_tokens=args.max_new_tokens,
            max_len=args.max_len,
            long=args.long,
            max_batch_tokens=loaded.max_batch_tokens,
        )

    def extract(self, texts: Sequence[str], confidence: bool = False) -> list[Extraction]:
        """One extraction per document; with `confidence`, each leaf's."""
        from common.generation.generate import generate

        pieces = [self._pieces(documents.clean(text)) for text in texts]
        prompts = [self._encode(piece) for some in pieces for piece in some]
        answers = generate(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=self.max_new_tokens,
            processors=self.grammar.processors(self.max_new_tokens) if self.grammar else None,
            max_batch_tokens=self.max_batch_tokens,
        )
        samples = (sample for (sample,) in answers)
        return [
            self._read(list(islice(samples, len(some))), len(text), confidence)
            for text, some in zip(texts, pieces, strict=True)
        ]

    def _encode(self, piece: str) -> list[int]:
        return tokenizers.encode_prompt(self.tokenizer, prompt(piece, self.schema))

    def _pieces(self, text: str) -> list[str]:
        """The document in as few halvings as make every piece fit; none where it is to be refused instead."""
        if len(self._encode(text)) <= self.room:
            return [text]
        if self.long == "refuse":
            return []
        left, right = halves(text)
        return self._pieces(left) + self._pieces(right)

    def _read(self, answers: list[Generation], characters: int, confidence: bool) -> Extraction:
        if not answers:
            return Extraction(
                None,
                f"the document ({characters:,} characters) does not fit the {self.room:,} tokens that there are for "
                "the prompt; pass --long split, or raise --max_len where the model allows it",
                "",
                pieces=0,
            )
        found = [read_json(answer, self.schema) for answer in answers]
        failed = [f"piece {number}: {error}" for number, (_, error) in enumerate(found, start=1) if error]
        value, error = found[0]
        scores: dict[str, float] = {}
        if len(answers) > 1 and failed:
            value, error = None, failed[0]
        elif not failed and (confidence or len(answers) > 1):
            merged = merge([scored(answer, self.tokenizer) for answer in answers])
            value, scores = plain(merged), confidences(merged)
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


# Long documents.


def halves(text: str) -> tuple[str, str]:
    """A document cut near its middle, after a line if there is one, some lines before the cut being in both halves.

    Both are shorter than the document, which must have two characters.
    """
    middle = len(text) // 2
    reach = len(text) // 4
    cut = text.rfind("\n", middle - reach, middle) + 1
    if not cut:  # one long line
        cut = text.rfind(" ", middle - reach, middle) + 1 or middle
    start = text.find("\n", max(1, cut - min(OVERLAP, reach)) - 1, cut) + 1
    return text[:cut], text[start or cut :]


@dataclass(frozen=True)
class Scored:
    """A leaf of an answer, and the mean probability of its tokens."""

    value: Any
    confidence: float


def merge(parts: Sequence[Any]) -> Any:
    """The answers to the pieces of one document as one; trees of dicts, lists and `Scored` leaves, as `scored` makes.

    Of a leaf the one that the model was surest of is taken, an empty one only where there is no other. Lists are
    joined, without the items that a list starts with and the one before it ended with (pieces overlap).
    """
    parts = [part for part in parts if not _empty(part)] or list(parts[:1])
    if all(isinstance(part, dict) for part in parts):
        keys = dict.fromkeys(key for part in parts for key in part)
        return {key: merge([part[key] for part in parts if key in part]) for key in keys}
    if all(isinstance(part, list) for part in parts):
        joined: list = []
        for part in parts:
            shared = range(min(len(joined), len(part)), 0, -1)
            repeated = next((n for n in shared if plain(joined[-n:]) == plain(part[:n])), 0)
            joined += part[repeated:]
        return joined
    return max(parts, key=lambda part: min(confidences(part).values(), default=0.0))


def _empty(part: Any) -> bool:
    return plain(part) in (None, "", [], {})


def plain(part: Any) -> Any:
    """A tree with the values of its `Scored` leaves."""
    if isinstance(part, dict):
        return {key: plain(member) for key, member in part.items()}
    return [plain(item) for item in part] if isinstance(part, list) else part.value


def confidences(part: Any, path: tuple[str | int, ...] = ()) -> dict[str, float]:
    """The confidence of every leaf of a tree by its path, e.g. "line_items[0].qty"."""
    if isinstance(part, Scored):
        return {path_name(path): part.confidence}
    members = part.items() if isinstance(part, dict) else enumerate(part)
    return {name: value for key, member in members for name, value in confidences(member, (*path, key)).items()}


# Confidence.


def scored(answer: Generation, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The JSON of an answer as dicts, lists and `Scored` leaves."""
    ends = []  # for each token, the character that it ends before
    for count in range(1, len(answer.tokens) + 1):
        known = tokenizer.decode(answer.tokens[:count], skip_special_tokens=True)
        ends.append(len(known.rstrip("\ufffd")))  # half of a character
    starts = [0, *ends]

    def confidence(start: int, end: int) -> float:
        spans = zip(starts, ends, answer.logprobs, strict=False)
        own = [math.exp(logprob) for first, last, logprob in spans if first < end and last > start]
        return sum(own) / len(own) if own else 0.0

    return parse_scored(answer.text, confidence)


def parse_scored(text: str, confidence: Callable[[int, int], float]) -> Any:
    """JSON text as dicts, lists and `Scored` leaves; `confidence(start, end)` is asked of a leaf's characters."""
    decode = json.JSONDecoder().raw_decode

    def skip(place: int, extra: str = "") -> int:
        while text[place] in " \t\n\r" + extra:
            place += 1
        return place

    def read(place: int) -> tuple[Any, int]:
        if text[place] == "{":
            members: dict[str, Any] = {}
            place = skip(place + 1)
            while text[place] != "}":
                key, place = decode(text, place)
                members[key], place = read(skip(place, ":"))
                place = skip(place, ",")
            return members, place + 1
        if text[place] == "[":
            items: list = []
            place = skip(place + 1)
            while text[place] != "]":
                item, place = read(place)
                items.append(item)
                place = skip(place, ",")
            return items, place + 1
        value, end = decode(text, place)
        return Scored(value, confidence(place, end)), end

    return read(skip(0))[0]
