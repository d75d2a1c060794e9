"""The judge: honest solutions get the verdict they deserve, dishonest ones never get a better one."""

from __future__ import annotations

import json
import re

import pytest
from support.boxes import leftovers
from support.inputs import SHARED

from common.cli import UserError
from common.sandbox import box as sandbox
from common.sandbox import grading
from common.sandbox.box import Box, BoxError, Limits
from common.sandbox.grading import Tests, Verdict

pytestmark = pytest.mark.processes

Tests.__test__ = False  # not a class that pytest should collect
MBPP = SHARED / "data" / "mbpp" / "sanitized-mbpp.json"
SQUARE = Tests(("assert square(3) == 9", "assert square(-4) == 16"))


@pytest.fixture(params=sandbox.LEVELS, autouse=True)
def level(request, monkeypatch):
    if sandbox.interpreter_of(request.param) is None:
        pytest.skip(f"{request.param} does not work here")
    monkeypatch.setattr(sandbox, "LEVELS", (request.param,))
    yield request.param
    assert leftovers() == []


def errors(pairs: list[tuple[str, Tests]], limits: Limits | None = None) -> list[str]:
    return [verdict.error for verdict in grading.grade_many(pairs, limits or Limits())]


def check(expected: dict[tuple[str, Tests], str]) -> None:
    """Each pair ends as expected. Those without an end have little time; others may need more on a busy machine."""
    endless = [pair for pair, word in expected.items() if word == "timeout"]
    found = dict(zip(endless, errors(endless, Limits(seconds=2)), strict=True))
    others = [pair for pair in expected if pair not in found]
    assert found | dict(zip(others, errors(others), strict=True)) == expected


def test_a_verdict():
    assert grading.grade("def square(x): return x * x", SQUARE).passed
    verdict = grading.grade("def square(x): return x * 3", SQUARE)
    assert verdict == Verdict(False, "assertion", "assert square(-4) == 16", verdict.seconds)
    assert verdict.seconds > 0


@pytest.mark.parametrize("faults", [1, 2])
def test_boxes_that_do_not_start_get_another_try(faults, monkeypatch):
    run, left = Box.run, ["judge"] * faults

    def start(box, program):
        if "run_tests" in program.rsplit("\n", 2)[1] and left:
            left.pop()
            raise BoxError("timeout", "not done within 10 s")
        run(box, program)

    monkeypatch.setattr(Box, "run", start)
    if faults == 1:
        assert grading.grade("def square(x): return x * x", SQUARE).passed
    else:
        with pytest.raises(UserError, match=r"a sandbox did not start \(not done within 10 s\); let less run"):
            grading.grade("def square(x): return x * x", SQUARE)


OUTCOMES = {
    "def square(x): return x * x": "",
    "square = lambda x: x ** 2": "",
    "class square:\n    def __new__(cls, x): return x * x": "",
    "def square(x) return x": "syntax",
    "def square(x):\n    return '\ud800\0'": "syntax",
    "(" * 5000: "syntax",
    "import numpy\ndef square(x): return x * x": "import",
    "from math import cube\ndef square(x): return x * x": "import",
    "def sqr(x): return x * x": "no function",
    "": "no function",
    "square = 9": "no function",
    "def square(x): return -x": "assertion",
    "def square(x): pass": "assertion",
    "def square(): return 9": "exception:TypeError",
    "def square(x): return 1 // 0": "exception:ZeroDivisionError",
    "def square(x): assert x > 5": "exception:AssertionError",
    "class Odd(ValueError): pass\ndef square(x): raise Odd('odd')": "exception:Odd",
    "def square(x): return square(x)": "exception:RecursionError",
    "1 // 0": "exception:ZeroDivisionError",
    "def square(x): return [0] * 10**10": "memory",
    "def square(x): return b'x' * (5 << 20)": "output",
    "def square(x):\n    while True: pass": "timeout",
    "while True: pass": "timeout",
    "import os; os._exit(0)": "killed",
    "def square(x):\n    import ctypes; ctypes.string_at(0)": "killed",
}


def test_every_kind_of_error():
    check({(solution, SQUARE): word for solution, word in OUTCOMES.items()})


