"""CodeGen's texts: the prompts, what an answer says, where code ends, and whether it is Python.

Trained adapters and Instruct models are asked in chat turns: the task alone for code, or first for a plan and then for
the code of task and plan. They answer in tags, `<PLAN>` and `<CODE>`, or as they please: Markdown fences and prose
around the code are understood too. A plain base model (one that was not trained on turns) gets text to continue: the
task as a docstring, or a function stub as it is.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PLAN_REQUEST = "\n\nWrite a plan in <PLAN> tags."
CODE_REQUEST = "\n\nWrite the code of this plan in <CODE> tags."

PLAN = re.compile(r"<PLAN>[ \t]*\n?(.*?)(?:</PLAN>|(?=<CODE>)|\Z)", re.DOTALL | re.IGNORECASE)
CODE = re.compile(r"<CODE>[ \t]*\n?(.*?)(</CODE>|\Z)", re.DOTALL | re.IGNORECASE)
FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
PYTHON_FENCES = ("", "python", "python3", "py")
DEFINES = re.compile(r"(?:async )?def |class ")
STARTS_CODE = re.compile(r"(?:async )?def |class |import |from \w[\w.]* import |@\w")


# What is asked, and how rows answer it.


def is_stub(task: str) -> bool:
    """Whether a task is Python code that ends in a function of which only the docstring is written."""
    try:
        body = ast.parse(task).body
    except (SyntaxError, ValueError):
        return False
    last = body[-1] if body else None
    return isinstance(last, ast.FunctionDef) and len(last.body) == 1 and ast.get_docstring(last) is not None


def direct_prompt(task: str) -> str:
    """The user turn that asks for code."""
    return f"Complete this Python function:\n\n{task.rstrip()}" if is_stub(task) else task


def plan_prompt(task: str) -> str:
    """The user turn that asks for a plan."""
    return direct_prompt(task) + PLAN_REQUEST


def code_prompt(task: str, plan: str) -> str:
    """The user turn that asks for the code of a plan (lines of text)."""
    return f"{direct_prompt(task)}\n\n<PLAN>\n{plan}\n</PLAN>{CODE_REQUEST}"


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


# What a chat answer says.


def plan_of(text: str) -> str:
    """The plan in an answer: what its `<PLAN>` tags hold, else all of it up to the code."""
    match = PLAN.search(text)
    plan = match[1] if match else re.split(r"<CODE>|^[ \t]*```", text, maxsplit=1, flags=re.MULTILINE)[0]
    return plan.strip("\n").rstrip()


def code_of(text: str) -> str:
    """The code in an answer: in `<CODE>` tags, in the first Python fence, or bare with prose around it.

    A tag or fence that was not closed reaches to the end. Around bare code, prose is dropped as far as what is left is
    Python.
    """
    found = _marked_code(text)
    if found is not None:
        return found[0].strip("\n").rstrip()
    text = PLAN.sub("", text).strip("\n").rstrip()
    return text if compile_error(text) is None else _python_lines(text)


def marked_lines(text: str) -> str:
    """The whole lines of code that a growing answer has in a tag or fence so far: they will not change any more."""
    found = _marked_code(text[: text.rfind("\n") + 1])
    return found[0].strip("\n").rstrip() if found else ""


def answer_ends(text: str) -> bool:
    """Whether an answer's code is complete: its tag or its fence is closed."""
    found = _marked_code(text)
    return found is not None and found[1]


def _marked_code(text: str) -> tuple[str, bool] | None:
    """(code in a tag or a Python fence, whether that is closed); None where there is neither."""
    tag = CODE.search(text)
    fences = FENCE.finditer(tag[1] if tag else PLAN.sub("", text))
    fence = next((match for match in fences if match[1].lower() in PYTHON_FENCES), None)
    if fence:
        return fence[2], bool(fence[3]) or bool(tag and tag[2])
    return (tag[1], bool(tag[2])) if tag else None


def _python_lines(text: str) -> str:
    """The lines from the first that starts code to the last with which they are Python; `text` if there are none."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if STARTS_CODE.match(line)), None)
    if first is None:
        return text
    for end in range(len(lines), first, -1):
        code = "\n".join(lines[first:end])
        if compile_error(code) is None:
            return code.rstrip()
    return "\n".join(lines[first:])


def plan_ends(text: str) -> bool:
    """Whether a chat answer's plan is complete."""
    return "</plan>" in text.lower()


def compile_error(code: str) -> str | None:
    """Why `code` is not a Python program, in a line; None when it compiles."""
    if not code.strip():
        return "there is no code"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd but valid code, e.g. `x is 1`
            compile(code, "<answer>", "exec", dont_inherit=True)
    except SyntaxError as error:
        return f"line {error.lineno}: {error.msg}" if error.lineno else error.msg
    except (ValueError, OverflowError, RecursionError, MemoryError) as error:
        return str(error) or type(error).__name__
    return None


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


def comment_plan(continuation: str) -> str:
    """The plan that continues `comment_prompt`: its comment lines."""
    lines = ("# -" + continuation).split("\n")
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(line.removeprefix("#").removeprefix(" ").rstrip() for line in lines[:end])


def comment_plan_ends(continuation: str) -> bool:
    """Whether a line that is no comment has begun."""
    return any(line and not line.startswith("#") for line in continuation.split("\n")[1:])


def code_end(code: str) -> int | None:
    """Where a function or class is complete and something else than another definition or import starts."""
    defined = False
    place = 0
    for line in code.splitlines(keepends=True):
        if defined and not re.match(r"[\s@)#\]}]", line) and not STARTS_CODE.match(line):
            return place
        defined = defined or DEFINES.match(line) is not None
        place += len(line)
    return None


def continued_code(prompt: str, continuation: str, finished: bool) -> str:
    """The code of a base model: what it wrote up to `code_end`, after the stub when one was to be completed.

    Of an answer that ran out of tokens only the whole statements at its end are kept.
    """
    stub = prompt if is_stub(prompt) else ""
    code = stub + continuation
    code = code[: code_end(code)].strip("\n").rstrip()
    if finished or compile_error(code) is None:
        return code
    lines = code.splitlines()
    for end in range(len(lines) - 1, 0, -1):
        shorter = "\n".join(lines[:end]).rstrip()
        if DEFINES.search(shorter) and compile_error(shorter) is None:
            return shorter
    return code


# The two together.


@dataclass(frozen=True)
class Style:
    """How a kind of model is asked, and how its answers are read.

    Attributes:
        direct: task -> prompt for code.
        plan: task -> prompt for a plan.
        code: task, plan -> prompt for the code of the plan.
        ends: whether the code in an answer so far is complete.
        plan_ends: the same of a plan.
        read: task, answer, whether it ended by itself -> code.
        read_plan: answer -> plan.
    """

    direct: Callable[[str], str]
    plan: Callable[[str], str]
    code: Callable[[str, str], str]
    ends: Callable[[str], bool]
    plan_ends: Callable[[str], bool]
    read: Callable[[str, str, bool], str]
    read_plan: Callable[[str], str]


CHAT = Style(
    direct_prompt, plan_prompt, code_prompt, answer_ends, plan_ends, lambda task, text, finished: code_of(text), plan_of
)
COMPLETION = Style(
    docstring_prompt,
    comment_prompt,
    docstring_prompt,
    lambda text: code_end(text) is not None,
    comment_plan_ends,
    continued_code,
    comment_plan,
)
