"""The one place where CodeGen's prompts are built, and the answers that training rows have to them.

Trained adapters and Instruct models are asked in chat turns: the task alone for code, or first for a plan and then for
the code of task and plan; their rows answer in tags, `<PLAN>` and `<CODE>`. A plain base model (one that was not
trained on turns) gets text to continue: the task as a docstring, or a function stub as it is.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

from common.tasks.codegen import source

BUILTINS = frozenset(dir(builtins))

SHOWN_TEST = "\nIt must pass this test:\n"
PLAN_REQUEST = "\n\nWrite a plan in <PLAN> tags."  # as training rows ask, whose answers show what is meant
CODE_REQUEST = "\n\nWrite the code of this plan in <CODE> tags."
SHOWN_PLAN_REQUEST = (  # for a model that was not trained on them: an empty plan is what it makes of the other
    "\n\nDo not write the code yet. First write a short plan in numbered steps, in tags like this:\n"
    "<PLAN>\n1. What to do first.\n2. What to do next.\n</PLAN>"
)
SHOWN_CODE_REQUEST = "\n\nNow write the Python code of this plan, complete and without further words."
PLAN_AGAIN_REQUEST = (
    "\n\nHow would you solve this? Answer with numbered steps only, one short sentence each, and without any code."
)


# Chat turns.


def is_stub(task: str) -> bool:
    """Whether a task is Python code that ends in a function of which only the docstring is written."""
    tree = source.parsed(task)
    last = tree.body[-1] if tree and tree.body else None
    return isinstance(last, ast.FunctionDef) and len(last.body) == 1 and ast.get_docstring(last) is not None


@lru_cache(maxsize=4096)  # asked after every token of an answer
def names_asked_for(task: str) -> tuple[str, ...]:
    """The functions and classes that a task wants defined: its stub's, those of the tests that it shows, or the one
    that its words name; none where it does not say.
    """
    if is_stub(task):
        return (ast.parse(task).body[-1].name,)
    called: dict[str, None] = {}
    for line in task.splitlines():
        if line.startswith("assert "):
            with suppress(*source.NOT_PYTHON):
                calls = [node.func for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call)]
                called |= {func.id: None for func in calls if isinstance(func, ast.Name) and func.id not in BUILTINS}
    if called:
        return tuple(called)
    named = re.search(r"(?<![\w.])(?:def |class |called |named |function |method )?[`'\"]?(\w+)\(", task)
    return (named[1],) if named and named[1].isidentifier() and named[1] not in BUILTINS else ()


def direct_prompt(task: str) -> str:
    """The user turn that asks for code."""
    return f"Complete this Python function:\n\n{task.rstrip()}" if is_stub(task) else task


def plan_prompt(task: str, request: str = PLAN_REQUEST) -> str:
    """The user turn that asks for a plan."""
    return direct_prompt(task) + request


def code_prompt(task: str, plan: str, request: str = CODE_REQUEST) -> str:
    """The user turn that asks for the code of a plan (lines of text)."""
    return f"{direct_prompt(task)}\n\n<PLAN>\n{plan}\n</PLAN>{request}"


def with_tests(task: str, tests: Sequence[str]) -> str:
    """A task with the tests that its code has to pass, as MBPP's are shown, once each. A function stub stays one."""
    missing = [test for test in tests if test not in task]
    return task if is_stub(task) or not missing else task + SHOWN_TEST + "\n".join(missing)


def repair_prompt(task: str, code: str, error: str) -> str:
    """The user turn that asks for code again, after some that failed a test with `error`."""
    return (
        f"{direct_prompt(task)}\n\nThis code for it is wrong:\n\n{code}\n\n{error}\n\nWrite the whole code, corrected."
    )


def plan_text(steps: Sequence[str]) -> str:
    """Steps as the lines of a plan; what a step's indentation says is kept."""
    return "\n".join(re.sub(r"^( *)", r"\1- ", step) for step in steps)


def plan_answer(plan: str) -> str:
    """A plan as training rows answer with it."""
    return f"<PLAN>\n{plan}\n</PLAN>"


def code_answer(code: str) -> str:
    """Code as training rows answer with it."""
    return f"<CODE>\n{code}\n</CODE>"


def training_pairs(task: str, steps: Sequence[str], code: str) -> list[tuple[str, str]]:
    """(prompt, answer) of all that one adapter learns of a problem: code, plan, and the code of the plan."""
    plan = plan_text(steps)
    return [
        (direct_prompt(task), code_answer(code)),
        (plan_prompt(task), plan_answer(plan)),
        (code_prompt(task, plan), code_answer(code)),
    ]


# Plain base models: text to continue.


def docstring_prompt(task: str, plan: str | None = None) -> str:
    """The text that a base model continues with code, after a plan where there is one; a stub stands as it is."""
    steps = "" if plan is None else "# Plan:\n" + "".join(f"# {line}\n" for line in plan.splitlines())
    return steps + task if is_stub(task) else _docstring(task) + steps


def comment_prompt(task: str) -> str:
    """The text that a base model continues with a plan, in comment lines."""
    return _docstring(task) + "# Plan:\n# -"


def _docstring(task: str) -> str:
    return '"""\n{}\n"""\n'.format(task.strip().replace("\\", "\\\\").replace('"""', "'''"))
