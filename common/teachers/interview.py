"""Questions to a teacher and its answers: kept as they come, so that nothing is asked twice; repeated where unusable.

A teacher is an endpoint (`chat_endpoint`, `decisions_endpoint`), a local model (`local_model`) or its label ranker
(`label_probabilities`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from common.cli import UserError
from common.data.resumable import AnswerStore, content_key
from common.generation.result import final_answer
from common.teachers.prompts import AGAIN
from common.teachers.tasks import ParsedAnswer

Messages = list[dict[str, str]]
GIVE_UP = 10  # requests in a row without an answer


@dataclass(frozen=True)
class Question:
    """The turns of a chat that a teacher is to answer.

    Attributes:
        row: the number of the row that it is about, for the raw answers.
        sample: which of the answers to the same chat it is, from 0.
        ends: whether a growing answer holds all that was asked for, so that a local teacher need not write on.
    """

    row: int
    messages: Messages
    sample: int = 0
    ends: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Answer:
    """A raw answer and what is known of it; token counts are None where the teacher does not tell.

    Attributes:
        finished: it ended by itself, not at the token budget.
        attempts: how often it was tried until it came.
        top_logprobs: the likeliest first tokens with their log-probabilities, where they were asked for.
        probabilities: a ranker's or a decisions endpoint's, by label.
    """

    text: str
    finished: bool = True
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    attempts: int = 1
    request_id: str | None = None
    top_logprobs: list[tuple[str, float]] | None = None
    probabilities: dict[str, float] | None = None


@dataclass(frozen=True)
class NoAnswer:
    """Why there is none. It is not kept: the next run asks again.

    Attributes:
        lasting: there will be none the next time, either.
        refused: an endpoint does not take the request, which may be the row's fault or that of every request.
    """

    reason: str
    lasting: bool = False
    refused: bool = False


class Teacher(Protocol):
    """What `Interview` needs: `key` is all that decides an answer besides the question, as JSON."""

    key: Any

    def ask(self, questions: Sequence[Question], keep: Callable[[int, Answer | NoAnswer], None]) -> None:
        """Call `keep` with the index of every question and what came of it, in any order, as soon as it is there."""


def no_answers(last: NoAnswer) -> UserError:
    """Why a teacher is not asked any more that has left `GIVE_UP` requests in a row without an answer."""
    return UserError(
        f"{GIVE_UP} requests in a row failed ({last.reason}); see to the endpoint and run the same command again: what "
        "was answered is kept"
    )


class Interview:
    """A teacher whose answers are kept in a JSONL file, {"key", "value"} a line, under a hash of what decides them.

    Without a path they are kept in memory.
    """

    def __init__(self, teacher: Teacher, path: str | None) -> None:
        """Raises UserError where `path` is a file of another kind."""
        self.teacher, self.store = teacher, AnswerStore(path)
        self.keys: set[str] = set()  # of the answers that this run used
        self.asked = 0

    def ask(self, questions: Sequence[Question]) -> list[Answer | NoAnswer]:
        """An answer to each question, in order; the teacher is asked only what it has not answered yet.

        Raises:
            UserError: a teacher refuses the first `GIVE_UP` questions, and has answered none in an earlier run. One
                that has answered is asked on, however many it refuses.
        """
        from tqdm import tqdm

        keys = [content_key(self.teacher.key, question.messages, question.sample) for question in questions]
        first = {key: question for key, question in reversed([*zip(keys, questions, strict=True)])}
        new = [key for key in dict.fromkeys(keys) if key not in self.store]
        self.keys |= first.keys() - set(new)
        failed: dict[str, NoAnswer] = {}
        with tqdm(total=len(first), initial=len(first) - len(new), unit=" answers") as progress:

            def keep(index: int, answer: Answer | NoAnswer) -> None:
                key = new[index]
                if isinstance(answer, NoAnswer):
                    failed[key] = answer
                    if answer.refused and not self.keys and len(failed) >= GIVE_UP:
                        raise no_answers(answer)
                else:
                    about = {"row": first[key].row, "sample": first[key].sample}
                    self.store.add([(key, about | asdict(answer))])
                    self.keys.add(key)
                    self.asked += 1
                progress.update()

            if new:
                self.teacher.ask([first[key] for key in new], keep)
        return [failed.get(key) or self._kept(key) for key in keys]

    def _kept(self, key: str) -> Answer:
        fields = {name: value for name, value in self.store[key].items() if name not in ("row", "sample")}
        return Answer(**fields)

    def totals(self) -> dict[str, int]:
        """Answers that the run is made of, how many of them it asked for itself, their attempts and their tokens."""
        answers = [self._kept(key) for key in self.keys]
        return {
            "answers": len(answers),
            "asked_now": self.asked,
            "attempts": sum(answer.attempts for answer in answers),
            "prompt_tokens": sum(answer.prompt_tokens or 0 for answer in answers),
            "completion_tokens": sum(answer.completion_tokens or 0 for answer in answers),
            "without_token_counts": sum(answer.prompt_tokens is None for answer in answers),
        }


@dataclass
class Outcome:
    """What became of one question: the last answer as it was read, and every text that the teacher gave."""

    parsed: ParsedAnswer
    texts: list[str]


def until_usable(
    interview: Interview,
    questions: Sequence[Question],
    read: Callable[[list[int], list[Answer]], list[ParsedAnswer]],
    max_tries: int,
) -> list[Outcome]:
    """Ask, and where the answer cannot be used ask again, in the same chat, with the reason; `max_tries` times in all.

    Args:
        read: (indices in `questions`, their answers) -> what they say.
    """
    outcomes = [Outcome(ParsedAnswer(None), []) for _ in questions]
    asked = dict(enumerate(questions))
    for _ in range(max_tries):
        replies = dict(zip(asked, interview.ask([*asked.values()]), strict=True))
        answered = {index: answer for index, answer in replies.items() if isinstance(answer, Answer)}
        for index in replies.keys() - answered.keys():
            before = f"{fault}; asked again: " if (fault := outcomes[index].parsed.fault) else ""
            reason, lasting = before + replies[index].reason, replies[index].lasting
            outcomes[index].parsed = ParsedAnswer(None, reason, unanswered=not lasting)
        again = {}
        for index, parsed in zip(answered, read([*answered], [*answered.values()]), strict=True):
            outcomes[index].parsed = parsed
            outcomes[index].texts.append(answered[index].text)
            if parsed.fault is not None:
                question = asked[index]
                turns = [
                    {"role": "assistant", "content": final_answer(answered[index].text) or "(nothing)"},
                    {"role": "user", "content": AGAIN.format(fault=parsed.fault)},
                ]
                again[index] = replace(question, messages=question.messages + turns)
        asked = again
        if not asked:
            break
    return outcomes
