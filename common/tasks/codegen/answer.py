"""What an answer says: its plan, its code, where that ends, and whether it is Python.

Models answer in tags, `<PLAN>` and `<CODE>`, or as they please: Markdown fences and prose around the code are
understood too. What a plain base model wrote is the continuation of its prompt.
"""

from __future__ import annotations

import re
import warnings

from common.tasks.codegen.prompt import is_stub

PLAN = re.compile(r"<PLAN>[ \t]*\n?(.*?)(?:</PLAN>|(?=<CODE>)|\Z)", re.DOTALL | re.IGNORECASE)
CODE = re.compile(r"<CODE>[ \t]*\n?(.*?)(</CODE>|\Z)", re.DOTALL | re.IGNORECASE)
FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
PYTHON_FENCES = ("", "python", "python3", "py")
DEFINES = re.compile(r"(?:async )?def |class ")
STARTS_CODE = re.compile(r"(?:async )?def |class |import |from \w[\w.]* import |@\w")


# Chat answers.


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


# Continuations of a plain base model.


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
    index = 0
    for line in code.splitlines(keepends=True):
        if defined and not re.match(r"[\s@)#\]}]", line) and not STARTS_CODE.match(line):
            return index
        defined = defined or DEFINES.match(line) is not None
        index += len(line)
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
