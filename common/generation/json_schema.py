"""JSON Schemas: what of one is enforced while decoding, checked afterwards or refused, before any model loads.

The dialect is draft 2020-12 with formats on. `preflight` classes a schema's keywords and rewrites it into the one that
the grammar engine (llguidance) compiles: without what the engine does not know, and with what it knows only nearly
(dates of months that are too short, say) put more strictly. Nothing here imports torch.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from jsonschema import Draft202012Validator, SchemaError, ValidationError
from jsonschema.validators import extend
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from referencing import Registry

from common.cli import UserError
from common.files import repeated_name
from common.generation import string_formats
from common.generation.schema_graph import contradiction, most_expansions, nodes, pointer, smallest, types
from common.generation.schema_limits import check_limits
from common.processes import OutOfTime, time_limit

Schema = dict[str, Any] | bool
Treatment = Literal["enforced", "checked", "unsupported"]

# Beyond these a schema is refused: a hostile one must not keep preflight, the grammar or the validator busy.
MAX_BYTES, MAX_DEPTH, MAX_NODES, MAX_PROPERTIES = 256 * 1024, 64, 5000, 1000
MAX_EXPANSIONS = 1000  # schemas that apply to one value, references followed
MAX_TRIALS = 64  # fragile keywords tried one by one
MAX_DOCUMENT = 100_000  # characters of the smallest document
PREFLIGHT_SECONDS, VALIDATION_SECONDS = 20.0, 5.0
LIMITS = LLParserLimits(initial_lexer_fuel=200_000)  # a repetition such as a{1000000} is not worked out in advance

ENFORCED = {
    *("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"),
    *("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"),
    *("items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
CHECKED = {
    *("not", "if", "then", "else", "dependentSchemas", "dependentRequired", "$dynamicRef", "propertyNames"),
    *("contains", "minContains", "maxContains", "uniqueItems", "unevaluatedItems", "unevaluatedProperties"),
}
IGNORED = ("$schema", "x-guidance")  # other dialects, and switches of the engine
UNSUPPORTED = {  # of earlier drafts: draft 2020-12 gives them no meaning, though their author meant one
    "dependencies": "draft 2020-12 has dependentRequired and dependentSchemas instead",
    "additionalItems": "draft 2020-12 has prefixItems and items instead",
    "$recursiveRef": "draft 2020-12 has $dynamicRef instead",
    "extends": "draft 2020-12 has allOf instead",
    "disallow": "draft 2020-12 has not instead",
    "divisibleBy": "draft 2020-12 has multipleOf instead",
    "nullable": 'it is OpenAPI 3.0\'s; name null among the types instead, as in ["string", "null"]',
}
# Keywords that the engine knows, but not in every combination. What it refuses is left to the check afterwards.
FRAGILE = ("oneOf", "pattern", "patternProperties", "minProperties", "maxProperties", "multipleOf")

_DATE = (
    r"(?:[1-9][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    r"|(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
# Formats that are enforced, as the grammar has them: more strictly where the engine lets through what is not of one.
FORMATS = {
    "date": {"pattern": f"^{_DATE}$"},
    "time": {"pattern": f"^{_TIME}$"},
    "date-time": {"pattern": f"^{_DATE}T{_TIME}$"},
    "hostname": {"format": "hostname", "maxLength": 253},
    **{name: {"format": name} for name in ("duration", "email", "ipv4", "ipv6", "uuid", "uri")},
}

# The patterns that mean the same to Python's `re`, which the validator uses, and to the engine's regular expressions.
_ESCAPE = r"\\(?:[dwsSnrtfv]|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[^\w\s])"
_IN_CLASS = r"(?:[^\\\[\]&~-]|-(?!-)|&(?!&)|~(?!~)|%s)"
_SAME_MEANING = re.compile(
    rf"(?:[^\\\[\]()*+?{{}}]|{_ESCAPE}"
    rf"|\[(?!\^){_IN_CLASS % _ESCAPE}+\]"
    rf"|\[\^{_IN_CLASS % _ESCAPE.replace('dwsS', '')}+\]"  # a negated class of Unicode's digits is not one of ASCII's
    r"|\((?:\?:)?|\)|(?:[*+?]|\{\d{1,4}(?:,\d{0,4})?\})\??(?![+*?]))*"
)


@dataclass(frozen=True)
class Keyword:
    """One keyword of a schema: where it stands (`#/properties/date/format`) and what becomes of it."""

    path: str
    treatment: Treatment
    reason: str = ""


@dataclass(frozen=True)
class Preflight:
    """The keywords of a schema and what becomes of them; `grammar_schema` is what the decoder compiles."""

    keywords: tuple[Keyword, ...]
    grammar_schema: dict[str, Any] = field(repr=False)

    def of(self, treatment: Treatment) -> list[Keyword]:
        return [keyword for keyword in self.keywords if keyword.treatment == treatment]

    @property
    def enforced(self) -> bool:
        """Every keyword is enforced while decoding, so that a finished document is valid."""
        return len(self.of("enforced")) == len(self.keywords)


@dataclass(frozen=True)
class JsonAnswer:
    """`value` where the text is JSON that satisfies the schema; else `error` says in one sentence why it is not."""

    value: Any
    error: str | None
    text: str


def load(path: str | Path) -> Schema:
    """The schema in a file. Raises UserError where there is none that can be read as JSON."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--schema {path}: {error.strerror}; give the path of a JSON Schema") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--schema {path} is not UTF-8 text; give the path of a JSON Schema") from error
    try:
        return _loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--schema {path} is not JSON: {_short(str(error))}") from error


