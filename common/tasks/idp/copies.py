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
        for date in dates.find(document) or dates.find(document, conventions.language):
            if kind == "date":
                yield document[date.start : date.end]
                continue
            for time in dates.find_times(document[date.end : date.end + NEAR + LONGEST_TIME]):
                if time.start < NEAR:
                    yield document[date.start : date.end + time.end].strip()
