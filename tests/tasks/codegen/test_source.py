"""What a program defines and lacks, and which of its statements are no part of the answer."""

from __future__ import annotations

import pytest

from common.sandbox import grading
from common.tasks.codegen import source

EVEN = "def is_even(n):\n    return n % 2 == 0"
STUB = (
    "from typing import List\nimport math\n\nBASE = 2\n\ndef half(x):\n    return x / BASE\n\n\n"
    'def mean_half(items: List[float]) -> float:\n    """ The mean of half of each """\n'
)


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("import math as m\ndef f(x):\n    y = x\n    return m.pi * y + len([z for z in x])", set()),
        ("def f(x):\n    return math.pi * help(x) * g", {"math", "g"}),
        ("from math import *\ndef f(x):\n    return sqrt(x)", set()),
        ("def f(xs):\n    try:\n        return Counter(xs)\n    except E as e:\n        raise e", {"Counter", "E"}),
        ("def f(", set()),
    ],
)
def test_names_that_a_program_lacks(code, missing):
    assert source.missing_names(code) == missing


def test_what_is_needed_is_taken_from_others_with_what_that_needs():
    others = [
        "import math\nx = 1",
        "def area(r):\n    return PI2 * r\n\nPI2 = math.pi * SCALE\nSCALE = 2",
        "def f(): pass",
    ]
    code = source.with_missing("def two(r):\n    return 2 * area(r)", others)
    assert code.splitlines()[0] == "import math" and "x = 1" not in code and "def f" not in code
    assert "SCALE = 2" in code and code.endswith("def two(r):\n    return 2 * area(r)")
    assert source.with_missing(EVEN, others) == EVEN


USAGE = {
    f"{EVEN}\n\nprint(is_even(number))": EVEN,
    f"{EVEN}\n\nassert is_even(3)": EVEN,
    f"{EVEN}\n\nif __name__ == '__main__':\n    print(is_even(int(input())))": EVEN,
    f"{EVEN}\n\nresult = is_even(4)\nprint(result)": EVEN,
    f"{EVEN}\n\nnumber = int(input())\nprint(is_even(number))": EVEN,
    f"{EVEN}\n\nfor n in range(3):\n    print(n, is_even(n))": EVEN,
    f"{EVEN}\n\ndef main():\n    print(is_even(2))\n\nmain()": f"{EVEN}\ndef main():\n    print(is_even(2))",
}
KEPT = (
    EVEN,
    "import sys\nsys.setrecursionlimit(10000)\n\ndef f(n):\n    return n and f(n - 1)",
    "LIMIT = 10\nPRIMES = [n for n in range(2, LIMIT)]\n\ndef f(n):\n    return n in PRIMES",
    "TABLE = {}\nfor n in range(10):\n    TABLE[n] = n * n\n\ndef f(n):\n    return TABLE[n]",
    "from collections import defaultdict\nSEEN = defaultdict(int)\n\ndef f(n):\n    SEEN[n] += 1\n    return SEEN[n]",
    "def slow(n):\n    return n\n\nCACHE = [slow(n) for n in range(3)]\n\ndef f(n):\n    return CACHE[n]",
    "square = lambda x: x * x",
    "def f(x):\n    return x\n\nf.calls = 0\nstep = f",
    "try:\n    import numpy\nexcept ImportError:\n    numpy = None\n\ndef f(x):\n    return x",
    "class A:\n    pass\n\nA.size = 3",
    "print('hello')",
    "def f(",
)


@pytest.mark.parametrize("code", USAGE)
def test_usage_at_the_top_level_is_dropped(code):
    assert source.without_usage(code) == USAGE[code]


@pytest.mark.parametrize("code", KEPT)
def test_definitions_and_what_they_read_are_kept(code):
    assert source.without_usage(code) == code


def test_a_right_function_passes_with_usage_that_raises():
    tests = grading.Tests(("assert is_even(2)", "assert not is_even(3)"))
    code = f"{EVEN}\n\nprint(is_even(number))"
    assert [grading.grade(text, tests).error for text in (code, source.without_usage(code))] == [
        "exception:NameError", "",
    ]  # fmt: skip


BODY = "return sum(map(half, items)) / len(items)"


@pytest.mark.parametrize(
    "answer",
    [
        f"def mean_half(items):\n    {BODY}",
        f"def mean_half(items: List[float]) -> float:\n    {BODY}",
        f"from typing import List\ndef mean_half(items: List[float]) -> float:\n    {BODY}",
        f"BASE = 2\ndef half(x):\n    return x / BASE\ndef mean_half(items):\n    {BODY}",
        f"    {BODY}",
        BODY,
        STUB + f"    {BODY}",
    ],
)
def test_a_stub_lends_what_the_answer_lacks(answer):
    code = source.with_stub(STUB, answer)
    assert not source.missing_names(code)
    namespace: dict = {}
    exec(code, namespace)  # it is our own
    assert namespace["mean_half"]([1, 3]) == 1.0


def test_other_tasks_lend_nothing():
    assert source.with_stub("Write is_even(n).", EVEN) == EVEN
    assert source.with_stub(STUB, EVEN) == EVEN
    assert source.with_stub(STUB, "def mean_half(") == "def mean_half("


@pytest.mark.parametrize(
    ("code", "inside"),
    [
        ('"""', True), ('"""a"""', False), ("x = '", True), ("x = 'a\n", False), ("# don't", False),
        ("x = 'it\\'s", True), ("'''a\n\"\"\"", True), ("x = '' + \"\"", False), ("", False),
    ],
)  # fmt: skip
def test_strings_that_are_open(code, inside):
    assert source.inside_string(code) == inside
