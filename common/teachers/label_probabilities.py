"""A teacher's probability for each label: from a chat API's top log-probabilities, or from a local model's ranker."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from common.tasks.ranking.task import LabelTask
from common.teachers.interview import Answer, NoAnswer, Question
from common.teachers.tasks import UnusableAnswer

if TYPE_CHECKING:
    from common.tasks.ranking.classifier import Classifier

WINDOW = 512  # rows that are scored, and then kept, together


def begins(word: str, token: str) -> bool:
    """Whether a token can be the start of a word, white space, marks and case aside."""
    if (content := token_bytes(token)) is not None:
        start = content.lstrip(b" \t\r\n")
        return bool(start) and word.encode().startswith(start)
    text = token.strip(" \t\r\n*_`\"'").casefold()
    return bool(text) and word.casefold().startswith(text)


def token_bytes(token: str) -> bytes | None:
    """The bytes of a token that is a part of a character, written like "bytes:\\xe6\\x97"; None for any other."""
    if not re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+", token):
        return None
    return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))


def distribution(top: Sequence[tuple[str, float]], task: LabelTask) -> tuple[dict[str, float], float]:
    """({label: probability}, the mass that the labels did not cover) from the first token of an answer.

    A token counts for a label when it begins one of its words and no word of another label, white space, marks and
    case aside. Tokens that begin several ("Low" of Low and Low risk) count for none; where they weigh as much as the
    likeliest label, nobody knows which that is. What the top tokens leave over (1 minus their sum) is an upper bound of
    what all absent labels have together, and is given to them in equal parts; then the labels' masses are scaled to sum
    to 1.

    Args:
        top: the likeliest first tokens with their log-probabilities in nats.

    Raises:
        UnusableAnswer: no label is among them, or which one is likeliest hangs on tokens that begin several.
    """
    mass, shared = dict.fromkeys(task.labels, 0.0), dict[str, float]()
    for token, logprob in top:
        owners = [label for label in task.labels if any(begins(word, token) for word in task.words(label))]
        if len(owners) == 1:
            mass[owners[0]] += math.exp(logprob)
        elif owners:
            shared[token] = shared.get(token, 0.0) + math.exp(logprob)
    if shared and sum(shared.values()) >= max(mass.values()):
        token = max(shared, key=shared.__getitem__)
        raise UnusableAnswer(f"the first token {token!r} begins several labels; ask a local model, or a decisions API")
    covered = sum(mass.values())
    if not covered:
        shown = ", ".join(repr(token) for token, _ in top[:3]) or "none"
        raise UnusableAnswer(f"no label is among the likeliest first tokens ({shown})")
    absent = [label for label in task.labels if not mass[label]]
    rest = max(0.0, 1 - sum(math.exp(logprob) for _, logprob in top))
    mass |= {label: rest / len(absent) for label in absent}
    total = sum(mass.values())
    return {label: round(value / total, 6) for label, value in mass.items()}, round(max(0.0, 1 - covered), 6)


class RankingTeacher:
    """A local model whose calibrated label ranker gives the probabilities (`Classifier.answers`).

    Args:
        identity: what tells this model from another, and its precision, as JSON.
    """

    def __init__(self, classifier: Classifier, identity: Any) -> None:
        self.classifier = classifier
        self.calibration = classifier.calibration(None)
        task = classifier.task
        self.key: Any = ["ranker", identity, task.labels, task.verbalizers, repr(self.calibration)]

    def ask(self, questions: Sequence[Question], keep: Callable[[int, Answer | NoAnswer], None]) -> None:
        """See `interview.Teacher`; the question is taken off the prompt, since the ranker puts it."""
        instruction = self.classifier.task.prompt("")
        for start in range(0, len(questions), WINDOW):
            batch = questions[start : start + WINDOW]
            texts = [question.messages[0]["content"].removeprefix(instruction) for question in batch]
            for index, answer in enumerate(self.classifier.answers(texts, self.calibration), start=start):
                probabilities = answer["probabilities"]
                label = answer["prediction"] or max(probabilities, key=probabilities.get)
                keep(index, Answer(label, probabilities=probabilities))
