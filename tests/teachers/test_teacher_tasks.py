"""What a teacher is asked of a row, and what of its answers can be used."""

from __future__ import annotations

import json
import re

import pytest
from support.inputs import write_rows
from support.teacher import SCHEMA, error, generate, lines, numbered, question_of, rejects_of, run_of

from common import cli
from common.cli import UserError
from common.sandbox import box as sandbox
from common.tasks.codegen import prompt as codegen
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.task import LabelTask
from common.teachers.tasks import Code, Documents, Item, Labels, UnusableAnswer, read_items, understand


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Good", "Good"), (" bad.\n", "Bad"), ("**Standard**", "Standard"), ("Label: Good", "Good"),
        ("<think>Bad? No.</think>\n\n`Good`", "Good"), ("Goods", None), ("Good or Bad", None), ("not Good", None),
        ("", None), ("<think>Good</think>", None), ("Average", None), ("Bad? No, never.</think>Good", "Good"),
        ("<think>Good", None), ("<think>\nBad.\n</think>Bad</think>\n\nGood", "Good"),
    ],
)  # fmt: skip
def test_labels(text, label):
    parsed = understand(Labels(CREDITMIX), "?", text, True, False)
    assert parsed.answer == label and (parsed.fault is None) == (label is not None)


def test_a_question_may_have_any_shape(tmp_path):
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "Good"}]
    rows = [{"input": "Which?", "output": "Good"}, {"messages": turns}, {"prompt": "Which?", "completion": "Good"}]
    items = read_items(write_rows(tmp_path / "rows.jsonl", rows), Labels(CREDITMIX))
    assert [(item.number, item.prompt, item.gold) for item in items] == [(n, "Which?", "Good") for n in (1, 2, 3)]


def test_a_text_that_is_cut_off_in_its_thinking():
    assert "breaks off" in understand(Labels(CREDITMIX), "?", "<think>Good", False, False).fault


def test_labels_that_differ_in_marks_and_other_words():
    task = Labels(LabelTask("languages", ("C", "C#", "Go"), "Which?", verbalizers={"Go": ["Golang"]}))
    assert [task.parse(text) for text in ("C", "C#", "golang", "Language: C#")] == ["C", "C#", "Go", "C#"]
    with pytest.raises(UnusableAnswer, match="one of C, C#, Go and nothing else"):
        task.parse("c")  # which of the two?


def test_an_unusable_answer_is_asked_for_again_with_the_reason(stub, files):
    rows = numbered(3, output="Good")
    said = ["I think good?", "Standard, or Bad", "Good"]

    def reply(body):
        turn = len(body["messages"]) // 2
        return {"finish_reason": "length", "message": {"content": "Bad"}} if "Age: 22" in question_of(body) else (
            said[turn] if "Age: 21" in question_of(body) else "Good"
        )  # fmt: skip

    stub.reply = reply
    assert generate(stub, *files(rows)) == 0
    assert [(row["input"][-2:], row["teacher_output"]) for row in lines(files.out)] == [("20", "Good"), ("21", "Good")]
    (reject,) = rejects_of(files)
    assert reject["reason"] == "the answer breaks off at --max_new_tokens"
    assert (reject["row"], reject["answers"], reject["unanswered"]) == (3, ["Bad"] * 3, False)
    last = next(body for body in stub.asked if len(body["messages"]) == 5 and "Age: 21" in question_of(body))
    assert [turn["content"] for turn in last["messages"][1:]] == [
        said[0],
        "That cannot be used: the answer must be one of Good, Standard, Bad and nothing else. "
        "Answer again, in the form asked for.",
        said[1],
        last["messages"][2]["content"],
    ]
    assert run_of(files)["requests"]["answers"] == 1 + 3 + 3
    assert run_of(files)["agreement_with_gold"]["of"] == 3  # a rejected row does not agree


def test_no_answer_the_second_time(stub, files):
    stub.reply = lambda body: "hm\ud83d" if len(body["messages"]) == 1 else error(500, "oops")
    assert generate(stub, *files(numbered(1)), "--max_attempts", "2") == cli.FAILED
    (reject,) = rejects_of(files)
    assert (reject["answers"], reject["unanswered"]) == (["hm?"], True)
    assert re.fullmatch(r"the answer must be one .*; asked again: no answer in 2 attempts: 500: oops", reject["reason"])


