"""Numbers as documents write them: "1.234,56 €", "RM31.00", "(12.00)", "12.00-", "29 995,00", "21 %", "1,2 Mio.", and
as text recognition has them: "RM 12. 50".

What a number may not be told from is none: "12.5O" and "O.50" have a letter that was taken for a digit, "1.2k" is more
than 1.2, "2 1/2" more than 2.
"""

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
_JOINT = "\0"  # see `_joined`
_CORE = rf"(?:\d+(?:{_JOINT}?[.,'’]\d+|{_SPACE}\d{{3}}(?!\d))*|[.,]\d+)"
_SPACELESS = r"(?:\d+(?:[.,'’]\d+)*|[.,]\d+)"
_MINUS = r"\-–"
_GAP = r"[^\S\n]?"  # within a line
_LINE_ENDS = r"(?=[^\S\n]*(?:\n|\)|\Z))"
_FRACTION = re.compile(rf"{_SPACE}(?:[¼-¾⅐-⅞]|\d/\d{{1,2}}(?![\w/]))")
_TAKEN_FOR_A_DIGIT = re.compile(r"(?:\d[^\W\d_]*|(?<!\w)[OoIl])[.,]\Z")
_SCALE = re.compile(rf"{_GAP}([^\W\d_]+)\.?")
_SPLIT = re.compile(
    r"(?<!\d)(?<!\d[.,:/-])(?P<whole>\d[\d,]*)\. "
    r"(?=(?P<decimals>\d\d)(?:[^\S\n]?(?P<unit>[^\W\d_]{1,4}|[^\w\s)]))?(?:[^\S\n]*(?:\n|\Z)|[^\S\n]{2}|\)))"
)
_WORD_BEFORE = re.compile(r"(?<![^\W\d_])([^\W\d_]{1,4}\.?|[^\w\s])[^\S\n]*\Z")
_CLOSE = re.compile(rf"{_GAP}[^\s()\d]{{0,4}}{_GAP}\)")
YEN = ("円", "元", "원")
LINE = 200  # characters that a line is looked back on
LIKE_DIGITS, MULTIPLES = "OoQDIlSsBZ", "KkMmBbTt"  # single letters that are no unit: of 12.5S, and of 1.2M
NO_UNITS = (  # of "3rd", "9am" and "1.2bn", and what a bank writes behind credits and debits
    "st", "nd", "rd", "th", "er", "re", "e", "o", "º", "ª", "eme", "ste", "de", "am", "pm", "bn", "mn", "md", "tn",
    "cr", "dr",
)  # fmt: skip


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
            rf"(?:(?<!\w)|(?<=(?<!\w)[xX]))(?<![{_MINUS}])(?<![^\W\d_]\+)(?<!\d[.,:/*x])"
            rf"(?P<open>\(\s*)?(?P<before>[{_MINUS}+]{_GAP})?(?:(?P<money>{money}){_GAP})?"
            rf"(?P<open2>\(\s*)?(?P<inner>[{_MINUS}+]{_GAP})?(?P<core>{core})"
            rf"(?P<dashes>[.,:][{_MINUS}—]{{1,2}})?(?P<after>[{_MINUS}](?![\w(])|[^\S\n][{_MINUS}]{_LINE_ENDS})?"
            rf"(?:{_GAP}(?P<unit>%|{money})(?!\w))?(?P<last>[{_MINUS}](?![\w(]))?(?P<close>\s*\))?"
            rf"(?![\w{_MINUS}]|/(?![^\W\d_]{{2}})|[.,:'’]\d)"
        )
        for core in (_CORE, _SPACELESS)
    )


def find(text: str, spaces: bool = True) -> list[FoundAmount]:
    """The numbers in a text, in order; those within words, dates, times and codes such as "INV-12" are none.

    Args:
        spaces: white space may group thousands.
    """
    plain = plain_digits(dates.masked(text))
    if spaces:
        plain = _joined(plain)
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
    if len({amount.readings for amount in amounts}) != 1 or _FRACTION.match(text, amounts[-1].end):
        return None
    return amounts[0]


def whole(text: str) -> FoundAmount | None:
    """A text that is a number with its sign and currency, and nothing else."""
    text = text.strip()
    amounts = find(text)
    return amounts[0] if len(amounts) == 1 and (amounts[0].start, amounts[0].end) == (0, len(text)) else None


def _joined(text: str) -> str:
    """A text of the same length without the white space that text recognition puts behind a decimal point: "12. 50".

    That is the end of one sentence and the beginning of the next in "see page 12. 50 items", and an item of a list in
    "1. 50 nails". So such a number has to end its line or cell, and to begin a cell that is not its line's first, or to
    stand behind a currency, or to be all that there is.
    """

    def joined(match: re.Match) -> str:
        unit, start = match["unit"], match.start()
        lone = (start, match.end("unit" if unit else "decimals")) == everything
        alone = lone or _is_cell(text, start) or _is_behind_money(text, start)
        return f"{match['whole']}{_JOINT}." if alone and (unit is None or _is_currency(unit)) else match[0]

    everything = len(text) - len(text.lstrip()), len(text.rstrip())
    return _SPLIT.sub(joined, text)


