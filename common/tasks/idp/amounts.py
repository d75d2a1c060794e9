"""Numbers as documents write them: "1.234,56 €", "RM31.00", "(12.00)", "12.00-", "29 995,00", "21 %"."""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal

from common.tasks.idp import dates, languages
from common.tasks.idp.dates import plain_digits

_SPACE = "[ \u00a0\u2009\u202f]"
_CORE = rf"(?:\d+(?:[.,'’]\d+|{_SPACE}\d{{3}}(?!\d))*|[.,]\d+)"
_SPACELESS = r"(?:\d+(?:[.,'’]\d+)*|[.,]\d+)"
_MINUS = r"\-–"


@dataclass(frozen=True)
class FoundAmount:
    """A number in a text.

    Attributes:
        start, end: its characters, with sign and currency.
        bare: those of the number without its currency, but with what makes it negative.
        readings: one, or where "1.234" could be either that with a decimal mark and that with thousands.
        mark: the decimal mark that it shows, where it has one.
        grouping: the mark before the three digits of which it is not sure, else None.
    """

    start: int
    end: int
    bare: tuple[int, int]
    readings: tuple[Decimal, ...]
    mark: str | None = None
    grouping: str | None = None


@functools.cache
def _forms() -> tuple[re.Pattern, re.Pattern]:
    """Amounts with and without white space between their digits."""
    signs = "".join(chr(code) for code in range(sys.maxunicode) if unicodedata.category(chr(code)) == "Sc")
    money = rf"(?:[^\W\d_]{{1,4}}\.?)?[{signs}]|[^\W\d_]{{1,4}}\.?"
    return tuple(
        re.compile(
            rf"(?:(?<!\w)|(?<=(?<!\w)[xX]))(?<![{_MINUS}])(?<!\d[.,:/*x])(?P<open>\(\s*)?(?P<before>[{_MINUS}+]\s?)?"
            rf"(?:(?P<money>{money})\s?)?(?P<open2>\(\s*)?(?P<inner>[{_MINUS}+]\s?)?"
            rf"(?P<core>{core})(?P<dashes>[.,][{_MINUS}—]{{1,2}})?(?P<after>\s?[{_MINUS}](?![\w(]))?"
            rf"(?:\s?(?P<unit>%|{money})(?!\w))?(?P<last>[{_MINUS}](?![\w(]))?(?P<close>\s*\))?(?:(?=[xX](?!\w))|(?![\w/{_MINUS}]|[.,:'’]\d))"
        )
        for core in (_CORE, _SPACELESS)
    )


def find(text: str, spaces: bool = True) -> list[FoundAmount]:
    """The numbers in a text, in order; those within words, dates, times and codes such as "INV-12" are none.

    Args:
        spaces: white space may group thousands.
    """
    plain = plain_digits(dates.masked(text))
    form = _forms()[0 if spaces else 1]
    amounts, start = [], 0
    while match := form.search(plain, start):
        amount = _read(match)
        start = match.end() if amount else match.start() + 1
        if amount:
            amounts.append(amount)
    return amounts


def only(text: str) -> FoundAmount | None:
    """The one number that a text has, whatever words stand around it; None where there is none or are several."""
    amounts = find(text)
    return amounts[0] if len({amount.readings for amount in amounts}) == 1 else None


def whole(text: str) -> FoundAmount | None:
    """A text that is a number with its sign and currency, and nothing else."""
    text = text.strip()
    amounts = find(text)
    return amounts[0] if len(amounts) == 1 and (amounts[0].start, amounts[0].end) == (0, len(text)) else None


def _read(match: re.Match) -> FoundAmount | None:
    """A match as a number, without the words beside it that are no currency; None where such a word is glued to it."""
    parts = match.groupdict()
    start, end = match.span()
    lone = not match.string[:start].strip()
    if parts["money"] and not _is_money(parts["money"]):
        if match.end("money") == match.start("inner" if parts["inner"] else "core"):
            return None
        lone, start = False, match.start("inner" if parts["inner"] else "core")
    closed = bool(parts["close"])
    if parts["unit"] and not _is_money(parts["unit"]):
        if match.start("unit") == max(match.end(name) for name in ("core", "dashes", "after")):
            return None
        closed, end = False, match.start("unit") - 1
    core = _read_core(parts["core"])
    if core is None:
        return None
    readings, mark, grouping = core
    signs = [parts[name] or "" for name in ("before", "inner", "after", "last")]
    # A dash with space around it may well stand between a word and a number.
    minus = any(sign.strip(" +") and (lone or not sign.endswith(" ")) for sign in signs)
    bracketed = closed and (parts["open"] or parts["open2"])
    sign = -1 if minus or bracketed else 1
    bare = (start, end) if sign < 0 else match.span("core")
    return FoundAmount(start, end, bare, tuple(sign * reading for reading in readings), mark, grouping)


def _is_money(word: str) -> bool:
    """A percent sign, a code or a sign of a currency. One letter stands for too much else ("L12") to be one."""
    letters = languages.fold("".join(filter(str.isalpha, word)))
    if not letters:
        return word == "%" or any(unicodedata.category(character) == "Sc" for character in word)
    return letters in languages.currency_words()


def _read_core(core: str) -> tuple[tuple[Decimal, ...], str | None, str | None] | None:
    """(readings, decimal mark, mark that may group) of digits and marks between them; None where they are no number."""
    marks = re.findall(r"\D", core)
    groups = re.split(r"\D", core)
    kinds = list(dict.fromkeys("'" if mark not in ".," else mark for mark in marks))
    last = marks[-1] if marks else ""
    points = [mark for mark in marks if mark in ".,"]
    if len(kinds) > 2 or (len(set(points)) == 2 and points.count(points[-1]) > 1):
        return None
    if not points or (len(points) > 1 and len(set(points)) == 1):  # all of them group
        whole_groups, decimals, mark = groups, "", None
    elif last not in ".,":
        return None
    else:
        whole_groups, decimals, mark = groups[:-1], groups[-1], last
    if not _are_groups(whole_groups, indian="," in marks):
        return None
    digits = "".join(whole_groups) or "0"
    if mark is None:
        return (Decimal(digits),), None, None
    value = Decimal(f"{digits}.{decimals}")
    if len(decimals) == 3 and len(marks) == 1 and 1 <= len(whole_groups[0]) <= 3 and whole_groups[0][0] != "0":
        return (value, Decimal(digits + decimals)), None, mark
    return (value,), mark, None


def _are_groups(groups: list[str], indian: bool) -> bool:
    """Whether digits are grouped by threes, or as in 12,34,567."""
    first, *rest = groups
    if not rest:
        return True
    sizes = [len(group) for group in rest]
    threes = all(size == 3 for size in sizes)
    return 1 <= len(first) <= 3 and (threes or (indian and sizes[-1] == 3 and all(size == 2 for size in sizes[:-1])))


def usual_mark(text: str) -> str | None:
    """The decimal mark of most of the numbers in a text; None where none has one, or as many have the other."""
    marks = Counter(amount.mark for amount in find(text) if amount.mark)
    first, *others = marks.most_common() or [(None, 0)]
    return first[0] if not others or others[0][1] < first[1] else None