def preflight(schema: Schema, best_effort: bool = False, seconds: float = PREFLIGHT_SECONDS) -> Preflight:
    """Class every keyword of the schema as enforced while decoding, checked afterwards or unsupported.

    Annotations and keywords that no draft knows are passed over. With `best_effort`, what is unsupported is too.

    Raises:
        UserError: the schema is invalid, refers to other documents, is satisfied by nothing, is too large, takes longer
            than `seconds`, or has keywords that are unsupported and `best_effort` is off.
    """
    try:
        with time_limit(seconds):
            return _preflight(schema, best_effort)
    except OutOfTime:
        raise UserError(f"the schema takes longer than {seconds:g} s to check; make it smaller or simpler") from None


def _preflight(schema: Schema, best_effort: bool) -> Preflight:
    _check_size(schema)
    check_limits(schema)
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise UserError(
            f"not a valid draft 2020-12 schema: {pointer(error.absolute_path)}: {_short(error.message)}"
        ) from error
    except OverflowError as error:  # of the regular expressions' own compiler
        raise UserError(f"the schema has a pattern that cannot be read ({error}); simplify it") from error
    root = {} if schema is True else {"enum": []} if schema is False else copy.deepcopy(schema)
    schemas = nodes(root, checked=True)
    if len(schemas) > MAX_NODES or most_expansions(schemas, MAX_EXPANSIONS) > MAX_EXPANSIONS:
        raise UserError("the schema's references multiply, or lead back to themselves; write it with fewer")
    sizes = smallest(schemas)
    if math.isinf(sizes[id(root)]):
        reasons = (f": {node.path}: {reason}" for node in schemas if (reason := contradiction(node.schema)))
        raise UserError(f"nothing satisfies the schema{next(reasons, ' in finitely many steps')}; correct it")
    if sizes[id(root)] > MAX_DOCUMENT:
        raise UserError(f"the smallest document of the schema has over {MAX_DOCUMENT:,} characters; ask for less")
    keywords = _classify(root, schemas)
    keywords = _leave_out_what_fails(root, keywords)
    _tighten(root)
    if (unsupported := [keyword for keyword in keywords if keyword.treatment == "unsupported"]) and not best_effort:
        named = "; ".join(f"{keyword.path}: {keyword.reason}" for keyword in unsupported[:3])
        more = f"; and {len(unsupported) - 3} more" if len(unsupported) > 3 else ""
        raise UserError(f"the schema asks for what is not supported ({named}{more}); change it, or pass --best_effort")
    return Preflight(tuple(keywords), root)


