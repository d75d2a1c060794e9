"""Prompts, and what answers to them say."""

from __future__ import annotations

import ast
import itertools

import pytest

from common.tasks.codegen import answer, prompt
from common.tasks.codegen.style import CHAT, COMPLETION

CODE = "def add(a, b):\n    return a + b"
STUB = 'from typing import List\n\n\ndef first(items: List[int]) -> int:\n    """ The first of items\n    """\n'


@pytest.mark.parametrize(
    "text",
    [
        CODE,
        f"\n\n{CODE}\n",
        f"<CODE>\n{CODE}\n</CODE>",
        f"<CODE>\n{CODE}\n</CODE>\nThis adds two numbers.",
        f"<CODE>\n{CODE}",
        f"<code>{CODE}</code>",
        f"<PLAN>\n- Add a and b.\n</PLAN>\n<CODE>\n{CODE}\n</CODE>",
        f"<PLAN>\n- Add a and b.\n<CODE>\n{CODE}\n</CODE>",
        f"<PLAN>\n- Use ```python\n- Add.\n</PLAN>\n{CODE}",
        f"```python\n{CODE}\n```",
        f"Here you are:\n\n```Python\n{CODE}\n```\n\nAnd so it is used:\n\n```python\nadd(1, 2)\n```\n",
        f"```\n{CODE}\n```",
        f"```py\n{CODE}",
        f"  ```python\n{CODE}\n  ```",
        f"Install it first:\n```bash\npip install x\n```\nThen:\n```python\n{CODE}\n```",
        f"<CODE>\n```python\n{CODE}\n```\n</CODE>",
        f"Sure! Here is the function:\n\n{CODE}\n\nIt adds two numbers, that's all.",
    ],
)
def test_code_is_found_in_any_style(text):
    assert answer.code_of(text) == CODE


def test_broken_code_is_kept():
    assert answer.code_of("<CODE>\ndef f(:\n</CODE>") == "def f(:"
    assert answer.code_of("def f(:") == "def f(:"
    assert answer.code_of("I cannot do that.") == "I cannot do that."
    assert answer.code_of("") == ""


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (CODE, None),
        ("x = 1 is 1", None),  # a warning is no error
        ("", "there is no code"),
        ("  \n", "there is no code"),
        ("def f(:", "line 1: invalid syntax"),
        ("return 1", "line 1: 'return' outside function"),
        ("x = '\0'", "source code string cannot contain null bytes"),
    ],
)
def test_compile_errors(code, error):
    assert answer.compile_error(code) == error
    assert answer.compile_error("(" * 5000) is not None


def test_an_answer_ends_where_its_code_is_closed():
    for start, end in (("<CODE>\n", "</CODE>"), ("Yes:\n```python\n", "```")):
        text = f"{start}{CODE}\n{end}"
        ended = [answer.answer_ends(text[:i], ["add"]) for i in range(len(text) + 1)]
        assert ended == [False] * len(text) + [True]
    assert not answer.answer_ends(f"Yes:\n```python\n{CODE}\n```", ["plus"])
    assert not answer.answer_ends(f"Yes:\n```python\n{CODE}\n```")  # who knows what is asked for
    assert not answer.answer_ends("```bash\npip install x\n```\n")
    assert not answer.answer_ends(CODE)
    assert answer.plan_ends("<PLAN>\n- a\n</PLAN>") and not answer.plan_ends("<PLAN>\n- a\n")


def test_lines_that_are_shown_do_not_change_any_more():
    text = f"Well:\n```python\n{CODE}\n\n\nadd(1, 2)\n```\nThat is all.\n"
    shown = [answer.marked_lines(text[:i]) for i in range(len(text) + 1)]
    for earlier, later in itertools.pairwise(shown):
        assert later.startswith(earlier)
    assert shown[-1] == answer.code_of(text)
    assert "def add(a, b):" in shown and "" in shown


def test_plans_are_read_back_from_answers():
    plan = prompt.plan_text(["Loop:", "  Add x to total.", "Return total."])
    assert plan == "- Loop:\n  - Add x to total.\n- Return total."
    assert answer.plan_of(prompt.plan_answer(plan)) == plan
    assert answer.plan_of(f"<PLAN>\n{plan}\n<CODE>\nx") == plan
    assert answer.plan_of(f"{plan}\n```python\nx = 1\n```") == plan


def test_training_pairs_are_what_inference_asks_and_reads():
    """One adapter learns all three turns; each answer reads back as what it was made of, and ends its turn."""
    (ask, code), (ask_plan, plan), (ask_code, again) = prompt.training_pairs("Add.", ["Add a and b."], CODE)
    style = CHAT
    assert ask == style.direct("Add.") == "Add." and ask_plan == style.plan("Add.")
    assert ask_code == style.code("Add.", style.read_plan(plan)) and code == again
    assert style.read("Add.", code, True) == (CODE, False)
    assert style.ends("Add.", code) and style.plan_ends(plan)


# A plain base model's text.


def test_stubs_are_told_from_words():
    assert prompt.is_stub(STUB)
    assert prompt.names_asked_for("word " * 4000 + "\nassert " + "word " * 4000) == ()
    assert not any(map(prompt.is_stub, ["Write a function.", CODE, "import os", "", "def f(:", "word " * 4000]))
    assert prompt.direct_prompt(STUB).startswith("Complete this Python function:\n\nfrom typing")
    assert prompt.docstring_prompt(STUB) == STUB


def test_completion_prompts_are_python_that_stays_open():
    task = 'Say """hello""" \\ twice.'
    assert ast.get_docstring(ast.parse(prompt.docstring_prompt(task))) == "Say '''hello''' \\ twice."
    assert prompt.docstring_prompt("Add.", "- a\n- b") == '"""\nAdd.\n"""\n# Plan:\n# - a\n# - b\n'
    assert prompt.docstring_prompt(STUB, "- a").endswith(STUB)
    ast.parse(prompt.docstring_prompt(task, "- a"))
    assert answer.comment_plan(" Add them.\n# - Return.\n\ndef f(): ...") == "- Add them.\n- Return."
    assert not answer.comment_plan_ends(" Add them.\n# - Ret") and answer.comment_plan_ends(" Add.\ndef")


@pytest.mark.parametrize(
    "rest",
    ["print(add(1, 2))", "assert add(1, 2) == 3", "if __name__ == 'x':\n    add()", '"""\nNext', "x = 3", "```\nSo"],
)
def test_completions_end_where_no_definition_goes_on(rest):
    helper = f"import math\n\n\ndef help(x):\n    return x\n\n\n{CODE}"
    text = f"{helper}\n\n{rest}"
    assert answer.continued_code("Add.", text, True) == (helper, False)
    assert COMPLETION.ends("Add.", text) and not COMPLETION.ends("Add.", helper + "\n\n")
    assert answer.continued_code(STUB, f"    return items[0]\n\n{rest}", True) == (f"{STUB}    return items[0]", False)


def test_a_completion_that_ran_out_of_tokens_keeps_its_whole_statements():
    more = f"{CODE}\n\n\ndef more(a):\n    return a["
    assert answer.continued_code("Write add(a, b).", more, False) == (CODE, False)  # what was begun is not asked for
    assert answer.continued_code("Write more(a).", more, False) == (CODE, True)
    assert answer.continued_code("Add.", more, False) == (CODE, True)
    assert answer.continued_code("Add.", "def f(a):\n    return a[", False) == ("def f(a):\n    return a[", True)
