"""What the routes' requests have in common: kinds of fields, and the check that a run is of the task."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

from common.serving import label_tasks
from common.serving.run_registry import Version
from common.web.app import Problem

MAX_TEXT = 1_000_000  # characters
MAX_ANSWER_TOKENS = 4096

Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT, pattern=r"\S")]
RunName = Annotated[str, Field(min_length=1, max_length=200, description="A run, or `name@hash` for one version of it")]
Tokens = Annotated[int, Field(ge=1, le=MAX_ANSWER_TOKENS)]


FLAG = re.compile(r"--(max_new_tokens|dates|utc_offset)\b")  # of the scripts, which requests have as fields
LAST_REMEDY = re.compile(r",? or (?:(?!,? or |\.py\b)[^;])*--(?:(?!,? or |\.py\b)[^;])*$")


def with_fields(message: str) -> str:
    """What the toolkit says of a request or an answer, with the request's fields where it names the scripts' flags.

    A last remedy that is a flag of no request ("change it, or pass --best_effort") is left out.
    """
    last = LAST_REMEDY.search(message)
    if last and not FLAG.search(last[0]):
        message = message[: last.start()]
    return FLAG.sub(r"\1", message)


def check_task(version: Version, kind: str, instruction: str | None, asked: str) -> None:
    """Raises Problem 422 for a run that was trained for another task; see `label_tasks.check`."""
    try:
        label_tasks.check(version, kind, instruction, asked)
    except label_tasks.OtherTask as error:
        raise Problem(422, str(error), "run") from error
