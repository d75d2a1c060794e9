"""Dates and times as documents write them: found in a text, and read without guessing.

A date has a day, a month and a year; what lacks one of them, or names a day that no calendar has, is none. Where day
and month could change places (09/01/2019), a date has both readings until something decides between them, and one with
the year first where that could have lost its century (18-01-05).
"""

from __future__ import annotations

import datetime
import functools
import re
import unicodedata
from dataclasses import dataclass

from common.tasks.idp import languages

YEARS = range(1900, 2200)
AFTERNOON = ("下午", "午後", "오후")
SHARED = ("CST", "CDT", "IST", "BST", "AST", "ADT", "MST")  # names that several zones have
OFFSETS = {  # of those that one has
    "EST": "-05:00", "EDT": "-04:00", "MDT": "-06:00", "PST": "-08:00", "PDT": "-07:00", "WET": "Z", "CET": "+01:00",
    "CEST": "+02:00", "EET": "+02:00", "EEST": "+03:00", "MYT": "+08:00", "SGT": "+08:00", "HKT": "+08:00",
    "JST": "+09:00", "KST": "+09:00", "AEST": "+10:00", "AEDT": "+11:00", "NZST": "+12:00", "NZDT": "+13:00",
}  # fmt: skip
TURN = 69  # two digits of a year from here on are of 19xx, as POSIX has it