def errors(value: Any, schema: Schema) -> list[str]:
    """What jsonschema finds wrong with a value, one sentence each with its path; empty where it is valid.

    One of them can be that it takes longer than `VALIDATION_SECONDS` to tell.
    """
    try:
        with time_limit(VALIDATION_SECONDS):
            return _errors(value, schema)
    except OutOfTime:
        return [f"$: to check it takes longer than {VALIDATION_SECONDS:g} s; make the schema simpler"]


def _errors(value: Any, schema: Schema) -> list[str]:
    if isinstance(schema, dict):  # references to the root must not change the dialect either
        schema = {key: part for key, part in schema.items() if key != "$schema"}
    faults = Validator(schema, format_checker=string_formats.CHECKER, registry=Registry()).iter_errors(value)
    ordered = sorted(faults, key=lambda error: [str(part) for part in error.absolute_path])
    return [f"{error.json_path}: {_short(error.message)}" for error in ordered]


def parse(text: str, schema: Schema) -> JsonAnswer:
    """The value in a model's text, if that is one JSON value without repeated keys that satisfies the schema."""
    try:
        value = _loads(text)
    except RecursionError:
        return JsonAnswer(None, "the JSON is nested too deeply", text)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated") or error.pos >= len(text.rstrip()):
            return JsonAnswer(None, "the JSON breaks off before its end; raise --max_new_tokens", text)
        return JsonAnswer(None, f"not JSON: {error.msg} at character {error.pos}", text)
    except ValueError as error:
        return JsonAnswer(None, f"not usable JSON: {_short(str(error))}", text)
    try:
        faults = errors(value, schema)
    except RecursionError:
        return JsonAnswer(None, "the JSON is nested too deeply", text)
    if not faults:
        return JsonAnswer(value, None, text)
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return JsonAnswer(None, f"the JSON does not satisfy the schema: {faults[0]}{more}", text)


def compile_grammar(schema: dict[str, Any], tokens: LLTokenizer, spaced: bool = False) -> LLMatcher:
    """A matcher at the start of a document of `Preflight.grammar_schema`; ask its `is_error()`.

    Args:
        spaced: with a space after each comma and colon; else there is no white space.
    """
    options = {
        "whitespace_flexible": False,
        "item_separator": ", " if spaced else ",",
        "key_separator": ": " if spaced else ":",
        "lenient": False,
        "coerce_one_of": False,
        # No \u: it would let a property hide behind another spelling of its name.
        "json_allowed_escapes": 'nrbtf\\"',
    }
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
    return LLMatcher(tokens, grammar, log_level=0, limits=LIMITS)


@functools.cache
def byte_tokenizer() -> LLTokenizer:
    """Every byte is a token, and 256 is the end of text: compiles in no time and gives masks of bytes."""
    return LLTokenizer(TokenizerWrapper(_Bytes()))


