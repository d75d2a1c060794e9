"""The form in which a model is asked for a document's fields and writes them: as its training had it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from common import run_record
from common.data import task_record
from common.models import adapters
from common.tasks.idp.prompt import SCHEMAS

TYPED_FIELDS = tuple(SCHEMAS)


@dataclass(frozen=True)
class AnswerForm:
    """How fields are asked for and written.

    Attributes:
        typed_fields: "written": dates, times and numbers are copied as the document has them, and read by code; "held":
            the model writes them in the schema's types itself.
        spaced: the JSON has a space after each comma and colon, as models write it that were not trained otherwise.
        schema_last: the schema stands behind the document, next to the answer, where a model finds it that has not
            learned to keep it in mind while it reads.
    """

    typed_fields: str = "written"
    spaced: bool = True
    schema_last: bool = False

    @property
    def written(self) -> bool:
        return self.typed_fields == "written"


UNTRAINED = AnswerForm(schema_last=True)


def form_of(model_dir: str, typed_fields: str | None = None) -> AnswerForm:
    """The form for a model: that of the rows that it was trained on; for one that was trained on none, `UNTRAINED`.

    Args:
        typed_fields: "written" or "held", whatever it was trained on; None: as it was trained.

    Raises:
        UserError: the record of its task is broken.
    """
    record = task_record.read(model_dir)
    if record is None:
        earlier = is_trained(model_dir)
    else:
        earlier = record["kind"] == task_record.IDP and "typed_fields" not in record
    if earlier:  # trained when all rows were of one form
        return AnswerForm(typed_fields or "held", spaced=False)
    if record is None:
        return replace(UNTRAINED, typed_fields=typed_fields or UNTRAINED.typed_fields)
    return AnswerForm(
        typed_fields or record.get("typed_fields") or "written", spaced=record.get("json_spacing") != "compact"
    )


def is_trained(model_dir: str) -> bool:
    """Whether a model is an adapter, or the result of a run."""
    return adapters.is_adapter(model_dir) or (Path(model_dir) / run_record.FILE).is_file()