_WORD = r"[^\s\d.,;:/()\[\]'\"-]+"
_FILLER = r"(?:(?!\d)[^\s\d]{1,4}\s+|[Dd]['’])?"  # "de", "of", "gada"
_GAP = r"(?:[\s.,/-]|(?<=\d)(?:st|nd|rd|th|er|re|e|º|ª)\b|'){0,4}?"
# Behind the name of a month: "05 Jan 12.99" and "Jan 12 14:30" go on with an amount and a time, not with a year. In
# "05 Jan 2024,45.00" the next cell of a CSV row begins: an amount has no such comma.
_YEAR = (
    r"(?P<y>\d{4}(?!\d|\.\d\d(?![\d:h])|,\d\d(?![\d:h]|[.,]\d))"
    r"|(?<=[^\W\d_]-)\d\d(?=,)"  # "05-Jan-24,45"
    r"|'?\d\d(?!\d|[.:]\d|,\d+(?![.,:]?\d)|,\d{3}(?!\d)))"
)
_YEAR_FILLER = r"(?:(?!\d)[^\s\d]{1,4}\s+(?=\d{4})|[Dd][Ee][Ll]?\s+|[Dd]['’])?"  # others stand before prices, too
_NAMED = [
    rf"(?P<d>\d{{1,2}}){_GAP}{_FILLER}(?P<name>{_WORD})\.?{_GAP}{_YEAR_FILLER}{_YEAR}",
    # "Jan 12,50" has an amount, "JAN 05,24" a year
    rf"(?P<name>{_WORD})\.?[\s-]{{0,3}}(?P<d>0\d|\d{{1,2}}(?!,\d\d(?!\d)))(?:st|nd|rd|th|\.)?[\s,/-]{{1,3}}{_YEAR}",
    rf"(?P<y>\d{{4}})[.\s,/-]{{1,3}}{_FILLER}(?P<name>{_WORD})\.?[\s-]{{1,3}}(?P<d>\d{{1,2}})(?!\d)",
    rf"(?P<y>\d{{4}})[.\s,]{{1,3}}{_FILLER}(?P<d>\d{{1,2}})\.?\s+(?P<name>{_WORD})",
]
_NUMBERED = [
    r"(?P<y>\d{4})-?W(?P<week>\d\d)-?(?P<weekday>[1-7])(?![\d-])",  # of ISO 8601
    r"(?P<y>\d{4})\s*[年년]\s*(?P<m>\d{1,2})\s*[月월]\s*(?P<d>\d{1,2})(?:\s*[日일])?(?!\d)",
    r"(?P<y>\d{4})\s?(?P<s>[-/.])\s?(?P<m>\d{1,2})\s?(?P=s)\s?(?P<d>\d{1,2})(?!\d|[-/]\d)",
    r"(?P<a>\d{1,2})\s?(?P<s>[-/.])\s?(?P<b>\d{1,2})\s?(?P=s)\s?(?P<y>\d{4}|\d{2})(?!\d|[-/]\d|\.\d)",
]
_IN_TEXT = [re.compile(rf"(?<!\w)(?<!\d[-/.,]){form}") for form in [*_NAMED, *_NUMBERED]]
_ALONE = [
    re.compile(form)
    for form in (
        r"(?P<y>\d{4}) (?P<m>\d{1,2}) (?P<d>\d{1,2})",
        r"(?P<a>\d{1,2}) (?P<b>\d{1,2}) (?P<y>\d{4})",
        r"(?P<y>(?:19|20)\d\d)(?P<m>\d\d)(?P<d>\d\d)",
        r"(?P<a>\d\d)(?P<b>\d\d)(?P<y>(?:19|20)\d\d)",
    )
]
_ZONE = (
    r"(?:UTC|GMT)\s?[+-](?:1[0-4]|0?\d)(?::?[0-5]\d)?|(?:Z|UTC|GMT)(?![\w+])|\+(?:0\d|1[0-4])(?::?[0-5]\d)?(?!\d)"
    r"|-(?:0\d|1[0-4])(?(sec):?|(?(iso):?))[0-5]\d"  # "09:00-10:30" is from one time to another
)
_NAMED_ZONE = re.compile(rf"\s?(?P<name>{'|'.join((*OFFSETS, *SHARED))})(?!\w)")
_TIME = re.compile(
    r"(?:(?<![\w.,:/+-])|(?<=[:.h]\d\d-)|(?<=[ap]m-)|(?P<iso>(?<=(?<![^\W\d_])T)(?=\d\d:)))"  # "9:00-10:30", "9am-5pm"
    r"(?P<before>(?:上午|午前|오전|下午|午後|오후)\s?)?(?P<h>\d{1,2})(?:(?P<s>[:.h])(?P<m>\d\d)(?:(?P=s)(?P<sec>\d\d)(?:\.\d+)?)?)?"
    rf"\s*(?P<half>[ap]\.?\s?m\b\.?)?\s*(?P<zone>{_ZONE})?(?![\w:/]|-(?!\d\d?(?:[:.h]\d\d|[ap]m)))",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class FoundDate:
    """A date in a text.

    Attributes:
        start, end: its characters.
        readings: one, or where day and month could change places that with the day first and that with the month.
        numeric: without the name of a month.
        first: "day" or "month" where the numbers alone show which of them is first.
        year_first: what it is where its year has two digits and stands first, as ISO 8601 once had it; None: cannot be.
        year_last: its last number can only be the year.
    """

    start: int
    end: int
    readings: tuple[datetime.date, ...]
    numeric: bool
    first: str | None = None
    year_first: datetime.date | None = None
    year_last: bool = False

    @property
    def meanings(self) -> set[datetime.date]:
        """All that it may be."""
        return {*self.readings, *([self.year_first] if self.year_first else [])}


def plain_digits(text: str) -> str:
    """A text of the same length whose digits, signs and letters of other widths and scripts are ASCII's."""
    return text if text.isascii() else "".join(map(_plain, text))


def _plain(character: str) -> str:
    if character < "\x80":
        return character
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if "\uff01" <= character <= "\uff5e":  # of full width
        return chr(ord(character) - 0xFEE0)
    return {"\u2212": "-", "\u2010": "-", "\u2011": "-", "٫": ".", "٬": "'", "\u3000": " "}.get(character, character)


def find(text: str, language: str | None = None) -> list[FoundDate]:
    """The dates in a text, in order; words of other lengths are none, nor is what stands within a longer number.

    Args:
        language: of the text, for names that are of two months in two languages.
    """
    text = plain_digits(text)
    candidates: list[tuple[bool, FoundDate]] = []
    for form in _IN_TEXT:
        start = 0
        while match := form.search(text, start):
            date = _read(match, language)
            start = match.end() if date else match.start() + 1
            if date:
                candidates.append((len(match["y"]) < 4, date))
    dates: list[FoundDate] = []
    taken = bytearray(len(text))
    # In "12 Jan 31, 2022" the year is the one with four digits.
    for _, date in sorted(candidates, key=lambda candidate: (candidate[0], candidate[1].start)):
        if not any(taken[date.start : date.end]):
            taken[date.start : date.end] = b"\1" * (date.end - date.start)
            dates.append(date)
    return sorted(dates, key=lambda date: date.start)


def unmarked(text: str) -> list[tuple[int, int]]:
    """Where eight digits in a text could be a date, "20180402". Many a number is none, so `find` leaves them out."""
    return [match.span() for match in re.finditer(r"(?<![\w.,/-])\d{8}(?![\w/-]|[.,]\d)", text) if only(match[0])]


def whole(text: str) -> FoundDate | None:
    """A text that is a date and nothing else."""
    text = text.strip()
    date = only(text)
    return date if date and (date.start, date.end) == (0, len(text.rstrip("."))) else None


def only(text: str, language: str | None = None) -> FoundDate | None:
    """The one date that a text has, whatever words stand around it; None where there is none or are several."""
    whole = plain_digits(text).strip()
    for form in _ALONE:
        if (match := form.fullmatch(whole)) and (date := _read(match, language)):
            return date
    dates = find(text, language)
    return dates[0] if len({date.readings for date in dates}) == 1 else None


def _read(match: re.Match, language: str | None) -> FoundDate | None:
    """A match of one of the forms as a date; None where it has no day that there is, or a name of no or two months."""
    parts = match.groupdict()
    digits = parts["y"].lstrip("'")
    year = _year(digits)
    first = year_first = None
    if "a" in parts:
        a, b = int(parts["a"]), int(parts["b"])
        readings = [_date(year, b, a), _date(year, a, b)]
        if (readings[0] is None) != (readings[1] is None):
            first = "day" if readings[0] else "month"
        if parts.get("s") == "-" and len(parts["a"]) == len(parts["b"]) == len(digits) == 2:
            year_first = _date(_year(parts["a"]), b, int(digits))
    elif name := parts.get("name"):
        readings = [_date(year, month, int(parts["d"])) for month in languages.months(name, language)]
        if len(readings) != 1:
            return None
    elif "week" in parts:
        readings = [_date_of_week(year, int(parts["week"]), int(parts["weekday"]))]
    else:
        readings = [_date(year, int(parts["m"]), int(parts["d"]))]
    real = tuple(dict.fromkeys(reading for reading in readings if reading))
    if not real:
        return None
    if year_first in real:
        year_first = None
    return FoundDate(*match.span(), real, "name" not in parts, first, year_first, "a" in parts and not year_first)


def _year(digits: str) -> int:
    """Two digits are of the years around 2000."""
    return int(digits) + (0 if len(digits) > 2 else 1900 if int(digits) >= TURN else 2000)


def _date(year: int, month: int, day: int) -> datetime.date | None:
    try:
        return datetime.date(year, month, day) if year in YEARS else None
    except ValueError:
        return None


def _date_of_week(year: int, week: int, weekday: int) -> datetime.date | None:
    try:
        return datetime.date.fromisocalendar(year, week, weekday) if year in YEARS else None
    except ValueError:
        return None


@dataclass(frozen=True)
class FoundTime:
    """A time of the day.

    Attributes:
        start, end: its characters.
        clock: HH:MM:SS.
        offset: from UTC as "Z" or "+08:00", where one is given.
        zone: the name of its zone, where that is one of `SHARED`.
    """

    start: int
    end: int
    clock: str
    offset: str | None
    zone: str | None = None


def find_times(text: str) -> list[FoundTime]:
    """The times in a text, in order, such as "14:30", "2.30 pm", "14h30" or "9 am"."""
    return [time for match in _TIME.finditer(plain_digits(text)) if (time := _time(match))]


def only_time(text: str) -> FoundTime | None:
    """The one time that a text without dates has; None where there is none or are several."""
    times = find_times(text)
    return times[0] if len({(time.clock, time.offset) for time in times}) == 1 else None


def _time(match: re.Match) -> FoundTime | None:
    parts = match.groupdict()
    before = (parts["before"] or "").strip()
    if parts["m"] is None and parts["half"] is None and not before:
        return None
    hour, half = int(parts["h"]), (parts["half"] or "").lower()[:1] or (before and "ap"[before in AFTERNOON])
    if half and hour <= 12:
        if hour == 0 and not before:
            return None
        hour = hour % 12 + (12 if half == "p" else 0)
    elif parts["half"]:
        return None
    try:
        clock = datetime.time(hour, int(parts["m"] or 0), int(parts["sec"] or 0)).isoformat()
    except ValueError:
        return None
    if parts["zone"]:
        return FoundTime(*match.span(), clock, _offset(parts["zone"]))
    if named := _NAMED_ZONE.match(match.string, match.end()):
        offset = OFFSETS.get(named["name"])
        return FoundTime(match.start(), named.end(), clock, offset, None if offset else named["name"])
    return FoundTime(*match.span(), clock, None)


def _offset(zone: str) -> str:
    """ "GMT+8", "UTC", "+0800" and the like as RFC 3339 has it."""
    digits = "".join(filter(str.isdigit, zone))
    if not digits:
        return "Z"
    hours, minutes = (digits[:-2], digits[-2:]) if len(digits) > 2 else (digits, "00")
    return f"{'-' if '-' in zone else '+'}{hours:0>2}:{minutes}"


@functools.lru_cache(maxsize=16)  # of a document's fields each asks for the same text
def masked(text: str) -> str:
    """A text of the same length with line ends in place of its dates, so that their numbers are no others."""
    parts, start = [], 0
    for date in find(text):
        parts += [text[start : date.start], "\n" * (date.end - date.start)]
        start = date.end
    return "".join([*parts, text[start:]])
