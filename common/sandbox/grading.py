"""Judge generated code: does a solution pass its tests?

    verdict = grade("def square(x): return x * x", Tests(("assert square(3) == 9",)))
    verdict.passed, verdict.error, verdict.detail  # True, "", ""

Solution and tests run in two boxes of their own (`common.sandbox.box`). Where a test calls a function of the solution,
the call travels through this process, which understands nothing of it, to the solution's box, and its reply travels
back as plain data. So the solution sees neither the tests nor what they expect, and the verdict comes from a box that
holds none of the solution's code: a solution can fail in many ways, but pass in one only.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError
from common.sandbox import box as sandbox
from common.sandbox.box import Box, BoxError, Limits

CHILD = Path(__file__).with_name("grading_child.py")


@dataclass(frozen=True)
class Tests:
    """What a solution is judged by, as Python source.

    MBPP: `Tests(asserts=tuple(row["test_list"]), setup="\\n".join(row["test_imports"]))`.
    HumanEval: `Tests(("check(candidate)",), setup=row["test"], entry_point=row["entry_point"])`.

    asserts: pieces run in order, each an assert statement or anything else that raises when the solution is wrong.
    setup: run once before them: imports, helper functions, expected values.
    entry_point: name of the function under test, bound to `candidate` as well. Give it where you know it: a function
        that is called like a built-in one (MBPP has a `sum`) is found in no other way.
    """

    asserts: tuple[str, ...]
    setup: str = ""
    entry_point: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The outcome of one solution.

    passed: every assert ran to its end, and the solution was called at least once.
    error: "" when passed, else one of
        "syntax"             the solution does not compile
        "import"             it needs a module that is not there (only the standard library is)
        "no function"        it does not define what the tests call, or the tests call nothing of it
        "assertion"          an assert was false
        "exception:NAME"     it raised an exception of that class, e.g. "exception:TypeError"
        "timeout"            it was not done within `Limits.seconds`
        "memory"             it ran into `Limits.memory_bytes`
        "output"             it returned more than `Limits.message_bytes`, or filled its folder
        "killed"             its process ended by itself or was killed, e.g. by `os._exit` or a stack overflow
        "not data"           the tests look into an object that is not plain data and stays in the solution's box,
                             e.g. at an attribute of a class of its own (see `common/sandbox/grading_child.py`)
        "tests"              the tests are at fault: they do not compile, or their setup fails
    detail: one short line for people: the assert that was false, the exception's message.
    seconds: wall time of the grading, boxes included.
    """

    passed: bool
    error: str
    detail: str
    seconds: float


def grade(solution: str, tests: Tests, limits: Limits = sandbox.DEFAULT, *, allow_unsafe: bool = False) -> Verdict:
    """Judge one solution (Python source).

    Raises:
        UserError: no sandbox works on this machine and `allow_unsafe` is false, or one that does will not start.
    """
    return grade_many([(solution, tests)], limits, allow_unsafe=allow_unsafe)[0]


def grade_many(
    pairs: Sequence[tuple[str, Tests]],
    limits: Limits = sandbox.DEFAULT,
    workers: int | None = None,
    progress: Callable[[Verdict], None] | None = None,
    *,
    allow_unsafe: bool = False,
) -> list[Verdict]:
    """Judge many solutions in parallel; the verdicts keep the order of `pairs`.

    workers: how many at once; None: the cores that this process may use.
    progress: called with each verdict in turn, in order, e.g. `lambda verdict: bar.update()`.
    KeyboardInterrupt kills every box before it is passed on.

    Raises:
        UserError: no sandbox works on this machine and `allow_unsafe` is false, or one that does will not start.
    """
    level = sandbox.level(allow_unsafe)
    stop = threading.Event()
    verdicts = []
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        try:
            for verdict in pool.map(lambda pair: _judge(*pair, limits, level, stop), pairs):
                verdicts.append(verdict)
                if progress is not None:
                    progress(verdict)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return verdicts


def _judge(solution: str, tests: Tests, limits: Limits, level: str, stop: threading.Event) -> Verdict:
    """Start both boxes, once more where one does not start, and let them come to a verdict.

    Raises:
        UserError: a box did not start the second time either.
    """
    start = time.monotonic()
    for _ in range(2):
        with Box(level, limits, stop=stop) as code, Box(level, limits, stop=stop) as judge:
            try:
                code.run(_program("run_solution", solution))
                judge.run(_program("run_tests", list(tests.asserts), tests.setup, tests.entry_point))
            except BoxError as error:  # of a machine that has too much to do
                fault = error
                continue
            outcome, error, detail = _verdict(code, judge, time.monotonic() + limits.seconds)
        return Verdict(outcome == "passed", error, detail, time.monotonic() - start)
    raise UserError(f"a sandbox did not start ({fault}); let less run beside it, and give the same command again")


def _verdict(code: Box, judge: Box, deadline: float) -> list[str]:
    """Carry messages, first from the solution, until the tests give their verdict: outcome, error, detail."""
    try:
        while True:
            judge.send(code.receive(deadline), deadline)
            message = judge.receive(deadline)
            if message.startswith(b"verdict\n"):
                if code.fault:  # it was killed, and nobody needed it any more
                    raise code.fault
                return f"{message.decode('ascii', 'replace')}\n\n\n".split("\n")[1:4]
            code.send(message, deadline)
    except BoxError as fault:
        return ["failed", fault.error, str(fault)]


def _program(function: str, *arguments: object) -> str:
    """Source of a program that calls `function` of grading_child.py."""
    return f"{_child()}\n{function}(*{arguments!a}, send, receive)\n"


@functools.cache
def _child() -> str:
    return CHILD.read_text(encoding="utf-8")
