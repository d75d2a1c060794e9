"""Code that is tried: written, run on its tests in the sandbox, and asked for again with what went wrong."""

from __future__ import annotations

from collections.abc import Sequence
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
    writer: CodeWriter, task: str, decoding: Decoding, tests: Sequence[str], tries: int, allow_unsafe: bool = False
) -> list[Trial]:
    """The tries at a task, of which the last one passes its tests, or is number `tries`.

    Args:
        decoding: of one answer; each further try has the next seed.
        tests: assert statements, which the model is shown.
        allow_unsafe: where no sandbox works, run code without one.
    """
    judged_by = grading.Tests(tuple(tests))
    asked = with_tests(task, tests)
    trials: list[Trial] = []
    for number in range(tries):
        how = replace(decoding, num_samples=1, seed=decoding.seed + number)
        if trials and not writer.style.chat:
            how = replace(how, temperature=how.temperature or TEMPERATURE)
        elif trials:
            last = trials[-1]
            asked = repair_prompt(with_tests(task, tests), last.answer.code, described(last.verdict))
        ((answer,),) = writer.write([asked], how)
        verdict = grading.grade(source.without_usage(answer.code), judged_by, allow_unsafe=allow_unsafe)
        trials.append(Trial(answer, verdict))
        if verdict.passed:
            break
    return trials


def described(verdict: grading.Verdict) -> str:
    """What went wrong, in words for the model and the user."""
    kind = verdict.error.removeprefix("exception:")
    return f"{kind}: {verdict.detail}" if verdict.detail else kind