@pytest.mark.parametrize(
    ("solution", "detail"),
    [
        ("def square(x): return 1 // 0", "assert square(3) == 9: integer division or modulo by zero"),
        ("def square(x) return x", "expected ':' (<solution>, line 1)"),
        ("import numpy", "at the top level: No module named 'numpy'"),
        ("import os; os._exit(3)", "its process ended with exit code 3"),
        ("def square(x): raise ValueError('x' * 1000)", "assert square(3) == 9: " + "x" * 277),
        ("", "assert square(3) == 9: name 'square' is not defined"),
    ],
)
def test_details(solution, detail):
    assert grading.grade(solution, SQUARE).detail == detail


def test_faults_of_the_tests():
    solution = "def f(x): return object()"
    tests = {
        Tests(("assert f(1) ==",)): "tests",
        Tests(("assert f(1)",), setup="1 // 0"): "tests",
        Tests(("assert f(1).real == 1",)): "not data",
        Tests(("assert 1 + 1 == 2",)): "no function",
        Tests(()): "no function",
        Tests(("assert f(1)",), entry_point="g"): "no function",
        Tests(("f(1)", "import sys; sys.exit(0)")): "exception:SystemExit",
        Tests(("import os; os._exit(0)",)): "killed",
        Tests(("while True: pass",)): "timeout",
        Tests(("import socket; socket.socket()",)): "exception:PermissionError",
        Tests(
            ("import os; os.write(int(__import__('sys').argv[2]), b'\\0\\0\\0\\x10verdict\\nfailed\\n\\xff')",)
        ): "\ufffd",
    }
    check({(solution, each): word for each, word in tests.items()})


def test_humaneval_and_names():
    check = "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n"
    tests = Tests(("check(candidate)",), setup=check, entry_point="sum")
    assert errors([("def sum(a, b): return a + b", tests), ("def sum(a, b): return 5", tests)]) == ["", "assertion"]
    verdict = grading.grade("def sum(a, b): return 5", tests)
    assert verdict.detail == "assert candidate(-1, 1) == 0"
    # a module that the tests use and only the solution imports
    assert grading.grade("import math\ndef f(): return 3.14159", Tests(("assert f() < math.pi",))).passed


VALUES = """
None, True, 0, -1, 10**400, 1.5, -0.0, float("inf"), 1e-320, 2j, "", "line\\nbreak \\\\ \\ud800 é 漢",
b"\\x00\\xff", bytearray(b"x"),
[], [1, [2, [3]]], (), (1,), set(), {1, 2}, frozenset({3}), {}, {"a": [1], 2: {"b": None}, (1, 2): {3}}, range(1, 9, 2),
Counter("aab"), OrderedDict(b=1, a=2), deque([1, 2], 3), Decimal("1.10"), Fraction(1, 3), date(2024, 2, 29),
datetime(2024, 2, 29, 1, 2, 3, 4), datetime(2024, 1, 1, tzinfo=timezone.utc), time(1, 2, 3),
timedelta(-1, 5, 7), int, ValueError
"""
IMPORTS = """
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
"""


def test_values_arrive_as_they_were():
    pieces = [
        f"values = [{VALUES}]",
        "for value in values: assert same(value) == value and repr(same(value)) == repr(value), value",
        "assert same(values) == values and own_values() == values",
        "assert repr(same(float('nan'))) == 'nan' and type(same(True)) is bool",
        "assert same(defaultdict(list, a=[1])) == {'a': [1]}",
        "assert same(namedtuple('P', 'x y')(1, 2)) == (1, 2)",
        "assert same(IntEnum('E', 'A B').B) == 2 and type(same(IntEnum('E', 'A B').B)) is int",
    ]
    solution = f"{IMPORTS}def same(value): return value\ndef own_values(): return [{VALUES}]"
    verdict = grading.grade(solution, Tests(tuple(pieces), setup=IMPORTS))
    assert verdict.passed, verdict


