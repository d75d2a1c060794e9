"""The formats of strings that JSON Schema names, for the validator: those of the package jsonschema, and IRIs.

jsonschema tells IRIs by rfc3987-syntax, which compiles its grammar whenever jsonschema is imported: more than a second
before any script can say a word. An IRI is told here by the URI that it stands for.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

from jsonschema import Draft202012Validator, FormatChecker
from rfc3986_validator import validate_rfc3986

_PLANES = "".join(f"{chr(plane << 16)}-{chr((plane << 16) + 0xFFFD)}" for plane in range(1, 14))
_UCSCHAR = re.compile(f"[\u00a0-\ud7ff\uf900-\ufdcf\ufdf0-\uffef{_PLANES}\U000e1000-\U000efffd]+")
_IPRIVATE = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd]+")

CHECKER = FormatChecker(())
CHECKER.checkers = dict(Draft202012Validator.FORMAT_CHECKER.checkers)


def as_uri(iri: str) -> str:
    """The URI that an IRI is mapped to (RFC 3987, section 3.1): letters of other scripts as the bytes of their UTF-8.

    What may not stand in an IRI is left as it is, so that no URI comes of it; private characters may in its query.
    """
    head, number_sign, fragment = iri.partition("#")
    path, question_mark, query = head.partition("?")
    uri = path + question_mark + _IPRIVATE.sub(_quoted, query) + number_sign + fragment
    return _UCSCHAR.sub(_quoted, uri)


def _quoted(characters: re.Match[str]) -> str:
    return quote(characters.group())


@CHECKER.checks("iri")
def is_iri(value: Any) -> bool:
    """Whether a value is an IRI, or no string."""
    return not isinstance(value, str) or validate_rfc3986(as_uri(value)) is not None


@CHECKER.checks("iri-reference")
def is_iri_reference(value: Any) -> bool:
    """Whether a value is an IRI, a reference relative to one, or no string."""
    return not isinstance(value, str) or validate_rfc3986(as_uri(value), rule="URI_reference") is not None