class _Bytes:
    eos_token_id, bos_token_id = 256, None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<eos>")
    special_token_ids = (256,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def schemas_of(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schemas in a schema that a value may have to satisfy, itself first, each once."""
    return (node.schema for node in nodes(schema))


def longest_opening(schema: dict[str, Any]) -> int:
    """About how many characters it takes to complete any part of a document that has just been begun, at most."""
    schemas = nodes(schema)
    sizes = smallest(schemas)
    # The document itself is begun only once.
    if not any(target is schema for node in schemas for target in node.targets):
        del sizes[id(schema)]
    return 8 + 2 * int(max((size for size in sizes.values() if size < math.inf), default=0))


def _check_size(schema: Any) -> None:
    depth, level = 0, [schema]
    while level := [
        part
        for value in level
        for part in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
    ]:
        depth += 1
        if depth > MAX_DEPTH:
            raise UserError(f"the schema is nested deeper than {MAX_DEPTH} levels; move parts of it under $defs")
        if any(isinstance(value, dict) and len(value) > MAX_PROPERTIES for value in level):
            raise UserError(f"the schema has an object of more than {MAX_PROPERTIES:,} entries; split it")
    if len(json.dumps(schema)) > MAX_BYTES:
        raise UserError(f"the schema is larger than {MAX_BYTES // 1024} KiB; leave out what the documents do not need")


def _classify(root: dict[str, Any], everything: list) -> list[Keyword]:
    """The keywords of the schema `root`, which becomes the one for the grammar on the way."""
    keywords: list[Keyword] = []
    decoded = nodes(root)
    inside = {id(node.schema) for node in decoded}
    for node in decoded:
        schema = node.schema
        classes = {key: _classify_keyword(schema, key) for key in schema}
        keywords += [Keyword(f"{node.path}/{key}", *verdict[:2]) for key, verdict in classes.items() if verdict]
        left_out = [key for key, verdict in classes.items() if (verdict and not verdict[2]) or key in IGNORED]
        _write_without(schema, dict(schema), left_out)
    for node in everything:  # under what is only checked, the validator must know all
        if id(node.schema) not in inside:
            for key in node.schema:
                verdict = _classify_keyword(node.schema, key)
                if verdict and verdict[0] == "unsupported":
                    keywords.append(Keyword(f"{node.path}/{key}", *verdict[:2]))
    return keywords


def _classify_keyword(schema: dict[str, Any], key: str) -> tuple[Treatment, str, bool] | None:
    """(treatment, reason, whether it stays in the grammar's schema); None for what says nothing about the value."""
    value = schema[key]
    if key in UNSUPPORTED and value not in ((False,) if key == "nullable" else ({}, True)):
        return "unsupported", UNSUPPORTED[key], False
    if key == "format":
        if "string" not in types(schema):
            return "enforced", "", False  # nothing to enforce: it would say something about strings
        if value in FORMATS:
            return "enforced", "", True
        if value in string_formats.CHECKER.checkers:
            return "checked", "", False
        return "unsupported", f"nothing here knows the format '{value}'; give a pattern instead", False
    if key in CHECKED:
        idle = value is False if key == "uniqueItems" else {"then": "if", "else": "if"}.get(key, key) not in schema
        return ("enforced", "", False) if idle else ("checked", "", False)
    if key not in ENFORCED:
        return None
    if key == "additionalProperties" and value in (True, {}):
        return "enforced", "", False  # as if it were not there
    patterns = [value] if key == "pattern" else ()
    if key in ("patternProperties", "additionalProperties"):  # the patterns say what is additional
        patterns = schema.get("patternProperties", ())
    if not all(_SAME_MEANING.fullmatch(pattern) for pattern in patterns):
        return "checked", "validators and grammars read this pattern differently", False
    if key == "multipleOf" and value != int(value):
        return "checked", "floating-point numbers are seldom exact multiples", True
    closed = "patternProperties" not in schema and schema.get("additionalProperties") is False
    if key == "minProperties" and value > 1 and not closed:
        return "checked", "names may repeat", True
    return "enforced", "", True


def _leave_out_what_fails(root: dict[str, Any], keywords: list[Keyword]) -> list[Keyword]:
    """Take out of the grammar's schema those of the fragile keywords that the engine refuses, and class them anew."""
    if not _failure(root):
        return keywords
    fragile = [(node, dict(node.schema), [key for key in FRAGILE if key in node.schema]) for node in nodes(root)]
    for node, original, dropped in fragile:
        _write_without(node.schema, original, dropped)
    if failure := _failure(root):
        raise UserError(failure)
    if sum(len(dropped) for _, _, dropped in fragile) <= MAX_TRIALS:
        for node, original, dropped in fragile:
            for key in tuple(dropped):
                dropped.remove(key)
                _write_without(node.schema, original, dropped)
                if _failure(root):
                    dropped.append(key)
                    _write_without(node.schema, original, dropped)
    paths = {f"{node.path}/{key}" for node, original, _ in fragile for key in original.keys() - node.schema.keys()}
    return [
        replace(keyword, treatment="checked", reason="the grammar engine cannot decide it")
        if keyword.path in paths
        else keyword
        for keyword in keywords
    ]


def _tighten(root: dict[str, Any]) -> None:
    """Put formats as strictly as they are checked, and bound numbers, which also rules exponents out."""
    for node in nodes(root):
        if name := node.schema.pop("format", None):
            node.schema["allOf"] = [*node.schema.get("allOf", []), dict(FORMATS[name])]
    if failure := _failure(root):
        raise UserError(failure)
    bounded = []
    for node in nodes(root):
        schema, kinds = node.schema, node.schema.get("type", ())
        if "number" not in types(schema) or not kinds or {"const", "enum"} & schema.keys():
            continue
        bound = 10**15 if kinds == "number" or "number" in kinds else 10**18
        for key, other, value in (("minimum", "exclusiveMinimum", -bound), ("maximum", "exclusiveMaximum", bound)):
            if key not in schema and other not in schema:
                schema[key] = value
                bounded.append((schema, key))
    try:
        failure = _failure(root)
    except UserError:  # the schema asks for larger numbers
        failure = "out of bounds"
    if failure:
        for schema, key in bounded:
            del schema[key]


def _write_without(schema: dict[str, Any], original: dict[str, Any], left_out: list[str]) -> None:
    """Make `schema` the original without some keywords, so that it lets through no less."""
    kept = {}
    for key, value in original.items():  # their order is the order of the properties
        if key == "additionalProperties" and "patternProperties" in left_out:
            continue  # it would now forbid what the patterns allow
        if key not in left_out:
            kept[key] = value
        elif key == "oneOf" and "anyOf" not in original:
            kept["anyOf"] = value
    schema.clear()
    schema.update(kept)


def _failure(schema: dict[str, Any]) -> str | None:
    """What keeps the engine from compiling a schema, as a sentence. Raises UserError where nothing satisfies it."""
    try:
        matcher = compile_grammar(schema, byte_tokenizer())
    except ValueError as error:  # a number beyond all bounds
        return f"the grammar engine cannot compile the schema ({_short(str(error))}); simplify it"
    if not matcher.is_error():
        matcher.compute_bitmask()
    if not matcher.is_error():
        if matcher.is_stopped() and not matcher.is_accepting():
            raise UserError("nothing satisfies the schema; correct it")
        return None
    reason = _short(matcher.get_error().splitlines()[0])
    if reason.startswith("Unsatisfiable schema: "):
        raise UserError(f"nothing satisfies the schema: {reason.removeprefix('Unsatisfiable schema: ')}; correct it")
    return f"the grammar engine cannot compile the schema ({reason}); simplify it"


def _multiple_of(validator, divisor: float, instance: Any, schema: Schema) -> Iterator[ValidationError]:
    """As written: 19.99 is a multiple of 0.01, though not in binary floating point."""
    if validator.is_type(instance, "number") and Fraction(repr(instance)) % Fraction(repr(divisor)):
        yield ValidationError(f"{instance!r} is not a multiple of {divisor}")


Validator = extend(Draft202012Validator, {"multipleOf": _multiple_of})


def _loads(text: str) -> Any:
    """JSON without repeated names and without numbers that are not finite. Raises ValueError, RecursionError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if (name := repeated_name(pairs)) is not None:
            raise ValueError(f"the name '{name}' is given twice")
        return dict(pairs)

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is not a finite number")
        return value

    return json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)


def _short(message: str, length: int = 200) -> str:
    message = " ".join(message.split())
    return message if len(message) <= length else f"{message[: length - 3]}..."