def test_calls_work_as_within_one_program():
    solution = """
class Node:
    def __init__(self, value): self.value = value
    def __bool__(self): return self.value != 0
def node(value): return Node(value)
def value_of(node): return node.value
def fill(numbers, table, names, *, queue):
    numbers.append(4); numbers.sort(); table["new"] = numbers; names.discard("a"); queue.popleft(); return None
def twice(function, x): return function(function(x))
def adder(n): return lambda x: x + n
def count(n):
    for i in range(n): yield i
def first(iterator): return next(iterator)
def fail(word):
    if word == "own": raise type("Own", (KeyError,), {})("k")
    raise ValueError(word)
def is_integer(kind): return kind is int
"""
    setup = """
from collections import deque
def raises(kind, *args):
    try: fail(*args)
    except kind: return True
"""
    pieces = (
        "numbers, table, names, queue = [3, 1], {}, {'a'}, deque([1, 2])",
        "assert fill(numbers, table, names, queue=queue) is None",
        "assert (numbers, table, names, queue) == ([1, 3, 4], {'new': [1, 3, 4]}, set(), deque([2]))",
        "assert twice(lambda x: x * 3, 2) == 18 and adder(3)(4) == 7 and twice(adder(3), 4) == 10",
        "assert list(count(3)) == [0, 1, 2] and next(count(1)) == 0 and sum(count(4)) == 6",
        "assert first(iter([7, 8])) == 7",
        "assert value_of(node(5)) == 5 and node(1) and not node(0) and node(5) != 5",
        "assert raises(KeyError, 'own') and raises(ValueError, 'x')",
        "assert is_integer(int) and not is_integer(str)",
    )
    verdict = grading.grade(solution, Tests(pieces, setup=setup))
    assert verdict.passed, verdict


# Each of these is wrong (the tests want 424242, and a set of it) and tries to look right.
SECRET = Tests(
    ("assert f(1) == 424242", "assert set(g(1)) == set([424242])", "assert isclose(abs(f(1) - 424242), 0)"),
    setup="from math import isclose",
)
LIES = {
    "exit": "import sys\ndef f(x): sys.exit(0)",
    "exit while loading": "raise SystemExit(0)",
    "_exit": "import os\ndef f(x): os._exit(0)",
    "print": "def f(x):\n    print('passed'); print('{\"passed\": true}')\nprint('verdict\\n\\n')",
    "result files": """
import os
for name in ("result", "verdict", "passed", "/tmp/result", "result.json"):
    try: open(name, "w").write("passed")
    except OSError: pass
def f(x): pass
""",
    "always equal": """
class Equal:
    def __eq__(self, other): return True
    def __hash__(self): return 0
    def __sub__(self, other): return 0
    __abs__ = __float__ = lambda self: 424242.0
    def __getattr__(self, name): return self
    def __iter__(self): yield self
def f(x): return Equal()
def g(x): return [Equal()]
""",
    "equal subclasses": """
class Int(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return hash(424242)
    def __reduce__(self): return (print, ())
def f(x): return Int(1)
def g(x): return {Int(1)}
""",
    "patched builtins": """
import builtins, math
builtins.set = builtins.abs = lambda *args: True
builtins.AssertionError = Exception
math.isclose = lambda *args, **kwargs: True
def f(x): return 1
g = f
""",
    "names of the tests": """
def f(x): return 1
def g(x): return [1]
set = abs = lambda *args: 0
isclose = lambda *args: True
class AssertionError(BaseException): pass
__builtins__ = __name__ = exec = check = candidate = tests = namespace = verdict = lambda *args: True
""",
    "forged messages": """
import os, sys
def frame(text): return len(text).to_bytes(4, "big") + text
for fd in range(3, 64):
    for text in (b"verdict\\n\\n", b"ready", b"tuple 3\\nstr returned\\nint 67932\\nconstant None") * 3:
        try: os.write(fd, frame(text))
        except OSError: pass
def f(x): return 1
""",
    "a message instead of an answer": """
import __main__
def f(x):
    __main__.send(b"verdict\\n\\n")
    __main__.send(b"verdict\\n\\n")
def g(x): return f(x)
""",
    "a report of a load that failed in nothing": """
import __main__
__main__.send(b"tuple 2\\ntuple 2\\nstr \\nstr \\nlist 0")
""",
    "the same with spaces": """
import __main__
__main__.send(b"tuple 2\\ntuple 2\\nstr   \\nstr \\nlist 0")
""",
    "a report that the tests are at fault": """
import __main__
__main__.send(b"tuple 2\\ntuple 2\\nstr tests\\nstr \\nlist 0")
""",
    "the receiver's code": """
import __main__, os
def f(x):
    __main__.send(b"tuple 3\\nstr returned\\nobject builtins.exec\\ntuple 1\\nstr raise SystemExit(0)\\nconstant None")
    return 1
""",
    "calls into the tests": """
import __main__
def f(x):
    for key in (0, 1, -1, "f", "__builtins__"):
        __main__.send(b"tuple 4\\nstr call\\nint 0\\ntuple 0\\ndict 0")
    return 1
""",
    "looking for the number": """
import gc, re, sys
def things():
    frame = sys._getframe()
    while frame:
        yield from [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, (list, tuple)): yield from thing
        if isinstance(thing, dict): yield from thing.values()
def found():
    for thing in things():
        numbers = [thing] if type(thing) is int else re.findall("[0-9]{6}", thing) if type(thing) is str else []
        for number in map(int, numbers):
            if number * 2 == 848484: return number
    return 0
def f(x): return found()
def g(x): return [found()]
""",
    "reading files": """
import os
def f(x):
    for folder, _, names in os.walk("/"):
        if folder.startswith(("/usr", "/lib")): continue
        for name in names:
            try:
                if "424242" in open(os.path.join(folder, name), errors="ignore").read(): return 424242
            except OSError: pass
    return 1
def g(x): return [f(x)]
""",
    "an endless list": "def f(x):\n    while True: yield x\ng = f",
    "an end of iteration that nobody asked for": """
import __main__
def f(x):
    __main__.send(b"tuple 3\\nstr returned\\nconstant None\\nconstant True")
    return 1
""",
    "a deep list": "def f(x):\n    deep = []\n    for _ in range(100_000): deep = [deep]\n    return deep",
    "an exception that passes": "class Passed(SystemExit, KeyboardInterrupt): pass\ndef f(x): raise Passed(0)",
    "an argument's method": "def f(x): return type(x).__eq__\ng = f",
    "a killed parent": """
import os, signal
def f(x):
    for pid in (os.getppid(), -1):
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
            try: os.kill(pid, number)
            except OSError: pass
    return 1
""",
}


