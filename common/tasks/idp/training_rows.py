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
        copyist = Copyist(self.typed) if self.typed else None
        sft, kd, dpo = [], [], []
        for row in rng.sample(rows, len(rows)):
            fields, document = row["fields"], row["document"]
            if copyist:
                fields = copyist.written(fields, document)
            asked, answer = prompt.user_turn(document, self.asked, self.typed_fields), self.text(fields)
            group = {"group": row["group"]}
            sft.append({"input": asked, "output": answer, **group})
            kd.append({"input": asked, "teacher_output": answer, **group})
            if (wrong := self._wrong(fields, document, rng)) is not None:
                dpo.append({"prompt": asked, "chosen": answer, "rejected": wrong, **group})
        if copyist:
            self.counts = {"fields": copyist.copied + copyist.missed, "not_in_document": copyist.missed}
        return sft, kd, dpo

    def text(self, fields: dict) -> str:
        """Fields in the form in which they are asked for, as JSON."""
        return json_writer.dumps(fields, self.asked)

    def _wrong(self, fields: dict, document: str, rng: random.Random) -> str | None:
        answer = mistakes.RightAnswer(fields, document)
        if not self.typed:
            return mistakes.rejected(answer, self.asked, rng)
        # What can no longer be read means something else, too.
        return mistakes.rejected(answer, self.asked, rng, lambda value: self.typed.read(value, document).value)