def _is_behind_money(text: str, start: int) -> bool:
    """Whether a currency stands before a place; "all" and "try" are codes of some, but not where they are words."""
    word = _WORD_BEFORE.search(text[max(0, start - LINE) : start].rpartition("\n")[2])
    return word is not None and not word[1].islower() and _is_currency(word[1])


def _is_currency(word: str) -> bool:
    return word != "%" and _is_money(word)


def _read(match: re.Match) -> FoundAmount | None:
    """A match as a number, without the words beside it that are no currency; None where it may well be another."""
    parts, text = match.groupdict(), match.string
    start, end = match.span()
    lone = not text[:start].strip() or _is_cell(text, start)
    if _TAKEN_FOR_A_DIGIT.search(text, max(0, start - 4), start):
        return None
    if parts["money"] and not _is_money(parts["money"]):
        first = next(name for name in ("open2", "inner", "core") if parts[name])
        if match.end("money") == match.start(first):
            return None
        lone, start = False, match.start(first)
    closed = bool(parts["close"])
    number_end = max(match.end(name) for name in ("core", "dashes", "after"))
    if parts["unit"] and not _is_money(parts["unit"]):
        if match.start("unit") == number_end and not _is_unit(parts["unit"], parts["core"]):
            return None
        closed, end, parts["last"] = False, number_end, None
    core = _read_core(parts["core"], bool(parts["dashes"]))
    if core is None:
        return None
    readings, mark, grouping = core
    bare = match.span("core")
    if scale := _scale(text, number_end):
        if len(scale[0]) != 1:  # a billion has nine zeros or twelve
            return None
        (power,), end = scale
        readings, bare = tuple(reading.scaleb(power) for reading in readings), (bare[0], end)
        if close := _CLOSE.match(text, end):
            closed, end = True, close.end()
    signs = [parts[name] or "" for name in ("before", "inner", "after", "last")]
    # A dash with space around it may well stand between a word and a number.
    minus = any(sign.strip(" +") and (lone or not sign[-1].isspace()) for sign in signs)
    counts = parts["unit"] == "%" or parts["core"].isdecimal()  # behind a word, "(6%)" and "(2)" are no debts
    bracketed = closed and (parts["open"] or parts["open2"]) and (lone or not counts)
    sign = -1 if minus or bracketed else 1
    return FoundAmount(
        start, end, (start, end) if sign < 0 else bare, tuple(sign * reading for reading in readings), mark, grouping
    )


def _is_cell(text: str, start: int) -> bool:
    """Whether white space that is wide separates what begins there from the text before it on its line."""
    line = text[max(0, start - LINE) : start].rpartition("\n")[2]
    return line[-2:].isspace() and len(line[-2:]) == 2 and not line.isspace()


def _is_unit(word: str, number: str) -> bool:
    """Whether letters that are glued to a number leave it what it is: those of "5kg", "2x" or "12.50SR" do."""
    if not word.rstrip(".").isalpha() or languages.fold(word) in NO_UNITS:
        return False
    if len(word) > 1:
        return True
    return word not in MULTIPLES and (word not in LIKE_DIGITS or re.search(r"[.,]\d\d\Z", number) is not None)


def _scale(text: str, start: int) -> tuple[frozenset[int], int] | None:
    """(the powers of ten that the word there may stand for, its end): "million", "Mrd.", "lakh", "万"."""
    if not (word := _SCALE.match(text, start)):
        return None
    scales = languages.scales()
    if powers := scales.get(languages.fold(word[1])):
        return powers, word.end()
    if powers := scales.get(word[1][0]):  # 万円 is money, 万人 are people
        return powers if word[1][1:] in YEN else frozenset(), word.start(1) + 1
    return None


def _is_money(word: str) -> bool:
    """A percent sign, a code or a sign of a currency. One letter stands for too much else ("L12") to be one."""
    letters = languages.fold("".join(filter(str.isalpha, word)))
    if not letters:
        return word == "%" or any(unicodedata.category(character) == "Sc" for character in word)
    return letters in languages.currency_words()


def _read_core(core: str, dashes: bool) -> tuple[tuple[Decimal, ...], str | None, str | None] | None:
    """(readings, decimal mark, mark that may group) of digits and marks between them; None where they are no number.

    Args:
        dashes: they stand for the decimals, as in "1.200,-".
    """
    core = core.replace(_JOINT, "")
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
        grouped = Decimal(digits + decimals)
        return ((grouped,), None, None) if dashes else ((value, grouped), None, mark)
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
