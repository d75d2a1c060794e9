"""Questions to a teacher and its answers: kept as they come, so that nothing is asked twice; repeated where unusable.

A teacher is an endpoint (`teacher_client`), a local model (`teacher_local`) or its label ranker (`teacher_labels`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from common.data.resumable import AnswerStore, content_key
from common.teachers.tasks import AGAIN, Reading

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Request:
    """The turns of a chat that a teacher is to answer.

    Attributes:
        row: the number of the row that it is about, for the raw answers.
        sample: the how-manieth answer to the same chat.
    """

    row: int
    messages: Messages
    sample: int = 0


@dataclass(frozen=True)
class Answer:
    """A raw answer and what is known of it; token counts are None where the teacher does not tell.

    Attributes:
        finished: it ended by itself, not at the token budget.
        attempts: how often it was tried until it came.
        top_logprobs: the likeliest first tokens with their log-probabilities, where they were asked for.
        probabilities: the ranker's, by label.
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
    """Why there is none; `lasting`: as there will be none the next time. It is not kept: the next run asks again."""

    reason: str
    lasting: bool = False


class Teacher(Protocol):
    """What `Interview` needs: `key` is all that decides an answer besides the question, as JSON."""

    key: Any

    def ask(self, requests: Sequence[Request], keep: Callable[[int, Answer | NoAnswer], None]) -> None:
        """Call `keep` with the place of every request and what came of it, in any order, as soon as it is there."""


class Interview:
    """A teacher whose answers are kept in a JSONL file, {"key", "value"} a line, under a hash of what decides them."""

    def __init__(self, teacher: Teacher, path: str) -> None:
        """Raises UserError where `path` is a file of another kind."""
        self.teacher, self.store = teacher, AnswerStore(path)
        self.keys: set[str] = set()  # of the answers that this run used
        self.asked = 0

    def ask(self, requests: Sequence[Request]) -> list[Answer | NoAnswer]:
        """An answer to each request, in order; the teacher is asked only what it has not answered yet."""
        from tqdm import tqdm

        keys = [content_key(self.teacher.key, request.messages, request.sample) for request in requests]
        first = {key: request for key, request in reversed([*zip(keys, requests, strict=True)])}
        new = [key for key in dict.fromkeys(keys) if key not in self.store]
        failed: dict[str, NoAnswer] = {}
        with tqdm(total=len(first), initial=len(first) - len(new), unit=" answers") as progress:

            def keep(place: int, answer: Answer | NoAnswer) -> None:
                key = new[place]
                if isinstance(answer, NoAnswer):
                    failed[key] = answer
                else:
                    about = {"row": first[key].row, "sample": first[key].sample}
                    self.store.add([(key, about | asdict(answer))])
                    self.asked += 1
                progress.update()

            if new:
                self.teacher.ask([first[key] for key in new], keep)
        self.keys |= first.keys() - failed.keys()
        return [failed.get(key) or self._kept(key) for key in keys]

    def _kept(self, key: str) -> Answer:
        value = {name: found for name, found in self.store[key].items() if name not in ("row", "sample")}
        return Answer(**value)

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
    """What became of one question: the last reading, and every text that the teacher gave."""

    reading: Reading
    texts: list[str]


def until_usable(
    interview: Interview,
    requests: Sequence[Request],
    read: Callable[[list[int], list[Answer]], list[Reading]],
    max_tries: int,
) -> list[Outcome]:
    """Ask, and where the answer cannot be used ask again, in the same chat, with the reason; `max_tries` times in all.

    Args:
        read: (places in `requests`, their answers) -> readings.
    """
    outcomes = [Outcome(Reading(None), []) for _ in requests]
    asked = dict(enumerate(requests))
    for _ in range(max_tries):
        found = dict(zip(asked, interview.ask([*asked.values()]), strict=True))
        answered = {place: answer for place, answer in found.items() if isinstance(answer, Answer)}
        for place in found.keys() - answered.keys():
            before = f"{fault}; asked again: " if (fault := outcomes[place].reading.fault) else ""
            reason, lasting = before + found[place].reason, found[place].lasting
            outcomes[place].reading = Reading(None, reason, unanswered=not lasting)
        again = {}
        for place, reading in zip(answered, read([*answered], [*answered.values()]), strict=True):
            outcomes[place].reading = reading
            outcomes[place].texts.append(answered[place].text)
            if reading.fault is not None:
                request = asked[place]
                turns = [
                    {"role": "assistant", "content": answered[place].text or "(nothing)"},
                    {"role": "user", "content": AGAIN.format(fault=reading.fault)},
                ]
                again[place] = Request(request.row, request.messages + turns, request.sample)
        asked = again
        if not asked:
            break
    return outcomes
