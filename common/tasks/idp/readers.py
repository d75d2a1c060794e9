"""What characters mean as a date, a time or a number, given how their document writes these."""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from common.tasks.idp import amounts, dates, languages

OFFSET = r"Z|[+-](?:[01]\d|2[0-3]):[0-5]\d"


@dataclass(frozen=True)
class ReadingSettings:
    """What is known of the documents before they are read.

    Attributes:
        dates: "day", "month" or "year", whichever comes first in a date of numbers; None: as each document shows it. A
            year of four digits needs no telling.
        utc_offset: of a time that is written without one, "Z" or as "+08:00".
    """

    dates: str | None = None
    utc_offset: str = "Z"


AS_SHOWN = ReadingSettings()


@dataclass(frozen=True)
class Reading:
    """What some characters mean.

    Attributes:
        value: of JSON; None where they cannot be read.
        note: what is not sure about it, or why it cannot be read.
    """

    value: Any
    note: str | None = None


class Conventions:
    """How one document writes dates and numbers; found out when first asked.

    Args:
        document: its text, all of it.
    """

    def __init__(self, document: str, settings: ReadingSettings | None = None) -> None:
        self.document, self.settings = document, settings or AS_SHOWN

    @functools.cached_property
    def language(self) -> str | None:
        return languages.language_of(self.document)

    @functools.cached_property
    def first(self) -> str | None:
        """ "day" or "month", whichever comes before the other; None where nothing decides it."""
        if self.settings.dates in ("day", "month"):
            return self.settings.dates
        shown = {date.first for date in self._dates if date.first and not (date.year_first and self.year_first)}
        if len(shown) == 1:
            return shown.pop()
        if shown:  # of both kinds
            return None
        order = languages.first_in_dates(self.language, self.document)
        return None if order is None else "day" if order == "day" else "month"

    @functools.cached_property
    def year_first(self) -> bool | None:
        """Whether a year of two digits comes first in a date of numbers; None where nothing decides it."""
        if self.settings.dates:
            return self.settings.dates == "year"
        if any(date.year_last for date in self._dates):
            return False
        order = languages.first_in_dates(self.language, self.document)
        if order == "year" and self.language in (None, "en"):  # a currency does not show that much
            return None
        return None if order is None else order == "year"

    @functools.cached_property
    def _dates(self) -> list[dates.FoundDate]:
        return dates.find(self.document)

    @functools.cached_property
    def decimal_mark(self) -> str | None:
        """ "." or ","; None where nothing decides it."""
        mark = amounts.usual_mark(self.document)
        return mark or (languages.decimal_mark(self.language) if self.language else None)


def read(kind: str, text: str, conventions: Conventions) -> Reading:
    """The value of a JSON Schema type or format ("number", "integer", "date", "time", "date-time") in some characters.

    Words around it do no harm; two different values do.
    """
    return READERS[kind](text, conventions)


def _number(text: str, conventions: Conventions) -> Reading:
    amount = amounts.only(text)
    if amount is None:
        return Reading(None, "is no number")
    value, note = amount.readings[0], None
    if amount.grouping:
        mark = conventions.decimal_mark
        # Without any other: 1,234 is a thousand and more, 1.234 is one and more.
        decimal = amount.grouping == mark if mark else amount.grouping == "."
        value = amount.readings[0 if decimal else 1]
        note = None if mark else f"could also be {amount.readings[1 if decimal else 0]:f}"
    return Reading(_plain(value), note)


def _integer(text: str, conventions: Conventions) -> Reading:
    number, amount = _number(text, conventions), amounts.only(text)
    if number.value is None or amount is None:
        return number
    if number.value == int(number.value):
        return Reading(int(number.value), number.note)
    whole = [int(reading) for reading in amount.readings if reading == int(reading)]
    if not whole:
        return Reading(None, "is no integer")
    return Reading(whole[0], "is read as a whole number, as the field takes no other")  # 1.234 as 1234


def _plain(value: Decimal) -> int | float:
    """A number as JSON has it: whole where it is written so."""
    return int(value) if value.as_tuple().exponent >= 0 else float(value + 0)  # -0.00 is 0


def _date(text: str, conventions: Conventions) -> Reading:
    day, note = _read_date(text, conventions)
    return Reading(day and day.isoformat(), note)


def _read_date(text: str, conventions: Conventions) -> tuple[datetime.date | None, str | None]:
    date = dates.only(text, conventions.language)
    if date is None:
        return None, "is no date"
    if date.year_first and conventions.year_first:
        return date.year_first, None
    first = date.first or conventions.first
    unsure = len(date.readings) > 1 and not first
    first = first or ("month" if languages.has_dollars_alone(conventions.document) else "day")
    value = date.readings[0 if first == "day" else -1]
    others = [reading for reading in date.readings if unsure and reading != value]
    if date.year_first and conventions.year_first is None:
        others.append(date.year_first)
    if not others:
        return value, None
    told = "day, month or year" if date.year_first else "day or month"
    others = " or ".join(map(str, others))
    return value, f"is read with the {first} first, which nothing shows (else {others}); --dates {told} decides it"


def _time(text: str, conventions: Conventions) -> Reading:
    time = dates.only_time(text)
    if time is None:
        return Reading(None, "is no time")
    return Reading(time.clock + _offset(time, conventions), _offset_note(time, conventions))


def _date_time(text: str, conventions: Conventions) -> Reading:
    day, note = _read_date(text, conventions)
    if day is None:
        return Reading(None, note)
    time = dates.only_time(dates.masked(text))
    if time is None:
        return Reading(None, "has no time of the day")
    notes = [part for part in (note, _offset_note(time, conventions)) if part]
    return Reading(f"{day.isoformat()}T{time.clock}{_offset(time, conventions)}", "; ".join(notes) or None)


def _offset(time: dates.FoundTime, conventions: Conventions) -> str:
    return time.offset or conventions.settings.utc_offset


def _offset_note(time: dates.FoundTime, conventions: Conventions) -> str | None:
    offset = conventions.settings.utc_offset
    lacks = f"has a time zone that several places call {time.zone}" if time.zone else "has no time zone"
    return None if time.offset else f"{lacks} and is taken as of {offset}; --utc_offset decides it"


READERS: dict[str, Callable[[str, Conventions], Reading]] = {
    "number": _number,
    "integer": _integer,
    "date": _date,
    "time": _time,
    "date-time": _date_time,
}


def read_choice(text: str, choices: dict[str, Any]) -> Reading:
    """The value that some characters stand for; `choices` are by `choice_key`."""
    key = choice_key(text)
    return Reading(choices[key]) if key in choices else Reading(None, "stands for none of the values")


def choice_key(text: str) -> str:
    """A text without case and needless white space."""
    return re.sub(r"\s+", " ", text.strip()).casefold()
