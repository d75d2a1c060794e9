"""EvalPlus' files of HumanEval+ and MBPP+ in the forms that they come in."""

from __future__ import annotations

import pytest
from support.inputs import write_rows

from common.cli import UserError
from common.sandbox import grading
from common.tasks.codegen import rows as code_rows

HELPERS = """import numpy as np

def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64 or x.dtype == np.float32
    return False

def assertion(out, exp, atol):
    exact_match = out == exp
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if not exact_match and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert exact_match

"""
STUB = 'def halves(xs: list) -> list:\n    """ Half of each of xs """\n'
BODY = "    return [x / 2 for x in xs]\n"
HUMAN_EVAL = {"task_id": "HumanEval/900", "prompt": STUB, "canonical_solution": BODY, "entry_point": "halves"}
CHECK = (
    HELPERS + "def check(candidate):\n    inputs = [[[1, 2]], [[]]]\n    results = [[0.5, 1.0], []]\n"
    "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n        assertion(candidate(*inp), exp, 0)\n"
)
MBPP = {
    "task_id": 901,
    "prompt": "Write a function to halve the items of a list.",
    "code": "def halves(xs):\n" + BODY,
    "test_imports": [],
    "test_list": ["assert halves([2]) == [1]"],
    "test": HELPERS + "inputs = [[[1, 2]], [[3]]]\nresults = [[0.5, 1.0], [1.5]]\n"
    "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(halves(*inp), exp, 0)\n",
}
ROWS = {
    "HumanEval+, tests": HUMAN_EVAL | {"test": CHECK},
    "HumanEval+, inputs": HUMAN_EVAL | {"base_input": [[[1, 2]]], "plus_input": [[[3, float("inf")]], [3]], "atol": 0},
    "MBPP+": MBPP,
}
ANSWERS = {  # and whether it is right
    "def halves(xs):\n    return [x / 2 for x in xs]": True,
    "def halves(xs):\n    return [x / 2 + 1e-9 for x in xs]": True,  # within the tolerance
    "def halves(xs):\n    return [x // 2 for x in xs]": False,
    "def halves(xs):\n    return [0.5, 1.0]": False,  # right on the first input
    "def halves(xs):\n    xs[:] = [x / 2 for x in xs]\n    return xs": True,
}


@pytest.mark.processes
@pytest.mark.parametrize("name", ROWS)
def test_files_of_evalplus_judge(tmp_path, name):
    (problem,) = code_rows.read(write_rows(tmp_path / "rows.jsonl", [ROWS[name]]))
    assert problem.entry_point == "halves"
    pairs = [(code, problem.graded_by()) for code in (problem.solution, *ANSWERS)]
    assert [verdict.passed for verdict in grading.grade_many(pairs)] == [True, *ANSWERS.values()]


def test_the_task_is_asked_as_without_the_further_tests(tmp_path):
    plus, plain = code_rows.problems_of([MBPP, {key: value for key, value in MBPP.items() if key != "test"}])
    assert plus.prompt == plain.prompt and plus.tests != plain.tests
    human = code_rows.problems_of([ROWS["HumanEval+, inputs"]])[0]
    assert human.prompt == STUB and len(human.tests) == 2


def test_rows_without_any_tests_are_bad(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [HUMAN_EVAL])
    with pytest.raises(UserError, match="key 'test' is missing"):
        code_rows.read(path)
