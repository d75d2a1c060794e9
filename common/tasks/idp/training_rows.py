"""Labelled documents as rows that train: SFT, KD and DPO."""

from __future__ import annotations

import random
from collections.abc import Sequence

from common.generation import json_schema, json_writer
from common.tasks.idp import mistakes, prompt
from common.tasks.idp.copying import Copyist
from common.tasks.idp.written_values import TypedFields


class TrainingRowBuilder:
    """Makes the training rows of one schema.

    Args:
        typed_fields: "written" or "held"; see `answer_form.AnswerForm`.
        seed: of their order and of the mistakes.

    Attributes:
        counts: {"fields": typed fields that are copied as written, "not_in_document": those of no such characters}.
    """

    def __init__(self, schema: json_schema.Schema, typed_fields: str, seed: int) -> None:
        self.typed_fields, self.seed = typed_fields, seed
        self.typed = TypedFields(schema) if typed_fields == "written" else None
        self.asked = self.typed.written_schema if self.typed else schema
        self.counts = {"fields": 0, "not_in_document": 0}

    def of(self, rows: Sequence[dict]) -> tuple[list[dict], list[dict], list[dict]]:
        """SFT, KD and DPO rows of labelled documents; of one without a possible mistake there is no DPO row."""
        rng = random.Random(self.seed)
        shuffled = rng.sample(rows, len(rows))
        sft, kd, dpo = [], [], []
        for row, (asked, fields) in zip(shuffled, self.pairs(shuffled), strict=True):
            answer, group = self.text(fields), {"group": row["group"]}
            sft.append({"input": asked, "output": answer, **group})
            kd.append({"input": asked, "teacher_output": answer, **group})
            if (wrong := self._wrong(fields, row["document"], rng)) is not None:
                dpo.append({"prompt": asked, "chosen": answer, "rejected": wrong, **group})
        return sft, kd, dpo

    def pairs(self, rows: Sequence[dict]) -> list[tuple[str, dict]]:
        """(what a model is asked, the fields that it is to answer with) of labelled documents; they are counted."""
        copyist = Copyist(self.typed) if self.typed else None
        found = []
        for row in rows:
            fields = copyist.written(row["fields"], row["document"]) if copyist else row["fields"]
            found.append((prompt.user_turn(row["document"], self.asked, self.typed_fields), fields))
        if copyist:
            self.counts = {"fields": copyist.copied + copyist.missed, "not_in_document": copyist.missed}
        return found

    def text(self, fields: dict) -> str:
        """Fields in the form in which they are asked for, as JSON."""
        return json_writer.dumps(fields, self.asked)

    def _wrong(self, fields: dict, document: str, rng: random.Random) -> str | None:
        answer = mistakes.RightAnswer(fields, document)
        if not self.typed:
            return mistakes.rejected(answer, self.asked, rng)
        # What can no longer be read means something else, too.
        return mistakes.rejected(answer, self.asked, rng, lambda value: self.typed.read(value, document).value)
