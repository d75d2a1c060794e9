"""What the rounds of an on-policy distillation look like: figures, a plot, and when the student has collapsed."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from common.distillation.student_answers import StudentAnswer
from common.files import atomic_write

NGRAM = 4  # tokens
LEAST_HEIGHT = 0.05  # of a plot's axis, so that next to nothing looks like it
# What no healthy student does, chosen by judgement: see `collapse`.
MOST_EMPTY, MOST_REPEATED, MOST_CUT = 0.5, 0.5, 0.5
LENGTH_LOST, ENTROPY_LOST, ENTROPY_GAINED = 4, 10, 3  # times less, or more, than in the first round
LEAST_ENTROPY, WILD_ENTROPY = 0.05, 2.0  # nats a token: a first round below has none to lose; a student above is wild


@dataclass(frozen=True)
class RoundStatistics:
    """One round.

    Attributes:
        round: from 1.
        prompts: that the student answered.
        answers: that it wrote.
        own_rows: prompts that kept the data's completions.
        tokens: mean length of an answer.
        cut: share of answers that did not end within --max_new_tokens.
        empty: share of answers without a token.
        repetition: share of an answer's 4-grams that it has had before (seq-rep-4, Welleck et al. 2019,
            arXiv:1908.04319), mean of the answers.
        entropy: nats a token, of the student's distributions: the mean of -log p of what it drew. None where it drew at
            another temperature than 1, that is from other distributions.
        kl: nats a token, KL(student || teacher) on its answers: the mean of log p - log q of what it drew. None where
            it drew, or the teacher's probabilities were kept, at another temperature than 1.
        loss: mean of the round's training.
    """

    round: int
    prompts: int
    answers: int
    own_rows: int
    tokens: float | None = None
    cut: float | None = None
    empty: float | None = None
    repetition: float | None = None
    entropy: float | None = None
    kl: float | None = None
    loss: float | None = None

    def __str__(self) -> str:
        """A line for the log."""
        words = {
            "tokens": f"{self.tokens or 0:.1f} tokens",
            "cut": f"{100 * (self.cut or 0):.0f} % cut",
            "repetition": f"{100 * (self.repetition or 0):.0f} % repeated",
            "entropy": f"entropy {self.entropy or 0:.3f}",
            "kl": f"KL to the teacher {self.kl or 0:.3f}",
        }
        known = [text for name, text in words.items() if getattr(self, name) is not None]
        return ", ".join([f"{self.answers:,} answers to {self.prompts:,} prompts", *known])


def repetition(tokens: Sequence[int]) -> float:
    """Share of n-grams that came before in the same answer; 0 of one that has none."""
    grams = list(zip(*(tokens[start:] for start in range(NGRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def of_answers(
    number: int, answers: Sequence[StudentAnswer], own_rows: int, temperature: float = 1.0
) -> RoundStatistics:
    """What can be told of answers by themselves.

    Args:
        temperature: that they were drawn at.
    """
    count, prompts = len(answers), len({answer.row for answer in answers})
    if not answers:
        return RoundStatistics(number, 0, 0, own_rows)
    tokens = sum(len(answer.tokens) for answer in answers)
    return RoundStatistics(
        number,
        prompts,
        count,
        own_rows,
        tokens=tokens / count,
        cut=sum(not answer.finished for answer in answers) / count,
        empty=sum(not answer.tokens for answer in answers) / count,
        repetition=sum(repetition(answer.tokens) for answer in answers) / count,
        entropy=-sum(answer.logprob for answer in answers) / max(1, tokens) if temperature == 1 else None,
    )


def collapse(first: RoundStatistics, now: RoundStatistics) -> str | None:
    """Why a round's answers say that the student has collapsed; None where they do not.

    Answers that are empty or go round in circles are no training data in any round. Against the first round, answers
    may not shrink or grow without end, nor their entropy vanish or rise to noise.
    """
    if not now.answers:
        return None
    if now.empty > MOST_EMPTY:
        return f"{100 * now.empty:.0f} % of its answers are empty"
    if now.repetition > MOST_REPEATED:
        return f"{100 * now.repetition:.0f} % of what its answers say they have said before"
    if not first.answers:
        return None
    if now.cut > MOST_CUT and now.cut > 2 * first.cut:
        return f"{100 * now.cut:.0f} % of its answers do not end, against {100 * first.cut:.0f} % in round 1"
    if now.tokens < first.tokens / LENGTH_LOST:
        return f"its answers have {now.tokens:.1f} tokens, against {first.tokens:.1f} in round 1"
    if first.entropy is None or now.entropy is None:
        return None
    lost = first.entropy > LEAST_ENTROPY and now.entropy < first.entropy / ENTROPY_LOST
    gained = now.entropy > WILD_ENTROPY and now.entropy > ENTROPY_GAINED * first.entropy
    if lost or gained:
        return f"the entropy of its answers is {now.entropy:.3f} nats a token, against {first.entropy:.3f} in round 1"
    return None


def write(folder: str, rounds: Sequence[RoundStatistics]) -> None:
    """`rounds.csv` and `rounds.png` of a run."""
    names = [field.name for field in fields(RoundStatistics)]
    with atomic_write(Path(folder) / "rounds.csv") as handle:
        lines = csv.DictWriter(handle, names, lineterminator="\n")
        lines.writeheader()
        lines.writerows(asdict(statistics) for statistics in rounds)
    with atomic_write(Path(folder) / "rounds.png", "wb") as handle:
        handle.write(plot(rounds))


def plot(rounds: Sequence[RoundStatistics]) -> bytes:
    """Length, what is cut and repeated, entropy and KL, over the rounds, as a PNG."""
    from common.evaluation import plots

    panels: list[tuple[str, dict[str, str]]] = [
        ("tokens an answer", {"tokens": "length"}),
        ("share of answers", {"cut": "cut", "repetition": "repeated 4-grams", "empty": "empty"}),
        ("nats a token", {"entropy": "entropy"}),
        ("nats a token", {"kl": "KL(student || teacher)"}),
    ]
    figure = plots.new_figure(5.6, 7.4)
    for axes, (ylabel, lines) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        heights = [0.0]
        for index, (name, words) in enumerate(lines.items()):
            known = [
                (statistics.round, getattr(statistics, name))
                for statistics in rounds
                if getattr(statistics, name) is not None
            ]
            if known:
                axes.plot(*zip(*known, strict=True), marker="o", color=plots.COLOURS[index], label=words)
                heights += [height for _, height in known]
        axes.set_xticks([statistics.round for statistics in rounds])
        low, high = min(heights), max(max(heights), LEAST_HEIGHT)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))  # an estimate of a KL can be below 0
        if axes.lines:
            axes.legend(frameon=False, labelcolor=plots.INK, fontsize=9)
        plots.tidy(axes, "round", ylabel)
    return plots.png(figure)
