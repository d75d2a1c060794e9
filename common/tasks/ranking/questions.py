"""Questions of the decisions APIs, and the label tasks that they are.

A question that a run was trained for is answered by the run's own task, with all that was fitted for it
(`Question.own_labels`). Any other is a label task of its own (`Question.task`): its options are the labels, as they are
written, however many tokens each has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.tasks.ranking.task import LabelTask

PREDICATE, CHOICE, SCORE = "predicate", "choice", "score"
TRUTH = {"yes": True, "true": True, "no": False, "false": False}
LONGEST_LEVEL = 64  # characters of a level that is ranked as it is written; longer ones by their numbers


@dataclass(frozen=True)
class Question:
    """A question with its options, whatever the text is that it is asked about.

    Attributes:
        kind: "predicate", "choice" or "score".
        instructions: what is asked; may be empty.
        options: at least two, no two alike; of a score from the lowest to the highest level.
        descriptions: one for each option, empty where there is none.
        truth: the options mean true and false, in whatever words.
    """

    kind: str
    instructions: str
    options: tuple[str, ...]
    descriptions: tuple[str, ...]
    truth: bool = False

    def own_labels(self, task: LabelTask) -> tuple[str, ...] | None:
        """The labels of `task` in the order of the options, where this is the question that `task` puts; else None.

        It is where the instructions are the task's, white space aside, no option is described, and the options are
        exactly the labels in any order. Options that mean true and false are also the labels of a task of two that say
        so ("Yes" and "No", "true" and "false", in any case).
        """
        if any(self.descriptions) or self.instructions.split() != task.instruction.split():
            return None
        if set(self.options) == set(task.labels):
            return self.options
        meant = {TRUTH.get(label.casefold()): label for label in task.labels}
        if self.truth and len(task.labels) == 2 and set(meant) == {True, False}:
            return tuple(meant[TRUTH[option.casefold()]] for option in self.options)
        return None

    def task(self) -> LabelTask:
        """The label task that asks this question."""
        described = [*zip(self.options, self.descriptions, strict=True)]
        lines = [self.instructions] if self.instructions else []
        if self.kind == PREDICATE:
            lines += [f"{option}: {description}" for option, description in described if description]
            lines.append(f"Answer {' or '.join(self.options)} only.")
        else:
            lines += [
                f"- {option}: {description}" if description else f"- {option}" for option, description in described
            ]
            lines.append(f"Answer with one of these {'levels' if self.kind == SCORE else 'options'} only.")
        return LabelTask("decision", self.options, "\n".join(lines))


def predicate(instructions: str, if_true: str = "", if_false: str = "") -> Question:
    """Whether what `instructions` says is true; the descriptions say when it is, and when it is not."""
    return Question(PREDICATE, instructions, ("Yes", "No"), (if_true, if_false), truth=True)


def choice(instructions: str, values: Sequence[str | bool], descriptions: Sequence[str]) -> Question:
    """Which of the values; True and False are ranked as "true" and "false"."""
    options = tuple(value if isinstance(value, str) else str(value).lower() for value in values)
    return Question(CHOICE, instructions, options, tuple(descriptions), truth={*values} == {True, False})


def score(instructions: str, levels: Sequence[str], descriptions: Sequence[str]) -> Question:
    """Which of the ordered levels. Levels that are long or have several lines are ranked by their numbers, from 0."""
    if all(len(level) <= LONGEST_LEVEL and "\n" not in level for level in levels):
        return Question(SCORE, instructions, tuple(levels), tuple(descriptions))
    texts = [f"{level} ({more})" if more else level for level, more in zip(levels, descriptions, strict=True)]
    return Question(SCORE, instructions, tuple(map(str, range(len(levels)))), tuple(texts))


def choice_confidence(probabilities: Sequence[float], chosen: int) -> float:
    """How far the chosen option is above chance: 0 for 1/n and below, 1 for certainty (System One's definition)."""
    chance = 1 / len(probabilities)
    return max(0.0, (probabilities[chosen] - chance) / (1 - chance))


def score_confidence(probabilities: Sequence[float], chosen: int) -> float:
    """How near the probability lies to the chosen level (System One's definition).

    1 less the expected distance from it, in units of the mean distance of all levels from their middle; at least 0.
    """
    count = len(probabilities)
    distance = sum(probability * abs(level - chosen) for level, probability in enumerate(probabilities))
    middling = sum(abs(level - (count - 1) / 2) for level in range(count)) / count
    return max(0.0, 1 - distance / middling)


def expected_level(probabilities: Sequence[float]) -> float:
    """The mean level, counted from 0."""
    return sum(level * probability for level, probability in enumerate(probabilities))
