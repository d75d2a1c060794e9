"""The tests of EvalPlus (Liu et al. 2023, arXiv:2305.01210) for HumanEval and MBPP, as the sandbox can run them.

They come in two forms: as Python source that wants numpy, which the sandbox does not have, and as inputs whose results
are those of the canonical solution.
"""

from __future__ import annotations

import ast
import re

NUMPY = re.compile(r"^import numpy(?: as np)?[ \t]*$", re.MULTILINE)
STAND_IN = """
class np:  # as much of numpy as these tests use
    ndarray, float32, float64, inf, nan = (), float, float, float("inf"), float("nan")

    @staticmethod
    def allclose(a, b, rtol=1e-05, atol=1e-08):
        if isinstance(b, (list, tuple)):
            pairs = zip(a, b) if isinstance(a, (list, tuple)) and len(a) == len(b) else [(0, 1)]
            return all(np.allclose(x, y, rtol, atol) for x, y in pairs)
        return a == b or abs(a - b) <= atol + rtol * abs(b)
"""
COMPARED = """
import copy


def _check(inputs, atol):
    for arguments in inputs:
        try:
            expected = {name}(*copy.deepcopy(arguments))
        except Exception:  # not an input of this function, as JSON wrote it
            continue
        got = candidate(*copy.deepcopy(arguments))
        assert got == expected or np.allclose(got, expected, 1e-07, atol or 1e-06), f"{name}{{tuple(arguments)}}"
"""


def without_numpy(source: str) -> str:
    """Tests as source, with a stand-in for what they use of numpy."""
    return NUMPY.sub(lambda _: STAND_IN, source, count=1)


def split_source(source: str) -> tuple[str, str]:
    """(setup, the test) of tests as source: the last statement is the one that judges."""
    source = without_numpy(source)
    last = ast.parse(source).body[-1]
    lines = source.splitlines()
    return "\n".join(lines[: last.lineno - 1]), "\n".join(lines[last.lineno - 1 :])


def is_of_inputs(row: dict) -> bool:
    """Whether a row has inputs in place of tests."""
    return isinstance(row.get("base_input"), list) and isinstance(row.get("plus_input"), list) and "test" not in row


def tests_of_inputs(row: dict, solution: str) -> tuple[str, list[str]]:
    """(setup, tests) of a row's inputs: what the canonical solution makes of each is what is right.

    The test of HumanEval's or MBPP's own inputs comes first, that of the further ones second.
    """
    setup = solution + "\n" + STAND_IN + COMPARED.format(name=row["entry_point"])
    atol = float(row.get("atol") or 0)
    names = "inf, nan = np.inf, np.nan\n"  # as `repr` writes what JSON has no literal for
    return names.join([setup, ""]), [
        f"_check({row[key]!r}, {atol})" for key in ("base_input", "plus_input") if row[key]
    ]
