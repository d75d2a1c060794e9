"""What is shown of an extraction: its fields, what there is to say of them, and whether it is to be reviewed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data import rows
from common.files import atomic_write, jsonl_text
from common.tasks.idp import evidence
from common.tasks.idp.calibration import document_confidence
from common.tasks.idp.confidence import DIGITS
from common.tasks.idp.documents import Document
from common.tasks.idp.extractor import Extraction


@dataclass(frozen=True)
class Shown:
    """How answers are shown.

    Attributes:
        confidence: with the confidence of each field.
        written: with what the model copied for each field.
        accept_from: an answer of this confidence needs no review (see `calibration.acceptance`); None: nothing is said.
        evidence: with where each field stands in the document, and the document's text.
    """

    confidence: bool = False
    written: bool = False
    accept_from: float | None = None
    evidence: bool = False

    @property
    def needs_confidence(self) -> bool:
        """Whether confidences have to be worked out."""
        return self.confidence or self.accept_from is not None

    @property
    def more_than_fields(self) -> bool:
        """Whether anything is shown beside the fields."""
        return self.needs_confidence or self.written or self.evidence

    def answer(self, extraction: Extraction, document: Document) -> dict[str, Any]:
        """An extraction as JSON: "fields", or "error" and "text", and what else there is to say."""
        if extraction.error:
            answer = {"error": extraction.error, "text": extraction.text}
        else:
            answer = {"fields": extraction.value}
            if self.confidence:
                answer["confidence"] = {name: round(value, DIGITS) for name, value in extraction.confidence.items()}
            if self.evidence:
                answer["evidence"] = evidence.shown(document, extraction.as_written)
                answer["document"] = document.text  # cleaned, and of a PDF laid out: what places are counted in
            if self.written:
                answer["written"] = extraction.written_leaves
        if extraction.notes:
            answer["notes"] = list(extraction.notes)
        if self.accept_from is not None:
            answer["accepted"] = self.accepts(extraction)
        if extraction.cut:
            answer["cut"] = True
        if extraction.pieces > 1:
            answer["pieces"] = extraction.pieces
        return answer

    def accepts(self, extraction: Extraction) -> bool:
        """Whether an answer is valid, whole and sure enough."""
        if extraction.error or extraction.cut or self.accept_from is None:
            return False
        return document_confidence(extraction.confidence) >= self.accept_from


def write_split(output: str, numbers: Sequence[Any]) -> tuple[int, int]:
    """Write the answers in `output`, NAME.jsonl, also to NAME.accepted.jsonl and NAME.review.jsonl beside it.

    Args:
        numbers: of their rows in the input, whose bad ones have no answer; those without an "id" get theirs as "row".

    Returns:
        (accepted, to be reviewed).
    """
    path, counts = Path(output), {True: 0, False: 0}
    with ExitStack() as stack:
        files = {
            accepted: stack.enter_context(atomic_write(path.with_name(f"{path.stem}.{name}.jsonl")))
            for accepted, name in ((True, "accepted"), (False, "review"))
        }
        for number, (_, answer) in zip(numbers, rows.iter_jsonl(output), strict=True):
            named = answer if "id" in answer else {"row": number} | answer
            files[answer["accepted"]].write(jsonl_text([named]))
            counts[answer["accepted"]] += 1
    return counts[True], counts[False]
