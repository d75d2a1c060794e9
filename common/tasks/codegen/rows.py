"""Programming problems with tests: MBPP, HumanEval and own rows in one form, and their groups."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.data import rows as records
from common.data import splits
from common.sandbox.grading import Tests
from common.tasks.codegen import evalplus, source
from common.tasks.codegen.plans import steps_of
from common.tasks.codegen.prompt import SHOWN_TEST

FORMATS = (
    "MBPP (text or prompt, code, test_list), HumanEval (prompt, canonical_solution, test, entry_point), EvalPlus' "
    "forms of both, or own rows (prompt, solution, tests)"
)
FILLER = set("a an the of to in for from by with and or is are be given using write find function python".split())  # noqa: SIM905


@dataclass(frozen=True)
class CodeProblem:
    """A task in words (or as a function stub), a solution that is right, and the tests that say so.

    Attributes:
        prompt: what the model is asked.
        tests: pieces of source in order, each an assert or anything else that raises when a solution is wrong.
        setup: source that is run before the tests.
        entry_point: the function under test, which the tests may call `candidate`.
        group: hash that problems share which are the same but for names and wording; never on two sides of a split.
        plan: steps in words.
    """

    task_id: str
    prompt: str
    solution: str
    tests: tuple[str, ...]
    setup: str
    entry_point: str | None
    group: str
    plan: tuple[str, ...]

    def graded_by(self) -> Tests:
        """The tests as `common.sandbox.grading` takes them."""
        return Tests(self.tests, self.setup, self.entry_point)

    def row(self) -> dict[str, Any]:
        """The row of a problem file, which `read` reads back."""
        return asdict(self)


def read(path: str | Path, skip_bad_rows: bool = False) -> list[CodeProblem]:
    """Problems of a JSON or JSONL file (.gz is fine) in any of `FORMATS`, told apart row by row.

    Raises:
        UserError: no such file, or a row of no known format, by file and number.
    """
    unit, numbered, _ = records.numbered_rows(path)
    return problems_of(records.check_rows(path, numbered, (), skip_bad_rows, unit, fault_of=_fault).rows)


def is_problem(row: object) -> bool:
    """Whether a row has the form of a problem, whatever its code is worth."""
    return isinstance(row, dict) and _form_fault(row) is None


def problems_of(rows: Sequence[dict]) -> list[CodeProblem]:
    """Good rows of any of `FORMATS` as problems, with the groups that they form together."""
    fields = [_fields(row) for row in rows]
    return [
        CodeProblem(
            task_id=str(row.get("task_id", index)),
            prompt=field["prompt"],
            solution=field["solution"],
            tests=tuple(field["tests"]),
            setup=field["setup"],
            entry_point=field["entry_point"],
            group=group,
            plan=tuple(row.get("plan") or steps_of(field["solution"], field["entry_point"])),
        )
        for index, (row, field, group) in enumerate(zip(rows, fields, _groups(fields), strict=True), start=1)
    ]


def _fault(row: dict) -> str | None:
    """Why a row is no problem; None when it is one."""
    if fault := _form_fault(row) or _list_fault(row, "plan", needed=False):
        return fault
    if "code" in row and isinstance(test := row.get("test"), str) and not (source.parsed(test) and test.strip()):
        return "'test' is not Python"
    field = _fields(row)
    if not field["tests"]:
        return "it has no tests"
    for text in (field["solution"], field["setup"], *field["tests"]):
        try:
            ast.parse(text)
        except (*source.NOT_PYTHON, TypeError) as error:
            why = error.args[0] if error.args else "too much of it"
            return f"not Python ({why}): {str(text).strip()[:60]!r}"
    return None


def _form_fault(row: dict) -> str | None:
    """Why a row is of no format, or lacks what its format needs or has something else there."""
    if "canonical_solution" in row:
        tests = () if evalplus.is_of_inputs(row) else ("test",)
        fault = records.row_fault(row, ("prompt", "canonical_solution", *tests, "entry_point"))
        return fault or (None if isinstance(row.get("atol") or 0, int | float) else "'atol' must be a number")
    if "code" in row:
        return (
            records.row_fault(row, ("text" if "text" in row else "prompt", "code"))
            or _list_fault(row, "test_list")
            or _list_fault(row, "test_imports", needed=False)
            or _text_fault(row, "test_setup_code")
        )
    if "solution" in row:
        return (
            records.row_fault(row, ("prompt", "solution"))
            or (_text_fault(row, "setup") and _list_fault(row, "setup") and "'setup' must be a text or a list of texts")
            or _text_fault(row, "entry_point")
            or _list_fault(_tests_listed(row), "tests")
            or splits.group_fault(row, "codegen_prepare.py")
        )
    return f"no known format, which are {FORMATS}"


def _text_fault(row: dict, key: str) -> str | None:
    """Why what need not be there is no text; None where it is one, an empty one too, or is not there."""
    return None if isinstance(row.get(key), str | None) else f"'{key}' must be a text"


def _list_fault(row: dict, key: str, needed: bool = True) -> str | None:
    texts = row.get(key)
    if texts is None and not needed:
        return None
    good = isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
    return None if good else f"'{key}' must be a list of texts"


def _fields(row: dict) -> dict[str, Any]:
    """`prompt`, `solution`, `tests`, `setup`, `entry_point` and, where it is given, `group`."""
    if "canonical_solution" in row:
        solution = (row["prompt"] + row["canonical_solution"]).rstrip()
        setup, tests = evalplus.without_numpy(row.get("test", "")), ["check(candidate)"]
        if evalplus.is_of_inputs(row):
            setup, tests = evalplus.tests_of_inputs(row, solution)
        return {
            "prompt": row["prompt"],
            "solution": solution,
            "tests": tests,
            "setup": setup,
            "entry_point": row["entry_point"],
        }
    if "code" in row:
        # The text does not say what the function is called; as is usual for MBPP, a test shows it.
        shown = SHOWN_TEST + row["test_list"][0] if row["test_list"] else ""
        tests, setup = row["test_list"], [*(row.get("test_imports") or ()), row.get("test_setup_code") or ""]
        if isinstance(row.get("test"), str):  # MBPP+
            more, test = evalplus.split_source(row["test"])
            tests, setup = [test], [*setup, more]
        return {
            "prompt": row.get("text", row.get("prompt")) + shown,
            "solution": row["code"].replace("\r\n", "\n").strip("\n"),
            "tests": tests,
            "setup": "\n".join(setup).strip(),
            "entry_point": _called(row["code"], row["test_list"]),
        }
    row = _tests_listed(row)
    return {key: row[key] for key in ("prompt", "solution", "tests")} | {
        "setup": _setup_of(row),
        "entry_point": row.get("entry_point") or _called(row["solution"], row["tests"]),
        "group": row.get("group"),
    }


def _tests_listed(row: dict) -> dict:
    """An own row whose tests are one text, with that text as setup and list of tests, from the first assert on."""
    if not isinstance(row.get("tests"), str):
        return row
    try:
        parts = [(isinstance(node, ast.Assert), ast.unparse(node)) for node in ast.parse(row["tests"]).body]
    except source.NOT_PYTHON:
        return row
    first = next((index for index, (is_assert, _) in enumerate(parts) if is_assert), len(parts))
    setup = [_setup_of(row), *(text for _, text in parts[:first])]
    return row | {"setup": "\n".join(filter(None, setup)), "tests": [text for _, text in parts[first:]]}


def _setup_of(row: dict) -> str:
    """The setup of an own row, which may be a list of texts."""
    setup = row.get("setup") or ""
    return "\n".join(setup) if isinstance(setup, list) else setup


def _called(solution: str, tests: Sequence[str]) -> str | None:
    """The last function of the solution that a test names, which may be called like a built-in one."""
    with suppress(*source.NOT_PYTHON):  # rows are checked with their fields
        functions = [node.name for node in ast.parse(solution).body if isinstance(node, ast.FunctionDef)]
        named = [name for name in functions if any(re.search(rf"\b{name}\b", test) for test in tests)]
        return named[-1] if named else None
    return None


# Groups.


def _groups(fields: Sequence[dict[str, Any]]) -> list[str]:
    """Group hashes: problems with the same words, or the same solution but for names, are one group, transitively.

    A row that names its group keeps it. The hash is that of the group's first key in the alphabet, its words, so it
    depends neither on the file's order nor on the version of Python.
    """
    leader: dict[str, str] = {}

    def find(key: str) -> str:
        while leader.setdefault(key, key) != key:
            key = leader[key]
        return key

    given = [field.get("group") for field in fields]
    words = ["" if group else _words_key(field["prompt"]) for field, group in zip(fields, given, strict=True)]
    for field, group, key in zip(fields, given, words, strict=True):
        if not group:
            first, second = sorted((find(key), find(_program_key(field["solution"]))))
            leader[second] = first
    return [group or splits.group_hash(find(key)) for group, key in zip(given, words, strict=True)]


def _words_key(prompt: str) -> str:
    """The words of a task without order, case, numbers, filler and the test that is shown with them."""
    task = prompt.partition(SHOWN_TEST)[0]
    return "in words: " + " ".join(sorted({*re.findall(r"[^\W\d_]+", task.lower())} - FILLER))


def _program_key(solution: str) -> str:
    tree = ast.parse(solution)
    return "program: " + ast.unparse(ast.fix_missing_locations(_Nameless(tree).visit(tree)))


class _Nameless(ast.NodeTransformer):
    """Numbers the names that a program defines, in the order in which they appear; drops docstrings and types."""

    def __init__(self, tree: ast.AST) -> None:
        self.names: dict[str, str] = {}
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef(name=name) | ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
                    self.names.setdefault(name, f"name{len(self.names)}")

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.names.get(node.id, node.id), node.ctx)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(self.names[node.arg])

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        self.generic_visit(node)
        node.name, node.returns = self.names[node.name], None
        node.body = node.body or [ast.Pass()]
        return node
