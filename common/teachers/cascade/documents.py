"""The cascade of documents: which extractions are unsure, and what they become once a teacher was asked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.generation.json_schema import Schema
from common.tasks.idp import documents
from common.tasks.idp.answers import Shown
from common.tasks.idp.calibration import document_confidence
from common.tasks.idp.extractor import Extraction, Extractor
from common.tasks.idp.readers import AS_SHOWN, ReadingSettings
from common.tasks.idp.written_values import TypedFields
from common.teachers.cascade import kept_rows
from common.teachers.cascade.handing import Cascade, Reply, cascade_of, in_turn
from common.teachers.cascade.settings import CascadeSettings
from common.teachers.tasks import Documents, Item


@dataclass(frozen=True)
class Answered:
    """An extraction, and who made it.

    Attributes:
        facts: for the answer: "answered_by", and where the teacher was to answer and did not "unsure" and "cascade".
    """

    extraction: Extraction
    facts: dict[str, Any]
    by_teacher: bool = False


def is_unsure(extraction: Extraction, below: float | None) -> bool:
    """Whether an extraction is handed on: it is no whole, valid answer, or of less confidence than the threshold."""
    if extraction.error or extraction.cut:
        return True
    return below is not None and document_confidence(extraction.confidence) < below


class DocumentCascade:
    """A cascade for documents of one schema.

    Args:
        model_dir: the student's, where kept rows go.
        typed_fields: the form in which the student is asked (`answer_form.AnswerForm`), so that it can learn from them.
        below: documents of less confidence are handed on, beside those without a whole, valid answer; None: no others.
    """

    def __init__(
        self,
        cascade: Cascade,
        schema: Schema,
        model_dir: str,
        typed_fields: str,
        below: float | None,
        reading: ReadingSettings = AS_SHOWN,
    ) -> None:
        self.cascade, self.model_dir, self.below = cascade, model_dir, below
        self.task = Documents(schema, typed_fields)
        self.typed = TypedFields(schema, reading) if typed_fields == "written" else None

    def items(self, texts: Sequence[str]) -> list[Item]:
        """What a teacher is asked about documents."""
        return [self.task.item(number, {"document": text}) for number, text in enumerate(texts)]

    def answers(self, texts: Sequence[str], extractions: Sequence[Extraction]) -> list[Answered]:
        """The student's extractions of `texts`, the unsure ones after the teacher was asked."""
        unsure = [index for index, extraction in enumerate(extractions) if is_unsure(extraction, self.below)]
        items = self.items([texts[index] for index in unsure])
        return self.joined(texts, extractions, dict(zip(unsure, self.cascade.ask(self.task, items), strict=True)))

    def joined(
        self, texts: Sequence[str], extractions: Sequence[Extraction], replies: dict[int, Reply]
    ) -> list[Answered]:
        """The extractions with the teacher's replies to those at their indices; what is to be kept is kept."""
        answered = [Answered(extraction, {"answered_by": self.model_dir}) for extraction in extractions]
        rows = []
        for index, reply in replies.items():
            if reply.answer is None:
                facts = answered[index].facts | {"unsure": True, "cascade": reply.reason}
                answered[index] = replace(answered[index], facts=facts)
                continue
            text = documents.clean(texts[index])
            extraction = self._extraction(reply.answer, text)
            answered[index] = Answered(extraction, {"answered_by": self.cascade.name}, by_teacher=True)
            if self.cascade.settings.keep:
                (item,) = self.items([text])
                group = documents.group_of(text)
                rows.append(kept_rows.row(item.prompt, reply.answer, self.cascade.name, group))
        if rows:
            kept_rows.append(Path(self.model_dir), rows)
        return answered

    def _extraction(self, answer: str, text: str) -> Extraction:
        """A teacher's answer, in the form of training rows, as an extraction."""
        value = json.loads(answer)
        if self.typed is None:
            return Extraction(value, None, answer)
        read = self.typed.read(value, text)
        return Extraction(read.value, None, answer, written=value, notes=read.notes)


def document_cascade(
    settings: CascadeSettings, extractor: Extractor, model_dir: str, accept_from: float | None
) -> DocumentCascade:
    """The cascade of a script's extractor.

    Args:
        accept_from: the confidence from which answers need no review; those below are handed on, unless the settings
            have a threshold of their own.
    """
    below = accept_from if settings.below is None else settings.below
    form, reading = extractor.form.typed_fields, extractor.settings.reading
    return DocumentCascade(cascade_of(settings, None), extractor.schema, model_dir, form, below, reading)


def answers(
    extractor: Extractor, shown: Shown, cascade: DocumentCascade | None, read: Sequence[documents.Document]
) -> Iterator[tuple[int, Extraction, dict[str, Any]]]:
    """(number of a document, its extraction, what is shown of it) of each, as it is there.

    The unsure ones come after a teacher was asked, which is asked for several together.
    """
    texts = [document.text for document in read]
    confidence = shown.needs_confidence or (cascade is not None and cascade.below is not None)
    extractions = extractor.extract_each(texts, confidence)
    if cascade is None:
        for number, extraction in extractions:
            yield number, extraction, shown.answer(extraction, read[number])
        return

    def stands(numbered: tuple[int, Extraction]) -> tuple[int, Extraction, dict[str, Any]]:
        number, extraction = numbered
        (answered,) = cascade.joined([texts[number]], [extraction], {})
        return number, extraction, shown.answer(extraction, read[number]) | answered.facts

    yield from in_turn(
        extractions,
        lambda numbered: is_unsure(numbered[1], cascade.below),
        stands,
        lambda unsure: _asked(cascade, shown, read, unsure),
    )


def _asked(
    cascade: DocumentCascade, shown: Shown, read: Sequence[documents.Document], unsure: list[tuple[int, Extraction]]
) -> Iterator[tuple[int, Extraction, dict[str, Any]]]:
    """What becomes of unsure extractions, (number of the document, extraction), in the documents' order."""
    unsure = sorted(unsure, key=lambda pair: pair[0])
    results = cascade.answers([read[number].text for number, _ in unsure], [extraction for _, extraction in unsure])
    for (number, _), answered in zip(unsure, results, strict=True):
        answer = shown.answer(answered.extraction, read[number]) | answered.facts
        if answered.by_teacher and "accepted" in answer:
            answer["accepted"] = False  # nobody has shown how often a teacher is right
        yield number, answered.extraction, answer