def test_no_lie_passes():
    verdicts = grading.grade_many([(solution, SECRET) for solution in LIES.values()], Limits(seconds=3))
    assert [name for name, verdict in zip(LIES, verdicts, strict=True) if verdict.passed] == []
    assert not {verdict.error for verdict in verdicts} & {"", "tests"}  # nor is the blame laid on the tests
    honest = "def f(x): return 424242\ndef g(x): return [424242]"
    assert grading.grade(honest, SECRET).passed  # the tests can be passed


STYLES = (  # of tests, each false of a function that returns nothing right
    "assert f(1) == 424242",
    "assert all(f(x) == 424242 for x in [1, 2])",
    "assert all(map(lambda x: f(x) == 424242, [1, 2]))",
    "assert not any(map(lambda x: f(x) != 424242, [1, 2]))",
    "assert all([f(x) == 424242 for x in [1, 2]])",
    "for value in map(f, [1, 2]): assert value == 424242",
    "for got, right in zip(map(f, [1, 2]), [424242] * 2): assert got == right",
    "assert sum(map(lambda x: f(x) != 424242, [1, 2])) == 0",
    "assert set(map(f, [1, 2])) <= {424242}",
    "assert list(filter(lambda x: f(x) != 424242, [1, 2])) == []",
    "assert next((x for x in [1, 2] if f(x) != 424242), None) is None",
    "assert max(map(f, [1, 2]), default=424242) == 424242",
    "assert {x: y for x, y in zip('ab', map(f, [1, 2]))} in ({}, {'a': 424242, 'b': 424242})",
    "import contextlib\nwith contextlib.suppress(IndexError): assert f(1) == 424242",
    "assert not hasattr(f(1), 'wrong')",
)
RAISED = ("StopIteration", "StopIteration(1)", "StopAsyncIteration", "GeneratorExit", "SystemExit(0)",
          "KeyboardInterrupt", "type('Own', (StopIteration,), {})", "AssertionError")  # fmt: skip


