"""Problems, their groups and plans, their mutants, made-up families, pass@k."""

from __future__ import annotations

import ast
import gzip
import itertools
import json
import math

import pytest
from support.inputs import SHARED, write_rows

from common.cli import UserError
from common.data import resumable, splits
from common.sandbox import grading
from common.tasks.codegen import metrics as code_metrics
from common.tasks.codegen import mutation as code_mutation
from common.tasks.codegen import plans
from common.tasks.codegen import report as code_report
from common.tasks.codegen import rows as code_rows
from common.tasks.codegen import synthesis as code_synthesis

CODE = "def add(a, b):\n    return a + b"
STUB = 'from typing import List\n\n\ndef first(items: List[int]) -> int:\n    """ The first of items\n    """\n'


MBPP = {
    "task_id": 2,
    "prompt": "Write a function to add two numbers.",
    "code": CODE + " ",
    "test_imports": ["import math"],
    "test_list": ["assert add(1, 2) == 3", "assert math.isclose(add(0.5, 1), 1.5)"],
}
HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": STUB,
    "canonical_solution": "    return items[0]\n",
    "test": "def check(candidate):\n    assert candidate([3, 4]) == 3\n",
    "entry_point": "first",
}
INPUTS = {key: value for key, value in HUMAN_EVAL.items() if key != "test"} | {"base_input": [[[1]]], "plus_input": []}
OWN = {"prompt": "Square n.", "solution": "def pow(n):\n    return n * n", "tests": ["assert pow(3) == 9"]}


def test_formats_become_problems_that_pass_their_tests(tmp_path):
    path = tmp_path / "mixed.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in (MBPP, HUMAN_EVAL, OWN)).encode()))
    mbpp, human, own = problems = code_rows.read(path)
    assert mbpp.prompt == "Write a function to add two numbers.\nIt must pass this test:\nassert add(1, 2) == 3"
    assert (mbpp.task_id, mbpp.setup, mbpp.entry_point) == ("2", "import math", "add")
    assert human.prompt == STUB and human.solution == STUB + "    return items[0]"
    assert (own.task_id, own.tests, own.setup) == ("3", ("assert pow(3) == 9",), "")
    assert own.entry_point == "pow"  # not the built-in one
    assert [verdict.error for verdict in grading.grade_many([(p.solution, p.graded_by()) for p in problems])] == [
        ""
    ] * 3
    text = OWN | {"tests": "from math import inf\nassert pow(3) == 9 < inf\nassert pow(2) == 4"}
    assert code_rows.problems_of([text])[0].graded_by() == grading.Tests(
        ("assert pow(3) == 9 < inf", "assert pow(2) == 4"), "from math import inf", "pow"
    )
    listed = OWN | {"setup": ["import math", "import re"], "group": None, "plan": None}
    (problem,) = code_rows.read(write_rows(tmp_path / "listed.jsonl", [listed]))
    assert problem.setup == "import math\nimport re" and (problem.group, problem.plan) == (own.group, own.plan)
    again = code_rows.read(write_rows(tmp_path / "rows.jsonl", [problem.row() for problem in problems]))
    assert again == problems


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "x"}, "no known format"),
        (OWN | {"tests": "assert ("}, "'tests' must be a list of texts"),
        (OWN | {"tests": [1]}, "'tests' must be a list of texts"),
        (OWN | {"tests": "import math"}, "it has no tests"),
        (OWN | {"tests": []}, "it has no tests"),
        (OWN | {"tests": ["assert ("]}, "not Python"),
        (OWN | {"solution": "def f(:"}, "not Python"),
        (OWN | {"solution": "word " * 4000}, "not Python"),  # a MemoryError of the parser
        (OWN | {"plan": "Square it."}, "'plan' must be a list of texts"),
        (OWN | {"setup": 3}, "'setup' must be a text or a list of texts"),
        (OWN | {"setup": [3]}, "'setup' must be a text or a list of texts"),
        (OWN | {"setup": 3, "tests": "assert pow(3) == 9"}, "'setup' must be a text or a list of texts"),
        (OWN | {"setup": "import ("}, "not Python"),
        (OWN | {"entry_point": 3}, "'entry_point' must be a text"),
        (OWN | {"group": "strings"}, "group 'strings' is not the 16 hex digits that codegen_prepare.py writes"),
        (OWN | {"group": 1234567890123456}, "group 1234567890123456 is not the 16 hex digits"),
        (MBPP | {"plan": "Sort it."}, "'plan' must be a list of texts"),
        (MBPP | {"test_imports": "import math"}, "'test_imports' must be a list of texts"),
        (MBPP | {"test_setup_code": 3}, "'test_setup_code' must be a text"),
        (HUMAN_EVAL | {"plan": 3}, "'plan' must be a list of texts"),
        (INPUTS | {"atol": "small"}, "'atol' must be a number"),
        ({key: value for key, value in MBPP.items() if key != "prompt"}, "key 'prompt' is missing"),
        (HUMAN_EVAL | {"test": ""}, "'test' must be a non-empty string"),
    ],
)
def test_bad_problems_are_named(tmp_path, row, fault):
    path = write_rows(tmp_path / "rows.jsonl", [OWN, row])
    with pytest.raises(UserError, match=f"rows.jsonl, line 2: {fault}"):
        code_rows.read(path)
    assert len(code_rows.read(path, skip_bad_rows=True)) == 1


