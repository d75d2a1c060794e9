"""Code that is tried: written, run on its tests in the sandbox, and asked for again with what went wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from common.generation.decoding import Decoding
from common.sandbox import grading
from common.tasks.codegen import source
from common.tasks.codegen.prompt import repair_prompt, with_tests
from common.tasks.codegen.writer import CodeAnswer, CodeWriter

TEMPERATURE = 0.8  # of another try of a model that takes no turns, which cannot be told what went wrong


@dataclass(frozen=True)
class Trial:
    """One try: the answer, and what its tests said."""

    answer: CodeAnswer
    verdict: grading.Verdict


def write_until_passing(
    writer: CodeWriter,
    tasks: Sequence[str],
    decoding: Decoding,
    tests: Sequence[grading.Tests],
    tries: int,
    *,
    first: Sequence[CodeAnswer] | None = None,
    program: Callable[[str], str] = source.without_usage,
    allow_unsafe: bool = False,
) -> list[list[Trial]]:
    """The tries at each task, of which the last one passes its tests, or is number `tries`.

    Args:
        decoding: of one answer; each further try has the next seed.
        tests: of each task, which the model is shown.
        first: the first tries, where they are there already.
        program: what of an answer's code is run.
        allow_unsafe: where no sandbox works, run code without one.
    """
    trials: list[list[Trial]] = [[] for _ in tasks]
    waiting = list(range(len(tasks)))
    for number in range(tries):
        if number == 0 and first is not None:
            answers = list(first)
        else:
            asked = [_request(writer, tasks[index], tests[index], trials[index]) for index in waiting]
            how = replace(decoding, num_samples=1, seed=decoding.seed + number)
            if number and not writer.style.chat:
                how = replace(how, temperature=how.temperature or TEMPERATURE)
            answers = [answer for (answer,) in writer.write(asked, how)]
        pairs = [(program(answer.code), tests[index]) for index, answer in zip(waiting, answers, strict=True)]
        verdicts = grading.grade_many(pairs, allow_unsafe=allow_unsafe)
        for index, answer, verdict in zip(waiting, answers, verdicts, strict=True):
            trials[index].append(Trial(answer, verdict))
        waiting = [index for index in waiting if not trials[index][-1].verdict.passed]
        if not waiting:
            break
    return trials


def _request(writer: CodeWriter, task: str, tests: grading.Tests, trials: Sequence[Trial]) -> str:
    """What the model is asked: the task with its tests, and after a failed try what went wrong."""
    asked = with_tests(task, tests.asserts)
    if not trials or not writer.style.chat:
        return asked
    return repair_prompt(asked, trials[-1].answer.code, described(trials[-1].verdict))


def described(verdict: grading.Verdict) -> str:
    """What went wrong, in words for the model and the user."""
    kind = verdict.error.removeprefix("exception:")
    return f"{kind}: {verdict.detail}" if verdict.detail else kind
