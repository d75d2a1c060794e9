"""What an answer says: its plan, its code, whether that is whole, and whether it is Python.

Models answer in tags, `<PLAN>` and `<CODE>`, or as they please: Markdown fences of all kinds and prose around the code
are understood too, and what is thought before the answer is no part of it. Of several fences the one that defines what
the task asks for is the answer, with the imports and helpers that it needs from the others. What a plain base model
wrote is the continuation of its prompt.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from common.generation.result import final_answer
from common.tasks.codegen import source
from common.tasks.codegen.prompt import is_stub, names_asked_for

PLAN = re.compile(r"<PLAN>[ \t]*\n?(.*?)(?:</PLAN>|(?=<CODE>)|\Z)", re.DOTALL | re.IGNORECASE)
CODE = re.compile(
    r"<CODE>[ \t]*\n?((?:(?!<CODE>).)*?)(</CODE>|(?=<CODE>)|\Z)|\[PYTHON\][ \t]*\n?(.*?)(\[/PYTHON\]|\Z)",
    re.DOTALL | re.IGNORECASE,
)
OPENING = re.compile(r"(.*?)(`{3,}|~{3,})[ \t]*([^`~]*)")
ONE_LINE = re.compile(r"(.*?)(`{3,})([^`]+)\2.*")
MARKER = re.compile(r"[ \t]*(?:[-*+>]|\d+[.)])?[ \t]*")  # what stands before a fence in a list or a quotation
INLINE = re.compile(r"`([^`\n]+)`")
PYTHON = ("", "python", "python3", "py", "py3", "ipython", "ipython3", "pycon")
DEFINES = re.compile(r"(?:async )?def |class ")
ASSIGNS = re.compile(r"[A-Za-z_]\w* *(?::[^=]+)?= *[^=\s]|#")
STARTS_CODE = re.compile(r"(?:async )?def |class |import \w|from \w[\w.]* import |@\w")


@dataclass(frozen=True)
class ExtractedCode:
    """Code in an answer.

    Attributes:
        text: the code.
        closed: its tag or its fence is, so that no more of it comes.
    """

    text: str
    closed: bool


@dataclass(frozen=True)
class Block:
    """A fence of an answer: its language ("" where none is given), its code, and whether it is closed."""

    language: str
    code: str
    closed: bool

    @property
    def is_python(self) -> bool:
        """It says so, or it defines something in Python."""
        return self.language in PYTHON or bool(source.defined_names(self.code))


# Chat answers.


def plan_of(text: str) -> str:
    """The plan in an answer: what its `<PLAN>` tags hold, else all of it up to the code.

    Markdown around it goes: a fence that the plan stands in, and a heading before it.
    """
    text = after_thinking(text)
    match = PLAN.search(text)
    plan = match[1] if match else re.split(r"<CODE>|\[PYTHON\]", text, maxsplit=1, flags=re.IGNORECASE)[0]
    kept, blocks = _split_fences(plan)
    prose = re.sub(r"^(?:#+ .*|\*\*[^*\n]*\*\*:?|[^\n]*\bplan\b[^\n]*:)[ \t]*$", "", kept[0], flags=re.M | re.I)
    if not prose.strip() and blocks and blocks[0].language not in PYTHON[1:] and compile_error(blocks[0].code):
        prose = blocks[0].code
    return (prose if prose.strip() or not match else plan).strip("\n").rstrip()


def code_of(text: str, names: Sequence[str] = ()) -> str:
    """The code in an answer: in tags, in Markdown fences, or bare with prose around it.

    A tag or fence that was not closed reaches to the end. Around bare code, prose is dropped as far as what is left is
    Python.

    Args:
        names: what the code has to define, as far as that is known.
    """
    return find_code(text, names).text


def find_code(text: str, names: Sequence[str] = ()) -> ExtractedCode:
    """As `code_of`, with whether the code is closed."""
    text = PLAN.sub("", after_thinking(text))
    tagged = [ExtractedCode(match[1] or match[3] or "", bool(match[2] or match[4])) for match in CODE.finditer(text)]
    if tagged:
        tag = max(tagged, key=lambda tag: _rank(tag.text, names))
        fenced = _fenced_code(tag.text, names)
        return ExtractedCode(fenced.text if fenced else _tidy(tag.text), tag.closed or bool(fenced and fenced.closed))
    fenced = _fenced_code(text, names)
    if fenced:
        return fenced
    text = _tidy(text)
    return ExtractedCode(text if compile_error(text) is None else _bare_code(text), False)


def answer_ends(text: str, names: Sequence[str] = ()) -> bool:
    """Whether an answer's code is complete: its tag is closed, or a fence that has all that was asked for.

    Args:
        names: what the code has to define. Where that is not known no fence ends an answer: another may follow.
    """
    if not re.search(r"```|~~~|</code>|\[/python\]", text[-80:], re.IGNORECASE):
        return False
    text = PLAN.sub("", after_thinking(text))
    if any((match[2] or match[4]) and (match[1] or match[3]).strip() for match in CODE.finditer(text)):
        return True
    code = find_code(text, names)
    if not names or not code.closed or compile_error(code.text) is not None:
        return False
    return set(names) <= source.defined_names(code.text) and not source.missing_names(code.text)


def marked_lines(text: str, names: Sequence[str] = ()) -> str:
    """The whole lines of code that a growing answer has in a tag or fence so far; "" before it defines anything."""
    whole = PLAN.sub("", after_thinking(text[: text.rfind("\n") + 1]))
    if not CODE.search(whole) and not _split_fences(whole)[1]:
        return ""
    code = find_code(whole, names).text
    return code if CODE.search(whole) or source.defined_names(code) else ""


def plan_ends(text: str) -> bool:
    """Whether a chat answer's plan is complete."""
    return "</plan>" in after_thinking(text).lower()