def test_near_duplicates_are_one_group():
    loop = "def {0}(x):\n    {1}t = 0\n    for y in x:\n        t += y\n    return t"
    solutions = {
        "Write a function to find the sum of a list.": "def f(x):\n    return sum(x)",
        "Find the Sum of the given list": loop.format("f", ""),
        "Total the values.": loop.format("total", "'Adds.'\n    ").replace("y", "value"),
        "Find the product of a list.": "import math\ndef f(x):\n    return math.prod(x)",
    }
    for order in itertools.permutations(solutions):
        rows = [{"prompt": prompt, "solution": solutions[prompt], "tests": ["f"]} for prompt in order]
        groups = {problem.prompt: problem.group for problem in code_rows.problems_of(rows)}
        one, two, three, four = (groups[prompt] for prompt in solutions)
        assert one == two == three != four
        assert one == splits.group_hash("in words: list sum") and four == splits.group_hash("in words: list product")


def test_plans_follow_the_solution():
    solution = (
        "import math\n\ndef help(x):\n    return x\n\ndef f(xs):\n    '''Doc.'''\n    total = 0\n    for x in xs:\n"
        "        if x > 2:\n            total += x\n        else:\n            total -= 1\n    return math.sqrt(total)"
    )
    assert plans.steps_of(solution) == [
        "Use the module math.",
        "Write a helper help.",
        "Set total to 0.",
        "For each x in xs:",
        "  If x > 2:",
        "    Add x to total.",
        "  Otherwise:",
        "    Subtract 1 from total.",
        "Return math.sqrt(total).",
    ]
    assert plans.steps_of(solution, "help")[-1] == "Return x."


@pytest.mark.processes
def test_real_problems_are_read_and_split():
    path = SHARED / "data/mbpp/sanitized-mbpp.json"
    if not path.is_file():
        pytest.skip("needs the MBPP file")
    problems = code_rows.read(path)
    assert len(problems) == 427
    assert all(problem.plan and code_mutation.mutants(problem.solution) for problem in problems)
    parts = {problem.group: splits.part_of(problem.group) for problem in problems}
    assert len(parts) < 427 and set(parts.values()) == set(splits.PARTS)


# Mutants.


def test_mutants_are_one_change_of_the_text():
    source = "def f(a, b=2):\n  # a remark\n  return [x for x in a if not (x) > (b) and f'{x + 1}' or min(x, 3)][-1]"
    mutants = code_mutation.mutants(source)
    assert len(set(mutants)) == len(mutants) > 10 and source not in mutants
    for change in (">= (b)", "< (b)", "b=3", "b=1", "[-2]", "max(x, 3)", "min(3, x)", "if (x) > (b)", "or f'", "[1]"):
        assert sum(change in mutant for mutant in mutants) == 1, change
    assert mutants[-1].endswith("return None")
    for mutant in mutants[:-1]:
        ast.parse(mutant)
        assert "# a remark" in mutant and "f'{x + 1}'" in mutant
    assert code_mutation.mutants(source, 1) != mutants == code_mutation.mutants(source, 0)
    assert sorted(code_mutation.mutants(source, 1)) == sorted(mutants)
    assert code_mutation.mutants("def f():\n    'é'; return 'é' + 'x'")[0].startswith("def f():\n    'é'; return")


def test_bodies_can_be_emptied():
    assert code_mutation.with_body(CODE, None, "pass") == "def add(a, b):\n    pass"
    source = f"def help():\n    return 1\n\n{CODE}"
    assert ast.dump(ast.parse(code_mutation.with_body(source, "add", "return 0"))) == ast.dump(
        ast.parse("def help():\n    return 1\n\ndef add(a, b):\n    return 0")
    )


# Made-up families.


def test_families_are_many_and_their_tests_are_sharp():
    """Solutions pass their tests, no constant does, nearly every mutant fails; it is our code, so it may run here."""
    rows = code_synthesis.synthesize(2 * len(code_synthesis.FAMILIES), 3)
    assert len(code_synthesis.FAMILIES) >= 20
    for family in code_synthesis.FAMILIES:
        assert math.prod(len(choices) for choices in family.slots.values()) >= 40, family.name

    def passes(code: str, tests: list[str]) -> bool:
        space: dict = {}
        exec(code, space)
        try:
            for test in tests:
                exec(test, space)
        except Exception:
            return False
        return True

    tried = caught = 0
    for row in rows:
        assert row["entry_point"] + "(" in row["prompt"]
        assert len(row["tests"]) == code_synthesis.TESTS
        assert passes(row["solution"], row["tests"])
        assert len({test.rpartition(" == ")[2] for test in row["tests"]}) > 1
        if "while" not in row["solution"]:  # a mutant of that may never end
            for mutant in code_mutation.mutants(row["solution"]):
                tried, caught = tried + 1, caught + (not passes(mutant, row["tests"]))
    assert caught / tried > 0.9


