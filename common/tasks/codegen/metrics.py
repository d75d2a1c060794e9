"""What answers to programming problems are measured by: pass@k, and the shares that compile, lint and pass tests."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import UserError

if TYPE_CHECKING:
    from common.evaluation.bootstrap import Interval
    from common.tasks.codegen.rows import CodeProblem

LINT_RULES = "E4,E7,E9,F"  # ruff's own default: errors and what pyflakes finds, not taste
SHOWN_FAILURES, SHOWN_EXAMPLES = 8, 3


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of `k` samples passes, of which `c` out of `n` did: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (arXiv:2107.03374), eq. 1, in the form of a product that does not
    overflow.

    Raises:
        ValueError: not 0 <= c <= n, or not 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {c} right ones among {n} samples is not defined")
    none = 1.0
    for i in range(n - c + 1, n + 1):
        none *= max(0.0, 1 - k / i)
    return 1 - none


def lints(codes: Sequence[str]) -> list[bool]:
    """For each program whether there is one and ruff finds nothing wrong with it (`LINT_RULES`, no other settings).

    Raises:
        UserError: ruff is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="codegen_lint_") as folder:
        for number, code in enumerate(codes):
            Path(folder, f"{number}.py").write_text(code + "\n", encoding="utf-8", errors="replace")
        command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--quiet", "--exit-zero"]
        command += ["--ignore-noqa", "--select", LINT_RULES, "--output-format", "json", folder]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            reason = (ran.stderr.strip() or "no reason given").splitlines()[-1]
            raise UserError(f"linting needs ruff, which failed ({reason}); pip install -r requirements.txt")
        faults = json.loads(ran.stdout)
    faulty = {int(Path(fault["filename"]).stem) for fault in faults}
    faulty |= {number for number, code in enumerate(codes) if not code.strip()}
    return [number not in faulty for number in range(len(codes))]


@dataclass(frozen=True)
class JudgedSample:
    """One sample of one problem.

    Attributes:
        code: what was judged.
        plan: the plan that it follows, or "".
        error: "" for a pass, else the kind of failure: those of `grading.Verdict`, and "unfinished" for an answer
            that ran out of tokens and does not compile.
        detail: one line on the failure.
        compiles, lints: whether it does.
        tests: the share of its problem's tests that it passes, each run alone; 0 where the run of all of them did not
            come to its end (time, memory), whatever passed before.
    """

    code: str
    plan: str
    error: str
    detail: str
    compiles: bool
    lints: bool
    tests: float

    @property
    def passed(self) -> bool:
        return not self.error


Samples = Sequence[Sequence[JudgedSample]]  # [problem][sample]


def evaluate(judged: Samples, ks: Sequence[int], groups: Sequence[str], seed: int) -> dict[str, Any]:
    """All figures of one model in one mode, from its samples [problem][sample].

    Returns:
        `pass_at_<k>`, `compile_rate`, `lint_rate`, `test_pass_rate` (the share of its tests that a sample passes),
        each the mean over problems, however many tests they have, with a 95 % interval (bootstrap of groups),
        `errors` {kind: samples}, `samples` a problem, `groups` and `replicates`.
    """

    from common.evaluation import bootstrap

    def interval(values: Sequence[float]) -> Interval:
        return bootstrap.mean_interval(values, groups, seed)

    def share(key: str) -> Interval:
        return interval([sum(getattr(one, key) for one in row) / len(row) for row in judged])

    counts = Counter(one.error or "passed" for row in judged for one in row)
    return {
        **{f"pass_at_{k}": interval(values) for k, values in passes(judged, ks).items()},
        "compile_rate": share("compiles"),
        "lint_rate": share("lints"),
        "test_pass_rate": share("tests"),
        "errors": dict(counts.most_common()),
        "samples": len(judged[0]),
        "groups": len(set(groups)),
        "replicates": bootstrap.REPLICATES,
    }


def passes(judged: Samples, ks: Sequence[int]) -> dict[int, list[float]]:
    """pass@k of every problem, for each of `ks`."""
    return {k: [pass_at_k(len(row), sum(one.passed for one in row), k) for row in judged] for k in ks}


def difference(
    a: Samples,
    b: Samples,
    ks: Sequence[int],
    groups: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """`pass_at_<k>` of a minus that of b on the same problems, paired, each with its interval."""
    from common.evaluation import bootstrap

    ours, theirs = passes(a, ks), passes(b, ks)
    return {
        f"pass_at_{k}": bootstrap.mean_interval(
            [one - other for one, other in zip(ours[k], theirs[k], strict=True)], groups, seed
        )
        for k in ks
    }


def commonest_failures(problems: Sequence[CodeProblem], judged: Samples) -> list[dict[str, Any]]:
    """Kinds of failure by frequency: `error`, `count` and `examples` with `task_id`, `prompt`, `code`, `detail`."""
    failures: dict[str, list[dict[str, str]]] = {}
    for problem, row in zip(problems, judged, strict=True):
        for one in row:
            if one.error:
                example = {"task_id": problem.task_id, "prompt": problem.prompt, "code": one.code, "detail": one.detail}
                failures.setdefault(one.error, []).append(example)
    often = sorted(failures.items(), key=lambda item: -len(item[1]))[:SHOWN_FAILURES]
    return [
        {"error": error, "count": len(examples), "examples": examples[:SHOWN_EXAMPLES]} for error, examples in often
    ]
