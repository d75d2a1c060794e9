"""Answers of all shapes, the code that is in each, and where generation may end: never before that code is there."""

from __future__ import annotations

import pytest

from common.tasks.codegen import answer

ADD = "def add(a, b):\n    return a + b"
AREA = "def area(r):\n    return math.pi * r ** 2"
WITH_IMPORT = f"import math\n\n\n{AREA}"
HELPED = "def cube(x):\n    return times(x, times(x, x))"
SUM = "def add(a, b):\n    return sum((a, b))"
BASE = "def f(x):\n    return x * BASE"
BROKEN = "def add(a, b:\n    return a"
CUT = "def cut(s):\n    return s.split('</think>')[-1]"
SESSION = ">>> def add(a, b):\n...     return a + b"
ASYNC = "async def add(a, b):\n    return a + b"
ONE_LINE = "def add(a, b): return a + b"
TIMES = "def times(a, b):\n    return a * b"
DOCSTRING = 'def add(a, b):\n    """Adds.\n\n    ```\n    add(1, 2)  # 3\n    ```\n    """\n    return a + b'
MARKDOWN = "def fence(code):\n    return '```python\\n' + code + '\\n```'"
CLASS = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)"""


def indented(text: str, by: str) -> str:
    return "\n".join(by + line if line else line for line in text.split("\n"))


def fence(code: str, language: str = "python", mark: str = "```") -> str:
    return f"{mark}{language}\n{code}\n{mark}"


# name: (answer, what the task asks for, the code)
SHAPES = {
    "bare": (ADD, "add", ADD),
    "bare, prose before": (f"Here is the function:\n\n{ADD}", "add", ADD),
    "bare, prose after": (f"{ADD}\n\nThis function takes two numbers and adds them.", "add", ADD),
    "bare, a word after": (f"{ADD}\nDone", "add", ADD),
    "bare, a closed fence after": (f"{ADD}\n```\n\nIt adds the two numbers.", "add", ADD),
    "bare, a closed fence and a usage fence": (f"{ADD}\n```\nUse it so:\n{fence('print(add(1, 2))')}", "add", ADD),
    "bare, indented as a whole": (f"Like so:\n\n{indented(ADD, '    ')}", "add", ADD),
    "a fence": (fence(ADD), "add", ADD),
    "a fence without a language": (fence(ADD, ""), "add", ADD),
    "a fence of Python 3": (fence(ADD, "python3"), "add", ADD),
    "a fence of a version": (fence(ADD, "python3.11"), "add", ADD),
    "a fence in capitals": (fence(ADD, "PYTHON"), "add", ADD),
    "a fence with a title": (fence(ADD, 'python title="add.py"'), "add", ADD),
    "a fence in braces": (fence(ADD, "{python}"), "add", ADD),
    "a fence of plain text": (fence(ADD, "plaintext"), "add", ADD),
    "a fence that is not closed": (f"Sure:\n```python\n{ADD}", "add", ADD),
    "a fence closed on the last line": (f"Sure:\n```python\n{ADD}```\nThat is all.", "add", ADD),
    "a fence on one line": (f"It is short: ```python {ONE_LINE}```", "add", ONE_LINE),
    "code on the line of the fence": ("```python def add(a, b):\n    return a + b\n```", "add", ADD),
    "a fence after prose on its line": (f"The function is: ```python\n{ADD}\n```", "add", ADD),
    "four backticks": (fence(ADD, mark="````"), "add", ADD),
    "four backticks around a fence": (fence(MARKDOWN, mark="````"), "fence", MARKDOWN),
    "tildes": (fence(ADD, mark="~~~"), "add", ADD),
    "tildes around backticks": (fence(DOCSTRING, mark="~~~"), "add", DOCSTRING),
    "CRLF": (f"Sure:\n{fence(ADD)}\nDone.".replace("\n", "\r\n"), "add", ADD),
    "a byte order mark": ("\ufeff" + ADD, "add", ADD),
    "indented in a list": (f"1. The code:\n{indented(fence(ADD), '   ')}\n2. Run it.", "add", ADD),
    "after a list's marker": (f"- ```python\n{indented(ADD, '  ')}\n  ```", "add", ADD),
    "indented, its content not": (f"  ```python\n{ADD}\n  ```", "add", ADD),
    "in a quotation": ("> " + fence(ADD).replace("\n", "\n> "), "add", ADD),
    "a document as a whole": (f"```markdown\n# Adding\n{fence(ADD)}\n```", "add", ADD),
    "a shell fence before": (f"{fence('pip install numpy', 'bash')}\nThen:\n{fence(ADD)}", "add", ADD),
    "a data fence before": (f"For\n{fence('[3, 1, 2]', '')}\nthis:\n{fence(ADD)}", "add", ADD),
    "a JSON fence before": (f"{fence('{1: 2}', 'json')}\n{fence(ADD)}", "add", ADD),
    "a usage fence before": (f"It is called so:\n{fence('add(1, 2)')}\n{fence(ADD)}", "add", ADD),
    "a usage fence after": (f"{fence(ADD)}\nExample:\n{fence('print(add(1, 2))')}", "add", ADD),
    "a test fence after": (f"{fence(ADD)}\nTests:\n{fence('assert add(1, 2) == 3')}", "add", ADD),
    "an output fence after": (f"{fence(ADD)}\nprints\n{fence('3', '')}", "add", ADD),
    "imports in a fence before": (f"First:\n{fence('import math')}\nthen:\n{fence(AREA)}", "area", WITH_IMPORT),
    "imports in a fence after": (f"{fence(AREA)}\nand on top:\n{fence('import math')}", "area", WITH_IMPORT),
    "a helper in a fence before": (f"{fence(TIMES)}\nwith which:\n{fence(HELPED)}", "cube", f"{TIMES}\n\n\n{HELPED}"),
    "a helper in a fence after": (f"{fence(HELPED)}\nwith:\n{fence(TIMES)}", "cube", f"{TIMES}\n\n\n{HELPED}"),
    "a helper that is not needed": (f"{fence(TIMES)}\nbut simpler:\n{fence(ADD)}", "add", ADD),
    "a constant in a fence before": (f"{fence('BASE = 2')}\n{fence(BASE)}", "f", f"BASE = 2\n\n\n{BASE}"),
    "another function before": (f"{fence(TIMES)}\nNow the one you asked for:\n{fence(ADD)}", "add", ADD),
    "a draft that is no Python before": (f"{fence(BROKEN)}\nBetter:\n{fence(ADD)}", "add", ADD),
    "two ways to do it": (f"{fence(ADD)}\nOr:\n{fence(SUM)}", "add", ADD),
    "a fence in a docstring": (fence(DOCSTRING), "add", DOCSTRING),
    "a fence in a string": (fence(MARKDOWN), "fence", MARKDOWN),
    "a fence that is opened again": (f"```python\nimport math\n```python\n{AREA}\n```", "area", WITH_IMPORT),
    "thinking": (f"<think>Perhaps\n{fence(TIMES)}\nNo.</think>\n{fence(ADD)}", "add", ADD),
    "the end of thinking alone": (f"Perhaps\n{fence(ADD.replace('+', '-'))}\nNo.</think>\n\n{fence(ADD)}", "add", ADD),
    "thinking, then bare code": (f"<thinking>\nEasy.\n</thinking>\n{ADD}", "add", ADD),
    "the word for thinking in a string": (fence(CUT), "cut", CUT),
    "CODE tags": (f"<CODE>\n{ADD}\n</CODE>", "add", ADD),
    "CODE tags around a fence": (f"<CODE>\n{fence(ADD)}\n</CODE>\nDone.", "add", ADD),
    "CODE tags talked of": (f"I write it in <CODE> tags.\n<CODE>\n{ADD}\n</CODE>", "add", ADD),
    "PYTHON tags": (f"[PYTHON]\n{ADD}\n[/PYTHON]\n[TESTS]\nassert add(1, 2) == 3\n[/TESTS]", "add", ADD),
    "PLAN and CODE": (f"<PLAN>\n- Use {fence('a + b')}\n</PLAN>\n<CODE>\n{ADD}\n</CODE>", "add", ADD),
    "a session": (f"{SESSION}\n...\n>>> add(1, 2)\n3", "add", f"{ADD}\n\nadd(1, 2)"),
    "a session in a fence": (fence(SESSION, "pycon"), "add", ADD),
    "inline": (f"Just use `{ONE_LINE}`, that is all.", "add", ONE_LINE),
    "a class": (f"{fence('stack = Stack()')}\n{fence(CLASS)}", "Stack", CLASS),
    "a lambda": (fence("add = lambda a, b: a + b"), "add", "add = lambda a, b: a + b"),
    "an async function": (fence(ASYNC), "add", ASYNC),
    "a script": (f"Run this:\n{fence('print(1 + 2)')}", "", "print(1 + 2)"),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_code_is_found(shape):
    text, name, code = SHAPES[shape]
    names = [name] if name else []
    assert answer.code_of(text, names) == code
    assert answer.compile_error(code) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_generation_does_not_end_before_the_code(shape):
    """Where an answer ends while it grows, all of its code is there."""
    text, name, code = SHAPES[shape]
    if "</think>" in text and "<think>" not in text:  # the prompt had it, which the writer knows
        text = f"<think>{text}"
    end = next((i for i in range(len(text)) if answer.answer_ends(text[:i], [name] if name else [])), None)
    assert end is None or answer.code_of(text[:end], [name]) == code


def test_most_fences_end_an_answer():
    """Which saves the words after them."""
    for shape in ("a fence", "CRLF", "a usage fence before", "imports in a fence before", "a fence in a docstring"):
        text, name, _ = SHAPES[shape]
        assert answer.answer_ends(text.removesuffix("\r\nDone."), [name])
    text, name, _ = SHAPES["imports in a fence after"]
    assert not answer.answer_ends(text[: text.index("and on top")], [name])


@pytest.mark.parametrize("text", ["<think>\nPerhaps\n```python\ndef add(a, b):\n    return", "<thinking>Well"])
def test_what_is_still_thought_is_no_code(text):
    assert answer.code_of(text, ["add"]) == ""
    assert answer.marked_lines(text + "\n", ["add"]) == ""
    assert not answer.answer_ends(text + "\n```", ["add"])
    assert answer.plan_of(text) == ""


@pytest.mark.parametrize(
    ("text", "code", "cut"),
    [
        (f"```python\n{ADD}\n\n\ndef more(x):\n    if x:\n        retu", ADD, False),
        (f"```python\nimport math\n\n\n{ADD}\n\n\nprint(add(", f"import math\n\n\n{ADD}", False),
        ("```python\ndef add(a, b):\n    total = a\n    total += b\n    retu",
         "def add(a, b):\n    total = a\n    total += b", True),
        ("def add(a, b):\n    total = a\n    if b:\n        total +", "def add(a, b):\n    total = a", True),
        ("<CODE>\ndef help(x):\n    return x\n\n\ndef add(a, b", "def help(x):\n    return x", True),
        ("```python\ndef add(a,", "def add(a,", True),
        (f"```python\n{ADD}\n```\nNow let me expl", ADD, False),
    ],
)  # fmt: skip
def test_an_answer_that_ran_out_of_tokens_has_whole_statements_or_is_marked(text, code, cut):
    assert answer.read_chat("Write add(a, b).", text, False) == (code, cut)


@pytest.mark.parametrize(
    "text",
    [
        "<PLAN>\n1. Add.\n2. Return.\n</PLAN>",
        "<think>Hm.</think><PLAN>\n1. Add.\n2. Return.\n</PLAN>\n<CODE>\nx\n</CODE>",
        "```\n1. Add.\n2. Return.\n```",
        "```plaintext\n1. Add.\n2. Return.\n```\n",
        "Here is the plan:\n\n1. Add.\n2. Return.\n\n```python\nx = 1\n```",
        "### Plan\n1. Add.\n2. Return.",
        "**Plan:**\n\n```markdown\n1. Add.\n2. Return.\n```",
        "<PLAN>\n```\n1. Add.\n2. Return.\n```\n</PLAN>",
    ],
)
def test_a_plan_is_found_in_any_dress(text):
    assert answer.plan_of(text) == "1. Add.\n2. Return."
