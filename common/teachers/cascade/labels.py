"""The cascade of a label task: which answers are unsure, and what they become once a teacher was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.tasks.ranking import loading
from common.tasks.ranking.calibration import Calibration
from common.tasks.ranking.classifier import CALIBRATION
from common.tasks.ranking.task import LabelTask
from common.teachers.cascade import kept_rows
from common.teachers.cascade.handing import Cascade, Reply, cascade_of
from common.teachers.cascade.settings import CascadeSettings
from common.teachers.settings import LocalSettings
from common.teachers.tasks import Item, Labels

LabelAnswer = dict[str, Any]  # as `Classifier.answers` gives it


def is_unsure(answer: LabelAnswer, below: float | None) -> bool:
    """Whether an answer is handed on: the calibration abstains, or its label's probability is under the threshold.

    A text that is not of the task is nothing that a teacher could label better.
    """
    if answer.get("warning"):
        return False
    label = answer["prediction"]
    return label is None or (below is not None and answer["probabilities"][label] < below)


def check_threshold(below: float | None, task: LabelTask, model_dir: str, method: str | None) -> None:
    """Refuse a cascade to which no row could ever be handed on.

    Args:
        method: of calibration, as `Classifier.calibration` takes it.

    Raises:
        UserError: no threshold is given, and the model's calibration does not abstain.
    """
    fitted = task.kept_file(model_dir, CALIBRATION)
    abstains = method in (None, "fitted") and fitted.is_file()
    if below is None and not (abstains and Calibration.load(fitted, task.labels).decision.abstain_below is not None):
        raise UserError(
            f"--cascade: {model_dir} abstains from nothing, so nothing would be handed on; give --cascade_below 0.8, "
            f"or fit a threshold with eval_creditmix.py --model_dir {model_dir} --fit_calibration DEV.jsonl "
            "--target_precision 0.9"
        )


class LabelCascade:
    """A cascade for one label task.

    Args:
        folder: of the student's run, where kept rows go.
    """

    def __init__(self, cascade: Cascade, task: LabelTask, folder: str | Path) -> None:
        self.cascade, self.task, self.folder = cascade, task, Path(folder)
        self.teacher_task = Labels(task)

    def answers(self, texts: Sequence[str], answers: Sequence[LabelAnswer]) -> list[LabelAnswer]:
        """The student's answers to `texts`, the unsure ones after the teacher was asked (see `joined`)."""
        indices = self.unsure(answers)
        replies = self.cascade.ask(self.teacher_task, self.items(texts, indices))
        return self.joined(texts, answers, indices, replies)

    def unsure(self, answers: Sequence[LabelAnswer]) -> list[int]:
        """The indices of answers that are handed on."""
        below = self.cascade.settings.below
        return [index for index, answer in enumerate(answers) if is_unsure(answer, below)]

    def items(self, texts: Sequence[str], indices: Sequence[int]) -> list[Item]:
        """What a teacher is asked about the texts at `indices`."""
        return [Item(index, self.task.prompt(texts[index]), None) for index in indices]

    def joined(
        self, texts: Sequence[str], answers: Sequence[LabelAnswer], indices: Sequence[int], replies: Sequence[Reply]
    ) -> list[LabelAnswer]:
        """The answers with the teacher's replies to those at `indices`; what is to be kept is kept.

        Each says who answered ("answered_by"). One that the teacher did not answer keeps the label to which the student
        leans, with "unsure": true, and the reason under "cascade".
        """
        joined = [answer | {"answered_by": answer["model_name"]} for answer in answers]
        rows = []
        for index, reply in zip(indices, replies, strict=True):
            answer = joined[index]
            leaning = answer.pop("leaning", None) or answer["prediction"]
            if reply.answer is None:
                joined[index] = answer | {"prediction": leaning, "unsure": True, "cascade": reply.reason}
                continue
            joined[index] = answer | {"prediction": reply.answer, "answered_by": self.cascade.name}
            if self.cascade.settings.keep:
                group = self.task.group_of({self.task.text_field: texts[index]})
                rows.append(kept_rows.row(self.task.prompt(texts[index]), reply.answer, self.cascade.name, group))
        if rows:
            kept_rows.append(self.folder, rows)
        return joined


def label_cascade(
    settings: CascadeSettings, task: LabelTask, model_dir: str, method: str | None
) -> Callable[[Sequence[str], Sequence[LabelAnswer]], list[LabelAnswer]]:
    """`LabelCascade.answers` of a script.

    Raises:
        UserError: as `check_threshold`, or the local teacher was trained for another task.
    """
    check_threshold(settings.below, task, model_dir, method)
    if isinstance(settings.teacher, LocalSettings):
        loading.check(task, settings.teacher.source.model_dir)
    return LabelCascade(cascade_of(settings, task), task, model_dir).answers
