"""A short string that a regular expression may well match, found from how CPython parses it.

The parser of `re` is no public interface of Python, which has none; it is used here alone. Where it is another one some
day, the tests of this module say so.
"""

from __future__ import annotations

import re._constants as regex
import re._parser as regex_parser
from typing import Any


def example(pattern: str, longest: int) -> str:
    """A short string that may well match a regular expression as Python's `re` reads it.

    Args:
        longest: characters after which a repetition is not written out.
    """
    return _example(regex_parser.parse(pattern), longest)


def _example(pattern: regex_parser.SubPattern, longest: int) -> str:
    text = ""
    for operation, argument in pattern:
        if operation is regex.LITERAL:
            text += chr(argument)
        elif operation is regex.IN:
            text += _member(*argument[0])
        elif operation is regex.SUBPATTERN:
            text += _example(argument[-1], longest)
        elif operation is regex.BRANCH:
            text += min((_example(branch, longest) for branch in argument[1]), key=len)
        elif operation in (regex.MAX_REPEAT, regex.MIN_REPEAT):
            part = _example(argument[2], longest)
            text += part * min(argument[0], longest // max(1, len(part)) + 1)
        elif operation in (regex.ANY, regex.NOT_LITERAL):
            text += "a"
    return text


def _member(kind: int, argument: Any) -> str:
    """A character of a class, by its first part."""
    if kind is regex.LITERAL:
        return chr(argument)
    if kind is regex.RANGE:
        return chr(argument[0])
    return "0" if argument is regex.CATEGORY_DIGIT else "a"
