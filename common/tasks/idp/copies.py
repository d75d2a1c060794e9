"""The texts of a document that a typed field can be copied from."""

from __future__ import annotations

from collections.abc import Iterator

from common.tasks.idp import amounts, dates
from common.tasks.idp.readers import Conventions

NEAR = 24  # characters between a date and its time
LONGEST_TIME = 32  # characters, so that "10:12:31 PM" does not lose its half of the day


def copies(kind: str, conventions: Conventions) -> Iterator[str]:
    """The dates, times or numbers of a document as it writes them, in order.

    Args:
        kind: "number", "integer", "date", "time" or "date-time".
    """
    document = conventions.document
    if kind in ("number", "integer"):
        for spaces in (True, False):
            for amount in amounts.find(document, spaces):
                yield document[slice(*amount.bare)]
    elif kind == "time":
        yield from (document[time.start : time.end].strip() for time in dates.find_times(document))
    else:
        found = [(date.start, date.end) for date in dates.find(document, conventions.language)]
        if kind == "date":
            spans = sorted([*found, *dates.unmarked(document)]) if found else ()
            yield from (document[start:end] for start, end in spans)
        else:
            for span in found:
                yield from _with_times(document, *span)


def _with_times(document: str, start: int, end: int) -> list[str]:
    """A date with each of the times behind it, or where there are none, in front of it."""
    times = dates.find_times(document[end : end + NEAR + LONGEST_TIME])
    if behind := [document[start : end + time.end].strip() for time in times if time.start < NEAR]:
        return behind
    first = max(0, start - NEAR - LONGEST_TIME)
    times = dates.find_times(dates.masked(document)[first:start])
    return [document[first + time.start : end] for time in times if first + time.end > start - NEAR]