@pytest.mark.parametrize("raised", RAISED)
def test_no_exception_of_the_solution_ends_a_test_in_silence(raised):
    """`map` and its like take StopIteration for the end of what they go through."""
    solution = f"def f(x): raise {raised}"
    told = errors([(solution, Tests((style,))) for style in STYLES])
    assert [style for style, error in zip(STYLES, told, strict=True) if not error] == []
    assert {error.partition(":")[0] for error in told} == {"exception"}


def test_objects_of_the_solution_have_no_attributes_to_be_asked_for():
    solution = "class Odd:\n    wrong = True\ndef f(x): return Odd()"
    styles = ("assert not hasattr(f(1), 'wrong')", "assert getattr(f(1), 'wrong', 424242) == 424242",
              "try:\n    f(1).wrong\nexcept Exception:\n    pass")  # fmt: skip
    assert errors([(solution, Tests((style,))) for style in styles]) == ["not data"] * 3


def test_iterators_of_the_solution_end_where_they_end():
    solution = (
        "def count(n):\n    yield from range(n)\n"
        "class Count:\n    def __iter__(self): return self\n    def __next__(self): raise StopIteration\n"
        "def empty(): return Count()\n"
        "def broken():\n    yield 1\n    raise StopIteration\n"
    )
    pieces = ("assert list(count(3)) == [0, 1, 2] and list(empty()) == []",
              "try:\n    list(broken())\nexcept RuntimeError:\n    pass\nelse:\n    assert False")  # fmt: skip
    assert errors([(solution, Tests((piece,))) for piece in pieces]) == ["", ""]


@pytest.mark.parametrize("lie", ["always equal", "equal subclasses", "patched builtins", "names of the tests"])
def test_no_solution_does_the_comparing(lie):
    each = [Tests((piece,), SECRET.setup) for piece in SECRET.asserts]
    assert "" not in errors([(LIES[lie], tests) for tests in each])


def test_a_solution_that_changes_its_arguments_changes_values_only():
    solution = """
class Equal(list):
    def __eq__(self, other): return True
def f(numbers): numbers.append(Equal([1])); return numbers
"""
    assert errors([(solution, Tests(("given = [1]", "f(given)", "assert given[1] == [2]")))]) == ["assertion"]


def test_many_verdicts_keep_their_order():
    seen = []
    solutions = [f"import time\ntime.sleep({0.2 if i == 0 else 0})\ndef square(x): return {i}" for i in range(6)]
    tests = [Tests((f"assert square(0) == {i}", "assert square(0) != 4")) for i in range(6)]
    verdicts = grading.grade_many(list(zip(solutions, tests, strict=True)), workers=3, progress=seen.append)
    assert [verdict.passed for verdict in verdicts] == [True, True, True, True, False, True]
    assert seen == verdicts
    assert grading.grade_many([]) == []


def test_an_interrupt_ends_all_boxes():
    def interrupt(verdict: Verdict) -> None:
        raise KeyboardInterrupt

    endless = "while True: pass"
    pairs = [("", SQUARE), *[(endless, SQUARE)] * 5]
    with pytest.raises(KeyboardInterrupt):  # the fixture looks for what is left
        grading.grade_many(pairs, Limits(seconds=3600), workers=3, progress=interrupt)


@pytest.mark.skipif(not MBPP.is_file(), reason="the MBPP problems are not here")
def test_mbpp_reference_solutions_pass_and_empty_ones_fail():
    pairs, empty = [], []
    for row in json.loads(MBPP.read_text(encoding="utf-8"))[::20]:
        called = [name for name in re.findall(r"^def (\w+)", row["code"], re.M) if f"{name}(" in row["test_list"][0]]
        tests = Tests(tuple(row["test_list"]), "\n".join(row["test_imports"]), called[-1])
        pairs.append((row["code"], tests))
        empty.append((f"def {called[-1]}(*_): pass", tests))
    assert errors(pairs) == [""] * len(pairs)
    assert not any(verdict.passed for verdict in grading.grade_many(empty))
