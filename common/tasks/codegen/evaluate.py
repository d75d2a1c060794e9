"""Generated code judged: which problems, what a model answers, which tests that passes, and the figures of it."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from common import cli
from common.data import splits
from common.data.resumable import AnswerStore, content_key
from common.generation.decoding import Decoding
from common.models import adapters
from common.models.source import ModelSource
from common.sandbox import box as sandbox
from common.sandbox import grading
from common.tasks.codegen import answer as code_answer
from common.tasks.codegen import metrics, mutation, repair, source
from common.tasks.codegen import rows as code_rows
from common.tasks.codegen.metrics import JudgedSample, Samples
from common.tasks.codegen.prompt import SHOWN_PLAN_REQUEST
from common.tasks.codegen.rows import CodeProblem
from common.tasks.codegen.writer import CodeAnswer, CodeWriter, check_lengths, is_trained

WINDOW = 128  # programs whose verdicts are kept together
DIRECT, PLAN_THEN_CODE, TRIED = "direct", "plan_then_code", "tried"  # how code is asked for
TOGETHER = 32  # answers that are tried together


@dataclass(frozen=True)
class Selection:
    """Which of some problems are judged on.

    Attributes:
        data: a file of problems.
        split: "validation", "dev" or "all".
        count: a random choice of this many; None: all.
        seed: of that choice.
        skip_bad_rows: name and count bad rows, and go on without them.
    """

    data: str
    split: str = "validation"
    count: int | None = None
    seed: int = 0
    skip_bad_rows: bool = False


def choose_problems(selection: Selection) -> list[CodeProblem]:
    """The problems that are judged on.

    Raises:
        UserError: a bad row, or no problem in the part that is asked for.
    """
    problems = code_rows.read(selection.data, selection.skip_bad_rows)
    if selection.split != "all":
        problems = [problem for problem in problems if splits.part_of(problem.group) == selection.split]
        if not problems:
            raise cli.UserError(
                f"{selection.data} has no problem of the {selection.split} part; for a new file pass --split all"
            )
    if selection.count and selection.count < len(problems):
        problems = random.Random(selection.seed).sample(problems, selection.count)
    return problems


@dataclass(frozen=True)
class WriterSettings:
    """A model that is judged, and how it is loaded and asked.

    Attributes:
        source: where the model comes from.
        prompt_style: one of `writer.PROMPT_STYLES`.
        max_batch_tokens: tokens in one forward pass; None: as `load_within_memory` chooses.
        auto_fit: where memory is short, take settings that fit.
    """

    source: ModelSource
    prompt_style: str
    max_batch_tokens: int | None
    auto_fit: bool = False

    def identity(self) -> list[Any]:
        """What tells its answers from those of another model, as JSON."""
        return [*adapters.identity(self.source), self.prompt_style]

    def load(self) -> CodeWriter:
        """The model, ready to write."""
        return CodeWriter.load(
            self.source, self.max_batch_tokens, prompt_style=self.prompt_style, auto_fit=self.auto_fit
        )


@dataclass(frozen=True)
class Evaluation:
    """What every model is judged by, and where its answers and verdicts are kept.

    Attributes:
        ks: the k of pass@k, each at most `decoding.num_samples`.
        store: answers and verdicts that are there are not made again.
        allow_unsafe: where no sandbox works, run code without one.
        seed: of the bootstrap.
        keep_main: run answers as they are written, with what they do at their top level (`source.without_usage`).
    """

    problems: Sequence[CodeProblem]
    decoding: Decoding
    ks: Sequence[int]
    store: AnswerStore
    allow_unsafe: bool = False
    seed: int = 0
    keep_main: bool = False

    @property
    def groups(self) -> list[str]:
        """The group hash of each problem."""
        return [problem.group for problem in self.problems]

    def measure(
        self, settings: WriterSettings, plan_then_code: bool = False, tries: int = 1
    ) -> tuple[dict[str, Any], list[list[JudgedSample]]]:
        """(figures of one model, its judged direct answers [problem][sample], which `difference` compares).

        Args:
            plan_then_code: also judge code that is written after a plan, paired with direct answers.
            tries: if above 1, also judge code that is asked for again where it fails the first test of its problem.
        """
        load = functools.cache(settings.load)  # one model for all, if any is needed
        answers = self.write_answers(settings, DIRECT, load)
        direct = self.judge(answers)
        entry = self.figures(direct)
        if plan_then_code:
            planned = self.judge(self.write_answers(settings, PLAN_THEN_CODE, load))
            entry[PLAN_THEN_CODE] = self.figures(planned)
            entry["plan_difference"] = self.difference(planned, direct)
        if tries > 1:
            tried = self.judge(self.try_again(settings, answers, tries, load))
            entry[TRIED] = self.figures(tried)
            entry["tried_difference"] = self.difference(tried, direct)
        return entry, direct

    def figures(self, judged: Samples) -> dict[str, Any]:
        """All figures of one mode of a model, and its commonest failures."""
        measured = metrics.evaluate(judged, self.ks, self.groups, self.seed)
        return measured | {"failures": metrics.commonest_failures(self.problems, judged)}

    def difference(self, a: Samples, b: Samples) -> dict[str, Any]:
        """pass@k of a minus that of b, paired, with intervals."""
        return metrics.difference(a, b, self.ks, self.groups, self.seed)

    def judge(self, answers: Sequence[Sequence[dict]]) -> list[list[JudgedSample]]:
        """The answers of one model in one mode, [problem][sample], judged."""
        pairs = [(problem, answer) for problem, row in zip(self.problems, answers, strict=True) for answer in row]
        self.run_tests([(problem, self.program(answer["code"])) for problem, answer in pairs])
        lints = iter(metrics.lints([answer["code"] for _, answer in pairs]))

        def judged(problem: CodeProblem, answer: dict) -> JudgedSample:
            code, verdict = answer["code"], self.store[verdict_key(problem, self.program(answer["code"]))]
            fault = code_answer.compile_error(code)
            ran_out = not answer["finished"] and (fault or answer.get("cut", False))
            error = "unfinished" if ran_out and verdict["error"] else verdict["error"]
            detail = fault or verdict["detail"]
            return JudgedSample(code, answer["plan"], error, detail, fault is None, next(lints), verdict["share"])

        return [
            [judged(problem, answer) for answer in row] for problem, row in zip(self.problems, answers, strict=True)
        ]

    def program(self, code: str) -> str:
        """What of an answer's code is run."""
        return code if self.keep_main else source.without_usage(code)

    def write_answers(self, settings: WriterSettings, mode: str, load: Callable[[], CodeWriter]) -> list[list[dict]]:
        """The answers of a model, as `CodeAnswer` in JSON; only those that are not in the store are made."""
        parts: list[Any] = ["answer", settings.identity(), mode, self.decoding.as_dict()]
        shown = [SHOWN_PLAN_REQUEST] if mode == PLAN_THEN_CODE and not is_trained(settings.source.model_dir) else []
        keys = [content_key(*parts, problem.prompt, *shown) for problem in self.problems]
        missing = [(key, problem.prompt) for key, problem in zip(keys, self.problems, strict=True)
                   if key not in self.store]  # fmt: skip
        if missing:
            check_lengths(settings.source, [prompt for _, prompt in missing], self.decoding.max_new_tokens)
            writer = load()
            with progress_bar(len(missing), f"{settings.source.model_dir}, {mode}") as progress:
                tasks = [prompt for _, prompt in missing]
                for index, answers in writer.write_each(tasks, self.decoding, mode == PLAN_THEN_CODE):
                    self.store.add([(missing[index][0], [asdict(answer) for answer in answers])])
                    progress.update()
        return [self.store[key] for key in keys]

    def try_again(
        self, settings: WriterSettings, first: Sequence[Sequence[dict]], tries: int, load: Callable[[], CodeWriter]
    ) -> list[list[dict]]:
        """The first answers, each asked for again while it fails the first test of its problem, `tries` in all."""
        parts = ["answer", settings.identity(), TRIED, tries, self.decoding.as_dict()]
        parts += ["keep_main"] if self.keep_main else []  # another verdict, and so other answers
        keys = [content_key(*parts, problem.prompt, asdict(problem.graded_by())) for problem in self.problems]
        missing = [index for index, key in enumerate(keys) if key not in self.store]
        if missing:
            writer = load()
            with progress_bar(len(missing), f"{settings.source.model_dir}, {TRIED}") as progress:
                for start in range(0, len(missing), TOGETHER):
                    window = missing[start : start + TOGETHER]
                    trials = repair.write_until_passing(
                        writer,
                        [self.problems[index].prompt for index in window],
                        self.decoding,
                        [first_test(self.problems[index]) for index in window],
                        tries,
                        first=[CodeAnswer(**first[index][0]) for index in window],
                        program=self.program,
                        allow_unsafe=self.allow_unsafe,
                    )
                    self.store.add(
                        (keys[index], [asdict(of_task[-1].answer)])
                        for index, of_task in zip(window, trials, strict=True)
                    )
                    progress.update(len(window))
        return [self.store[key] for key in keys]

    def run_tests(self, codes: Sequence[tuple[CodeProblem, str]]) -> None:
        """Put the verdict on every program into the store; the same program is run once only."""
        missing = {verdict_key(problem, code): (code, problem.graded_by()) for problem, code in codes}
        waiting = [key for key in missing if key not in self.store]
        with progress_bar(len(waiting), "running tests") as progress:
            for start in range(0, len(waiting), WINDOW):
                window = waiting[start : start + WINDOW]
                pairs = [missing[key] for key in window]
                verdicts = self.grade(pairs, progress)
                shares = self.passing_shares(pairs, verdicts)
                self.store.add(
                    (key, {"error": verdict.error, "detail": verdict.detail, "share": share})
                    for key, verdict, share in zip(window, verdicts, shares, strict=True)
                )

    def passing_shares(
        self, pairs: Sequence[tuple[str, grading.Tests]], verdicts: Sequence[grading.Verdict]
    ) -> list[float]:
        """The share of its tests that each solution passes: none where it does not run to an end (time, memory)."""
        shares = [float(verdict.passed) for verdict in verdicts]
        single_tests = [
            (index, (code, replace(tests, asserts=(test,))))
            for index, ((code, tests), verdict) in enumerate(zip(pairs, verdicts, strict=True))
            if len(tests.asserts) > 1 and (verdict.error == "assertion" or verdict.error.startswith("exception"))
            for test in tests.asserts
        ]
        of_single = self.grade([pair for _, pair in single_tests])
        for (index, _), verdict in zip(single_tests, of_single, strict=True):
            shares[index] += verdict.passed / len(pairs[index][1].asserts)
        return shares

    def grade(self, pairs: Sequence[tuple[str, grading.Tests]], progress=None) -> list[grading.Verdict]:
        """Verdicts of the sandbox."""
        return _grade(pairs, self.allow_unsafe, progress)