@pytest.mark.processes
def test_parameters_decide_the_group():
    """Two problems are one group when their programs are the same but for the name; every family has some held out."""
    count = 60 * len(code_synthesis.FAMILIES)
    rows = code_synthesis.synthesize(count, 0)
    assert code_synthesis.synthesize(count, 0) == rows != code_synthesis.synthesize(count, 1)
    assert len({row["prompt"] for row in rows}) == count
    bodies = {row["solution"].partition("(")[2]: row["group"] for row in rows}
    groups = {row["group"] for row in rows}
    assert len(bodies) == len(groups) < count
    assert all(bodies[row["solution"].partition("(")[2]] == row["group"] for row in rows)
    held_out = {place % len(code_synthesis.FAMILIES) for place, row in enumerate(rows)
                if splits.part_of(row["group"]) == "validation"}  # fmt: skip
    assert len(held_out) == len(code_synthesis.FAMILIES)
    problems = code_rows.problems_of(rows[:50])
    assert [(p.group, list(p.plan)) for p in problems] == [(row["group"], row["plan"]) for row in rows[:50]]


# Figures.


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n):
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            draws = list(itertools.combinations(samples, k))
            assert code_metrics.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_is_stable_and_refuses_nonsense():
    assert code_metrics.pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
    assert code_metrics.pass_at_k(2000, 1000, 1000) == 1
    for n, c, k in ((3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)):
        with pytest.raises(ValueError, match="is not defined"):
            code_metrics.pass_at_k(n, c, k)


def judged(error: str, tests: float = 0.0) -> code_metrics.JudgedSample:
    return code_metrics.JudgedSample("x", "", error, "why", True, not error, tests if error else 1.0)


def test_figures_are_means_over_problems():
    right, wrong = judged(""), judged("assertion", 0.5)
    samples = [[right, wrong, wrong], [right, right, wrong], [wrong, wrong, wrong]]
    found = code_metrics.evaluate(samples, [1, 2], ["a", "b", "c"], 0)
    assert found["pass_at_1"]["value"] == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    assert found["pass_at_2"]["value"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["lint_rate"]["value"] == pytest.approx(1 / 3)
    assert found["test_pass_rate"]["value"] == pytest.approx(2 / 3)
    assert found["errors"] == {"assertion": 6, "passed": 3} and found["samples"] == 3
    assert found["pass_at_1"]["low"] < found["pass_at_1"]["value"] < found["pass_at_1"]["high"]
    better = [[right] * 3] * 3
    gain = code_metrics.difference(better, samples, [1], ["a", "b", "c"], 0)["pass_at_1"]
    assert gain["value"] == pytest.approx(1 - found["pass_at_1"]["value"]) and gain["low"] > 0
    same = code_metrics.difference(samples, samples, [1], ["a", "b", "c"], 0)["pass_at_1"]
    assert same == {"value": 0, "low": 0, "high": 0}


def test_a_problem_with_many_tests_counts_no_more_than_another():
    """`test_pass_rate` is the mean over problems: here half of the tests of one and all of the other's."""
    found = code_metrics.evaluate([[judged("assertion", 0.5)], [judged("")]], [1], ["a", "b"], 0)
    assert found["test_pass_rate"]["value"] == pytest.approx(0.75)
    (meaning,) = (meaning for key, _, meaning in code_report.RATES if key == "test_pass_rate")
    assert meaning == "mean over problems of the share of their tests that pass"


def test_lints():
    codes = [CODE, "import os\n\n\n" + CODE, "def f(:", "def f():\n    return undefined", "import os  # noqa\n", ""]
    assert code_metrics.lints(codes) == [True, False, False, False, False, False]


# What is kept between runs.


def test_answers_are_kept_and_a_cut_line_is_dropped(tmp_path):
    path = tmp_path / "report" / "answers.jsonl"
    store = resumable.AnswerStore(path)
    store.add([("a", {"code": "é"}), ("b", [1])])
    with path.open("ab") as handle:
        handle.write(b'{"key": "c", "val')
    again = resumable.AnswerStore(path)
    assert again["a"] == {"code": "é"} and "b" in again and "c" not in again
    again.add([("c", 3)])
    assert resumable.AnswerStore(path)["c"] == 3
    (tmp_path / "other.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="does not hold answers"):
        resumable.AnswerStore(tmp_path / "other.jsonl")
    assert resumable.content_key("a", {"x": 1, "y": 2}) == resumable.content_key("a", {"y": 2, "x": 1})
    assert resumable.content_key("a") != resumable.content_key("b")