def test_raw_rows_of_a_label_task(tmp_path, stub, files):
    """Rows of creditmix_prepare.py and of the public CSV; the prompt and the group are prepare's."""
    dev = write_rows(
        tmp_path / "dev.jsonl", [{"question": "Age: 23, Outstanding Debt: 5", "answer": "Bad", "group": "ab" * 8}]
    )
    (item,) = read_items(dev, Labels(CREDITMIX))
    assert item.prompt == CREDITMIX.prompt(CREDITMIX.clean("Age: 23, Outstanding Debt: 5"))
    assert (item.gold, item.kept) == ("Bad", {"output": "Bad", "group": "ab" * 8})
    (tmp_path / "raw.csv").write_text('question,answer\n"Age: 23, Outstanding Debt: 5",_\n')
    (item,) = read_items(str(tmp_path / "raw.csv"), Labels(CREDITMIX))
    assert item.gold is None and item.kept.keys() == {"group"}
    task = tmp_path / "mood.yaml"
    task.write_text("labels: [Up, Down]\ninstruction: Mood?\ngroup_key: who\n")
    data = write_rows(
        tmp_path / "mood.jsonl", [{"text": "fine", "label": "Up", "who": "a"}, {"text": "so", "who": "a"}]
    )
    stub.reply = lambda body: "down"
    argv = ["--data", data, "--out", str(files.out), "--task", str(task)]
    assert generate(stub, *argv) == 0
    first, second = lines(files.out)
    assert first == {"input": "Mood?\n\nfine", "teacher_output": "Down", "output": "Up", "group": first["group"]}
    assert second == {"input": "Mood?\n\nso", "teacher_output": "Down", "group": first["group"]}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('{"total": 5, "company": "A"}', '{"company":"A","total":5}'),
        ('Here it is:\n```json\n{"company": "A",\n "total": 1.50}\n```\nDone.', '{"company":"A","total":1.5}'),
        ('{"company": "A"}', None),
        ("Sorry.", None),
    ],
)
def test_documents(text, answer):
    parsed = understand(Documents(SCHEMA), "?", text, True, False)
    assert parsed.answer == answer
    assert answer or ("schema" if "{" in text else "not JSON") in parsed.fault


def test_documents_end_to_end(tmp_path, stub, files):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    rows = [{"document": f"ACME {i}", "fields": {"company": "ACME", "total": i}, "id": f"d{i}"} for i in range(3)]
    stub.reply = lambda body: json.dumps({"total": 1, "company": "ACME"})
    assert generate(stub, *files(rows), "--task", "idp", "--schema", str(schema)) == 0
    found = lines(files.out)
    assert [row["teacher_output"] for row in found] == ['{"company":"ACME","total":"1"}'] * 3
    assert [row["output"] for row in found] == [f'{{"company":"ACME","total":"{i}"}}' for i in range(3)]
    assert found[1].keys() == {"input", "teacher_output", "id", "output", "group"}
    assert run_of(files)["agreement_with_gold"]["agree"] == 1
    task = Documents(SCHEMA)
    item = Item(1, "?", '{"company":"A","total":1}')
    assert [task.score(item, text) for text in ('{"company":"A","total":1}', '{"company":"A","total":2}')] == [1.0, 0.5]


def test_documents_as_written_and_held():
    row = {"document": "ACME 1.234,50", "fields": {"company": "ACME", "total": 1234.5}}
    written, held = (Documents(SCHEMA, form) for form in ("written", "held"))
    asked, typed = written.item(1, row), held.item(1, row)
    assert (asked.gold, typed.gold) == ('{"company":"ACME","total":"1.234,50"}', '{"company":"ACME","total":1234.5}')
    assert written.parse('{"company": "ACME", "total": "1.234,50 EUR"}', asked.prompt).endswith('"1.234,50 EUR"}')
    assert written.parse('{"company": "ACME", "total": 1234.5}', asked.prompt) == asked.gold
    assert held.parse('{"company": "ACME", "total": 1234.50}', typed.prompt) == typed.gold
    with pytest.raises(UnusableAnswer, match="total: 'much' is no number"):
        written.parse('{"company": "ACME", "total": "much"}', asked.prompt)
    assert written.score(asked, '{"company":"ACME","total":"EUR 1.234,50"}') == 1
    prepared = {"input": asked.prompt, "output": asked.gold}
    assert (held.fault(prepared), held.item(1, prepared).gold) == (None, asked.gold)
    assert "output: " in held.fault(prepared | {"output": '{"company":"ACME"}'})


CODE = "def add(a, b):\n    return a + b"
WRONG = "def add(a, b):\n    return a - b"


@pytest.mark.parametrize(
    ("prompt", "text", "answer", "fault"),
    [
        ("Add.", f"Sure:\n```python\n{CODE}\n```", codegen.code_answer(CODE), None),
        ("Add.", "<CODE>\ndef add(a, b:\n</CODE>", None, "the code does not compile (line 1"),
        ("Add.", f"Perhaps\n```python\n{WRONG}\n```\nNo.</think>\n```\n{CODE}\n```", codegen.code_answer(CODE), None),
        ("Add.", "Sure", None, "there is no code"),
        (codegen.plan_prompt("Add."), "<PLAN>\n- Add.\n</PLAN>", "<PLAN>\n- Add.\n</PLAN>", None),
        (codegen.plan_prompt("Add."), f"<CODE>\n{CODE}\n</CODE>", None, "there is no plan"),
    ],
)
def test_code(prompt, text, answer, fault):
    parsed = understand(Code(False, False), prompt, text, True, False)
    assert parsed.answer == answer
    assert (parsed.fault or "").startswith(fault or "") and bool(parsed.fault) == bool(fault)