def first_test(problem: CodeProblem) -> grading.Tests:
    """The test that a user would give with the task: the problem's first."""
    return replace(problem.graded_by(), asserts=problem.tests[:1])


def verdict_key(problem: CodeProblem, code: str) -> str:
    """Where the store has the verdict on `code`: {"error", "detail", "share" of the tests that pass}."""
    return content_key("verdict", code, asdict(problem.graded_by()))


def progress_bar(total: int, what: str):
    """A bar that counts programs."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=" programs", disable=not total)


def _grade(pairs: Sequence[tuple[str, grading.Tests]], allow_unsafe: bool, progress=None) -> list[grading.Verdict]:
    on_verdict = None if progress is None else lambda verdict: progress.update()
    return grading.grade_many(pairs, progress=on_verdict, allow_unsafe=allow_unsafe)


# The tests themselves.

SOLUTIONS: dict[str, Callable[[CodeProblem], list[str]]] = {  # the first must pass, the others fail
    "reference": lambda problem: [problem.solution],
    "pass": lambda problem: [mutation.with_body(problem.solution, problem.entry_point, "pass")],
    "constant": lambda problem: [
        mutation.with_body(problem.solution, problem.entry_point, f"return {constant}")
        for constant in mutation.CONSTANTS
    ],
}


def check_tests(problems: Sequence[CodeProblem], allow_unsafe: bool = False) -> dict[str, Any]:
    """Which reference solutions fail their tests, and which do-nothing solutions pass them.

    Returns:
        For each kind of `SOLUTIONS` {"passed", "of", "unexpected": [{"task_id", "code", "error", "detail"}]}; "sandbox"
        and "seconds".
    """
    result: dict[str, Any] = {"sandbox": sandbox.level(allow_unsafe)}
    started = time.perf_counter()
    for kind, solutions in SOLUTIONS.items():
        pairs = [(problem, code) for problem in problems for code in solutions(problem)]
        with progress_bar(len(pairs), kind) as progress:
            verdicts = _grade([(code, problem.graded_by()) for problem, code in pairs], allow_unsafe, progress)
        passed = {problem.task_id for (problem, _), verdict in zip(pairs, verdicts, strict=True) if verdict.passed}
        unexpected = [
            {"task_id": problem.task_id, "code": code, "error": verdict.error, "detail": verdict.detail}
            for (problem, code), verdict in zip(pairs, verdicts, strict=True)
            if verdict.passed != (kind == "reference")
        ]
        result[kind] = {"passed": len(passed), "of": len(problems), "unexpected": unexpected}
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result