def after_thinking(text: str) -> str:
    """An answer without what is thought before it (`final_answer`), with the line ends of Unix."""
    return final_answer(text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", ""))


def _tidy(code: str) -> str:
    return code.strip("\n").rstrip()


def _split_fences(text: str) -> tuple[list[str], list[Block]]:
    """(the prose before the first fence and the rest of it, the fences) of Markdown text."""
    prose: tuple[list[str], list[str]] = ([], [])
    blocks: list[Block] = []
    lines = text.split("\n")
    index = 0
    while index < len(lines):
        if match := ONE_LINE.fullmatch(lines[index]):
            language, _, rest = match[3].strip().partition(" ")
            if STARTS_CODE.match(rest.strip()):
                blocks.append(Block(language.lower(), rest.strip(), True))
                index += 1
                continue
        opening = OPENING.fullmatch(lines[index])
        language, _, rest = (opening[3].strip() if opening else "").partition(" ")
        language = re.sub(r"[^\w+#]", "", re.sub(r"[\d.]+$", "", language)).lower()
        at_start = opening and MARKER.fullmatch(opening[1])
        if not opening or not (at_start or (language and language in PYTHON)):
            prose[bool(blocks)].append(lines[index])
            index += 1
        elif language in ("markdown", "md"):  # of an answer that is a document as a whole
            index += 1
        else:
            if STARTS_CODE.match(rest):
                lines[index] = rest  # the code starts on the line of the fence
            else:
                index += 1
            code, closed, index = _fence_content(lines, index, opening[1] if at_start else "", opening[2])
            blocks.append(Block(language, code, closed))
    return ["\n".join(part) for part in prose], blocks


def _fence_content(lines: Sequence[str], start: int, lead: str, fence: str) -> tuple[str, bool, int]:
    """(content, whether it is closed, index of the line after) of a fence that was opened before line `start`.

    A fence inside a string, as a docstring has it, closes nothing, unless that string never ends.

    Args:
        lead: what stood before the opening fence: its indentation, a list's marker or a quotation's.
    """
    closing = re.compile(rf"(.*?)(?:{re.escape(fence[0])}{{{len(fence)},}})[ \t]*")
    another = re.compile(rf"[ \t]*{re.escape(fence[0])}{{{len(fence)},}}[ \t]*\w+[ \t]*")
    content: list[str] = []
    in_string: tuple[str, bool, int] | None = None
    for index in range(start, len(lines)):
        line = re.sub(r"^[ \t]*> ?", "", lines[index]) if ">" in lead else lines[index]
        reopened = another.fullmatch(line)
        match = closing.fullmatch(line)
        if match or reopened:
            rest = [match[1]] if match and match[1].strip() else []
            end = (_dedented([*content, *rest], lead), True, index if reopened else index + 1)
            if not source.inside_string("\n".join([*content, *(rest or [""])])):
                return end
            in_string = in_string or end
        content.append(line)
    return in_string or (_dedented(content, lead), False, len(lines))


def _dedented(content: Sequence[str], lead: str) -> str:
    """The lines of a fence without the indentation of the fence itself."""
    indents = [len(line) - len(line.lstrip()) for line in content if line.strip()]
    width = 0 if ">" in lead else min([len(lead), *indents])
    code = _tidy("\n".join(line[width:] for line in content))
    return code if compile_error(code) is None else _tidy(textwrap.dedent("\n".join(content)))


def _fenced_code(text: str, names: Sequence[str]) -> ExtractedCode | None:
    """The fence that is the answer, with what it needs of others; None where no fence is."""
    prose, blocks = _split_fences(text)
    blocks = [Block(block.language, _without_prompts(block.code), block.closed) for block in blocks]
    python = [block for block in blocks if block.is_python and block.code.strip()]
    defining = [block for block in python if source.defined_names(block.code)]
    main = _best(defining, names)
    if main is None:
        bare = _bare_code(_tidy(prose[0]))
        if source.defined_names(bare):  # the fence around it was only closed, not opened
            return ExtractedCode(bare, bool(blocks))
        said = [block for block in python if block.language and compile_error(block.code) is None]
        main = next(iter([*said, *(block for block in python if compile_error(block.code) is None), *python]), None)
    if main is None:
        return None
    others = [block for block in python if block is not main]
    code = source.with_missing(main.code, [block.code for block in others])
    of_closed = source.with_missing(main.code, [block.code for block in others if block.closed])
    return ExtractedCode(code, main.closed and code == of_closed)


def _best(blocks: Sequence[Block], names: Sequence[str]) -> Block | None:
    """The first of those that define most of `names`, preferably one that compiles."""

    return max(blocks, key=lambda block: _rank(block.code, names), default=None)  # the first of equals


def _rank(code: str, names: Sequence[str]) -> tuple[int, bool, bool]:
    return len(source.defined_names(code) & set(names)), compile_error(code) is None, bool(code.strip())


def _without_prompts(code: str) -> str:
    """Code that was shown as a session of the interpreter, without its prompts and what they print."""
    lines = code.splitlines()
    if not lines or not lines[0].startswith(">>> "):
        return code
    return _tidy("\n".join(line[4:] for line in lines if line.startswith((">>> ", "... ")) or line in (">>>", "...")))


def _bare_code(text: str) -> str:
    """The lines from the first that starts code to the last with which they are Python; `text` if there are none."""
    lines = _without_prompts(text).splitlines()
    first = next((i for i, line in enumerate(lines) if STARTS_CODE.match(line)), None)
    if first is None:
        first = next((i for i, line in enumerate(lines) if STARTS_CODE.match(line.lstrip())), None)
        if first is not None:  # indented as a whole, as Markdown has code without a fence
            width = len(lines[first]) - len(lines[first].lstrip())
            return _bare_code("\n".join(line[min(width, len(line) - len(line.lstrip())) :] for line in lines[first:]))
        inline = (match[1] for match in INLINE.finditer(text) if STARTS_CODE.match(match[1]))
        return next((code for code in inline if compile_error(code) is None), text)
    before = first
    while before and (not lines[before - 1].strip() or ASSIGNS.match(lines[before - 1])):  # constants above it
        before -= 1
        first = before if lines[before].strip() else first
    for end in range(len(lines), first, -1):
        code = "\n".join(lines[first:end])
        if compile_error(code) is None:
            return _definitions(code).rstrip()
    return "\n".join(lines[first:])


def _definitions(code: str) -> str:
    """Bare code up to its last definition, where words that happen to be Python follow ("Done")."""
    body = ast.parse(code).body
    while len(body) > 1 and isinstance(body[-1], ast.Expr) and isinstance(body[-1].value, ast.Name | ast.Constant):
        del body[-1]
    return "\n".join(code.splitlines()[: body[-1].end_lineno])


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


def read_chat(task: str, text: str, finished: bool) -> tuple[str, bool]:
    """(the code in a chat answer, with what of a stub it lacks; whether it is cut off).

    Args:
        finished: the answer ended by itself, not with its budget of tokens.
    """
    names = names_asked_for(task)
    code = find_code(text, names)
    if finished or code.closed:
        return source.with_stub(task, code.text), False
    whole, cut = cut_back(code.text, names)
    return source.with_stub(task, whole), cut


def cut_back(code: str, names: Sequence[str]) -> tuple[str, bool]:
    """(whole statements of code that ran out of tokens, whether some of what was asked for may be missing).

    Args:
        names: what the code has to define; where that is not known, code that ran out is always cut.
    """
    lines = code.splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"[^\s#)\]}]", line)]
    whole = _tidy("\n".join(lines[: starts[-1]])) if starts else ""
    if names and set(names) <= source.defined_names(whole) and not source.missing_names(whole):
        return whole, False  # what was begun after it is not needed
    for end in range(len(lines) - 1, 0, -1):  # the last line may be half of one
        shorter = _tidy("\n".join(lines[:end]))
        if DEFINES.search(shorter) and compile_error(shorter) is None:
            return shorter, True
    return code, True


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
    position = 0
    for line in code.splitlines(keepends=True):
        if defined and not re.match(r"[\s@)#\]}]", line) and not STARTS_CODE.match(line):
            return position
        defined = defined or DEFINES.match(line) is not None
        position += len(line)
    return None


def continued_code(prompt: str, continuation: str, finished: bool) -> tuple[str, bool]:
    """(the code of a base model, whether it is cut off): what it wrote up to `code_end`, after the stub of the prompt.

    Of an answer that ran out of tokens only the whole statements are kept.
    """
    stub = prompt if is_stub(prompt) else ""
    code = stub + continuation
    end = code_end(code)
    code = _tidy(code[:end])
    return (code, False) if finished or end is not None else cut_back(code, names_asked_for(prompt))