def test_code_is_whole_before_it_is_explained():
    """A fence with the function asked for ends an answer, one with its use does not; a plan ends with its tag."""
    ends = Code(False, False).item(1, {"prompt": "Write a function add(a, b)."}).ends
    use, whole = "```python\nprint(add(1, 2))\n```", "```python\ndef add(a, b):\n    return a + b\n```"
    assert [ends(text) for text in ("", use, whole[:-3], whole)] == [False, False, False, True]
    plan = Code(False, False).item(1, {"input": codegen.plan_prompt("Add.")}).ends
    assert [plan(text) for text in ("<PLAN>\n1. add", "<PLAN>\n1. add\n</PLAN>")] == [False, True]


@pytest.mark.processes
def test_code_that_fails_its_tests_is_asked_for_again(tmp_path, stub, files):
    try:
        sandbox.level()
    except UserError as error_:
        pytest.skip(str(error_))
    problem = {"prompt": "Write add(a, b).", "solution": CODE, "tests": ["assert add(2, 3) == 5"]}
    bare = {"prompt": "Write add.", "tests": ["assert add(2, 3) == 5"]}
    stub.reply = lambda body: (WRONG, CODE)[min(1, len(body["messages"]) // 2)]
    argv = [*files([problem]), "--task", "codegen", "--confirm_run_unsafe_code"]
    assert generate(stub, *argv) == 0
    (row,) = lines(files.out)
    assert (row["input"], row["teacher_output"]) == (
        codegen.direct_prompt(problem["prompt"]),
        codegen.code_answer(CODE),
    )
    assert "the code fails its tests (assertion: assert add(2, 3) == 5" in stub.asked[1]["messages"][2]["content"]
    assert run_of(files)["agreement_with_gold"]["agree"] == 1
    assert generate(stub, *files([bare]), "--task", "codegen", "--max_tries", "1") == 0  # no consent: only compiled
    assert lines(files.out)[0]["teacher_output"] == codegen.code_answer(WRONG)
    assert generate(stub, *files([bare]), *argv[4:], "--max_tries", "1") == cli.FAILED
    assert lines(files.out) == [] and "fails its tests" in rejects_of(files)[0]["reason"]


TASKS = {"labels": Labels(CREDITMIX), "documents": Documents(SCHEMA), "code": Code(False, False)}


@pytest.mark.parametrize(
    ("name", "row", "fault"),
    [
        ("documents", {"document": ""}, "'document' must be a non-empty string"),
        ("documents", {"document": "a", "fields": {"company": 3}}, "fields: the JSON does not satisfy the schema"),
        ("documents", {"input": "a", "output": "{"}, "output: the JSON breaks off"),
        ("documents", {"input": "a", "output": {"company": "A"}}, "'output' must be a string"),
        ("labels", {"input": "a", "output": 1}, "'output' must be a string"),
        ("labels", {"question": "Age: 3", "answer": ["Good"]}, "'answer' must be a string"),
        ("code", {"prompt": "a", "tests": "assert f()"}, "'tests' must be a list of texts"),
        ("code", {"prompt": "a", "output": {"code": "f"}}, "'output' must be a string"),
        ("code", {"prompt": "a", "tests": ["f()"], "setup": ["import os"]}, "'setup' must be a string"),
        ("code", {"prompt": "a", "tests": ["f()"], "entry_point": 3}, "'entry_point' must be a string"),
    ],
)
def test_bad_rows_are_named_or_skipped(tmp_path, name, row, fault):
    path = write_rows(tmp_path / "bad.jsonl", [{"input": "fine"}, row])
    with pytest.raises(UserError, match=re.escape(f"bad.jsonl, line 2: {fault}")):
        read_items(path, TASKS[name])
    assert [item.number for item in read_items(path, TASKS[name], skip_bad_rows=True)] == [1]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("key", ["input", "raw"])
def test_what_a_row_may_go_without(name, key):
    """A key that is not there, is null or is empty: so tables say it, Parquet otherwise than CSV."""
    task = TASKS[name]
    key = {"labels": "question", "documents": "document", "code": "prompt"}[name] if key == "raw" else key
    gold = "answer" if key == "question" else "output"
    rows = [{key: "Age: 3"} | dict.fromkeys((gold, "tests", "setup", "entry_point"), value) for value in (None, "")]
    for row in ({key: "Age: 3"}, *rows):
        assert task.fault(row) is None
        item = task.item(1, row)
        assert (item.gold, item.tests) == (None, None) and "Age: " in item.prompt
