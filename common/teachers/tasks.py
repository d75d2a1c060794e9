"""A teacher's task: rows to prompts, and what of its answers can be trained on.

Three kinds of task (`Labels`, `Documents`, `Code`) share one form: `fault` and `item` read rows, `parse` makes of a
teacher's text the answer that a student is to learn, `check` runs what has to be run, `score` compares with gold.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from common.cli import UserError
from common.data import rows as records
from common.data import splits, training_files
from common.generation import json_schema, json_writer
from common.generation.result import final_answer
from common.sandbox import grading
from common.tasks.codegen import answer as code_answer
from common.tasks.codegen import prompt as code_prompt
from common.tasks.codegen import rows as code_problems
from common.tasks.codegen import source, style
from common.tasks.idp import documents, field_metrics
from common.tasks.idp import prompt as idp_prompt
from common.tasks.idp.copying import Copyist
from common.tasks.idp.written_values import TypedFields
from common.tasks.ranking.task import LabelTask

_ANSWER_LINE = re.compile(r"^[\s*#>_]*answer[\s*_]*:[*_]*", re.IGNORECASE | re.MULTILINE)
_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n[ \t]*```", re.DOTALL | re.IGNORECASE)
_AROUND = " \t\r\n*_`\"'.,;:!()[]<>#"  # what may stand around a label


class UnusableAnswer(ValueError):
    """Why an answer cannot be trained on, in words that the teacher reads when it is asked again."""


@dataclass(frozen=True)
class Item:
    """One row of --data.

    Attributes:
        number: its line (or its index in a list) in the file.
        prompt: what the student is asked, and the teacher as well.
        gold: the answer that the row has; None where it has none.
        kept: what the written row takes over: "output", "group", "id".
        tests: what the code must pass; None where there is no code or no test.
        ends: whether a growing answer is whole, whatever a teacher would write after it; None: no telling.
    """

    number: int
    prompt: str
    gold: str | None
    kept: dict[str, Any] = field(default_factory=dict)
    tests: grading.Tests | None = None
    ends: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class ParsedAnswer:
    """What an answer says: `answer` in the form of training rows, and `fault`, why it cannot be used, or None.

    Attributes:
        extra: what the written row says besides: "reason", "probabilities", "uncovered_mass".
        unanswered: there was no answer, but there may be one the next time.
    """

    answer: str | None
    fault: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    unanswered: bool = False


def read_items(path: str, task: TeacherTask, skip_bad_rows: bool = False) -> list[Item]:
    """The rows of a JSONL, JSON list or CSV file. Raises UserError for a bad row, by file and line."""
    if isinstance(task, Code) and task.is_problem_file(path):
        return [
            task.problem_item(number, problem)
            for number, problem in enumerate(code_problems.read(path, skip_bad_rows), start=1)
        ]
    unit, given, _ = records.numbered_rows(path)
    numbered = [(number, training_files.as_question(row)) for number, row in given]
    numbers = {id(row): number for number, row in numbered}
    good = records.check_rows(path, numbered, (), skip_bad_rows, unit, task.fault).rows
    return [task.item(numbers[id(row)], row) for row in good]


def understand(task: TeacherTask, prompt: str, text: str, finished: bool, reasons: bool) -> ParsedAnswer:
    """What a teacher's text says, before `check`; thinking before it is passed over (`final_answer`).

    Args:
        prompt: what a student is asked.
        finished: the text ended by itself, not at the token budget.
        reasons: the teacher was asked with `prompts.REASONS`.
    """
    text = final_answer(text).strip()
    if not text and finished:
        return ParsedAnswer(None, "the answer is empty")
    extra = {}
    try:
        if not finished:
            raise UnusableAnswer("the answer breaks off at --max_new_tokens")
        if reasons:
            line = _ANSWER_LINE.search(text)
            reason = text[: line.start()].strip() if line else ""
            if not reason:
                raise UnusableAnswer('there must be reasons, and after them a line that begins with "Answer:"')
            extra, text = {"reason": reason}, text[line.end() :].strip()
        return ParsedAnswer(task.parse(text, prompt), None, extra)
    except UnusableAnswer as error:
        return ParsedAnswer(None, str(error))


def _not_text(row: dict, *keys: str) -> str | None:
    """Which of the keys that a row may go without has something else than a text, in words; None where none has.

    What is null, as in a column of Parquet, counts as not there.
    """
    wrong = next((key for key in keys if not isinstance(row.get(key), str | None)), None)
    return f"'{wrong}' must be a string" if wrong else None


def _kept(row: dict, gold: str | None, group: str | None) -> dict[str, Any]:
    fields = {"id": row.get("id"), "output": gold, "group": group}
    return {key: value for key, value in fields.items() if value is not None}


class Labels:
    """A label task: the answer is one label of the set, however it is dressed up."""

    def __init__(self, task: LabelTask) -> None:
        self.task, self.name = task, task.name
        self._words = {word: label for label in task.labels for word in task.words(label)}
        self._unlabelled = task.unlabelled or ("",)

    def fault(self, row: dict) -> str | None:
        """Why a row cannot be asked: no text under "input" or the task's field, or gold that is no label."""
        row = self.task.as_texts(row)
        if "input" in row:
            fault = records.row_fault(row, ("input",))
        else:
            fault = None if self.task.text_of(row) else f"no text under 'input' or '{self.task.text_field}'"
        key = self._gold_key(row)
        fault = fault or _not_text(row, key)
        return fault or (self.task.label_fault(key, self._unlabelled)(row) if row.get(key) is not None else None)

    def _gold_key(self, row: dict) -> str:
        return "output" if "input" in row else self.task.label_field

    def item(self, number: int, row: dict) -> Item:
        """A row as it is asked; a raw one by the task's prompt, with the group that *_prepare.py would give it."""
        row = self.task.as_texts(row)
        gold = str(row.get(self._gold_key(row)) or "").strip()
        gold = None if gold in self._unlabelled else gold
        if "input" in row:
            return Item(number, row["input"], gold, _kept(row, gold, row.get("group")))
        text = self.task.text_of(row)
        group = row.get("group") or self.task.group_of(row)
        return Item(number, self.task.prompt(text), gold, _kept(row, gold, group))

    def parse(self, text: str, prompt: str = "") -> str:
        """The label that a text is: alone or after a colon ("Answer: Good"), in any case, with marks around it."""
        for part in (text, text.rpartition(":")[2]):
            plain = part.strip(_AROUND).casefold()
            labels = {label for word, label in self._words.items() if word == part.strip()}
            labels = labels or {label for word, label in self._words.items() if word.strip(_AROUND).casefold() == plain}
            if len(labels) == 1:
                return labels.pop()
        raise UnusableAnswer(f"the answer must be one of {', '.join(self.task.labels)} and nothing else")

    def check(self, items: Sequence[Item], answers: Sequence[ParsedAnswer]) -> list[ParsedAnswer]:
        """Nothing has to be run."""
        return list(answers)

    def judged(self, item: Item) -> bool:
        """Whether there is gold to compare with."""
        return item.gold is not None

    def score(self, item: Item, answer: str) -> float:
        """1 where the answer is the gold label, else 0."""
        return float(answer == item.gold)


class Documents:
    """IDP: the answer is JSON that satisfies the schema, written as the trained models write it.

    Args:
        typed_fields: how documents are asked about, "written" or "held" (`answer_form.AnswerForm`). Rows that have
            their prompt already say it themselves.
    """

    name = "idp"

    def __init__(self, schema: json_schema.Schema, typed_fields: str = "written") -> None:
        self.schema, self.typed_fields = schema, typed_fields
        self.typed = TypedFields(schema)

    def fault(self, row: dict) -> str | None:
        """Why a row cannot be asked: no text under "input" or "document", or gold that the schema refuses."""
        fault = records.row_fault(row, ("input" if "input" in row else "document",)) or _not_text(row, "output")
        if fault:
            return fault
        if "input" not in row:
            errors = json_schema.errors(row["fields"], self.schema) if row.get("fields") is not None else []
            return f"fields: the JSON does not satisfy the schema: {errors[0]}" if errors else None
        try:
            self._gold(row)
        except UnusableAnswer as error:
            return f"output: {error}"
        return None

    def _gold(self, row: dict) -> str | None:
        return self.parse(row["output"], row["input"]) if row.get("output") else None

    def item(self, number: int, row: dict) -> Item:
        """A row as it is asked; a document by IDP's prompt."""
        if "input" in row:
            gold = self._gold(row)
            return Item(number, row["input"], gold, _kept(row, gold, row.get("group")))
        text = documents.clean(row["document"])
        asked = self.typed.written_schema if self.typed_fields == "written" else self.schema
        prompt = idp_prompt.user_turn(text, asked, self.typed_fields)
        gold = None if row.get("fields") is None else self._text(row["fields"], prompt)
        return Item(number, prompt, gold, _kept(row, gold, row.get("group") or documents.group_of(text)))

    def parse(self, text: str, prompt: str = "") -> str:
        """The JSON in a text, bare or in a Markdown fence; typed fields in the form that the prompt asks for."""
        fence = _FENCED.search(text)
        document = self._document_as_written(prompt)
        parsed = json_schema.parse(fence[1] if fence else text, self.schema if document is None else True)
        if parsed.error:
            raise UnusableAnswer(parsed.error)
        if document is None:
            return json_writer.dumps(parsed.value, self.schema)
        answer = self.typed.read(parsed.value, document)
        if faults := answer.faults or json_schema.errors(answer.value, self.schema):
            raise UnusableAnswer(f"the JSON does not satisfy the schema: {faults[0]}")
        if json_schema.errors(parsed.value, self.typed.written_schema):  # the teacher has read them itself
            return self._text(answer.value, prompt)
        return json_writer.dumps(parsed.value, self.typed.written_schema)

    def _text(self, fields: Any, prompt: str) -> str:
        """Fields of the schema's types as the prompt asks for them."""
        document = self._document_as_written(prompt)
        if document is None:
            return json_writer.dumps(fields, self.schema)
        return json_writer.dumps(Copyist(self.typed).written(fields, document), self.typed.written_schema)

    @staticmethod
    def _document_as_written(prompt: str) -> str | None:
        """The document of a prompt that asks for typed fields as written; None for other prompts."""
        shown = idp_prompt.shown(prompt)
        return prompt.partition(idp_prompt.DOCUMENT)[2] if shown and shown[0] == "written" else None

    def check(self, items: Sequence[Item], answers: Sequence[ParsedAnswer]) -> list[ParsedAnswer]:
        """Nothing has to be run."""
        return list(answers)

    def judged(self, item: Item) -> bool:
        """Whether there is gold to compare with."""
        return item.gold is not None

    def score(self, item: Item, answer: str) -> float:
        """F1 of the fields against gold: 1 where all agree."""
        both = [json.loads(item.gold), json.loads(answer)]
        if (document := self._document_as_written(item.prompt)) is not None:
            both = [self.typed.read(fields, document).value for fields in both]
        compared = field_metrics.compare(*both)
        agree, predicted, true = field_metrics.counts([compared], lambda leaf: leaf.exact)[0]
        return float(2 * agree / (predicted + true)) if predicted + true else 1.0


class Code:
    """CodeGen: the answer is Python that compiles and, where the user consents, passes the row's tests; or a plan.

    Args:
        run_tests: code that the teacher wrote may be run, in the sandbox.
        allow_no_sandbox: also where there is none.
    """

    name = "codegen"

    def __init__(self, run_tests: bool, allow_no_sandbox: bool) -> None:
        self.run_tests, self.allow_no_sandbox = run_tests, allow_no_sandbox

    @staticmethod
    def is_problem_file(path: str) -> bool:
        """Whether the rows are programming problems with solutions (MBPP, HumanEval, codegen_val.jsonl)."""
        rows = (row for _, row in records.numbered_rows(path)[1])
        first = next((row for row in rows if isinstance(row, dict)), {})
        return "input" not in first and not first.keys().isdisjoint(("solution", "code", "canonical_solution"))

    @staticmethod
    def problem_item(number: int, problem: code_problems.CodeProblem) -> Item:
        """A problem as it is asked, with its solution as gold."""
        gold = code_prompt.code_answer(problem.solution)
        kept = {"id": problem.task_id, "output": gold, "group": problem.group}
        prompt = code_prompt.direct_prompt(problem.prompt)
        return Item(number, prompt, gold, kept, problem.graded_by(), Code._ends(prompt))

    def fault(self, row: dict) -> str | None:
        """Why a row cannot be asked: no text under "input" or "prompt", tests that are no list of texts, or no text
        under another of its keys."""
        tests = row.get("tests") or []
        if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
            return "'tests' must be a list of texts"
        fault = records.row_fault(row, ("input" if "input" in row else "prompt",))
        return fault or _not_text(row, "output", "setup", "entry_point")

    def item(self, number: int, row: dict) -> Item:
        """A row as it is asked: "input" as it stands, or a task under "prompt"; "tests" are optional."""
        prompt = row["input"] if "input" in row else code_prompt.direct_prompt(row["prompt"])
        asserts, gold = tuple(row.get("tests") or ()), row.get("output") or None
        tests = grading.Tests(asserts, row.get("setup") or "", row.get("entry_point")) if asserts else None
        return Item(number, prompt, gold, _kept(row, gold, row.get("group")), tests, self._ends(prompt))

    @staticmethod
    def _ends(prompt: str) -> Callable[[str], bool]:
        """Whether an answer has all of the plan or code that `parse` reads: untrained models go on to explain it."""
        if prompt.endswith(code_prompt.PLAN_REQUEST):
            return style.CHAT.plan_ends
        return partial(style.CHAT.ends, prompt)

    def parse(self, text: str, prompt: str = "") -> str:
        """The code in a text, or the plan where the prompt asks for one, in the tags of training rows."""
        if prompt.endswith(code_prompt.PLAN_REQUEST):
            if plan := code_answer.plan_of(text):
                return code_prompt.plan_answer(plan)
            raise UnusableAnswer("there is no plan")
        code = source.without_usage(code_answer.code_of(text, code_prompt.names_asked_for(prompt)))
        if error := code_answer.compile_error(code):
            raise UnusableAnswer(f"the code does not compile ({error})")
        if all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Name) for node in ast.parse(code).body):
            raise UnusableAnswer("there is no code")  # a lone word compiles
        return code_prompt.code_answer(code)

    def check(self, items: Sequence[Item], answers: Sequence[ParsedAnswer]) -> list[ParsedAnswer]:
        """Run the tests, if they may be run: code that fails them is a fault."""
        checked = list(answers)
        run = [index for index, item in enumerate(items) if self.judged(item) and answers[index].fault is None]
        pairs = [(code_answer.code_of(answers[index].answer), items[index].tests) for index in run]
        verdicts = grading.grade_many(pairs, allow_unsafe=self.allow_no_sandbox) if pairs else []
        for index, verdict in zip(run, verdicts, strict=True):
            if not verdict.passed:
                detail = f"{verdict.error}: {verdict.detail}".rstrip(": ")
                checked[index] = ParsedAnswer(answers[index].answer, f"the code fails its tests ({detail})")
        return checked

    def judged(self, item: Item) -> bool:
        """Whether tests are run."""
        return self.run_tests and item.tests is not None

    def score(self, item: Item, answer: str) -> float:
        """1: code that fails its tests has a fault, and is not asked about."""
        return 1.0


def held_out(items: Sequence[Item]) -> Iterator[Item]:
    """The items whose group belongs to the dev or validation part."""
    for item in items:
        group = str(item.kept.get("group", ""))
        if splits.GROUP_HASH.fullmatch(group) and splits.part_of(group) != "train":
            yield item


TeacherTask = Labels | Documents | Code


def notices(task: TeacherTask, items: Sequence[Item]) -> list[str]:
    """What the rows lack, and which of them no student should be trained on, in sentences."""
    sentences = []
    if count := sum(1 for _ in held_out(items)):
        sentences.append(
            f"warning: {count} of {len(items)} rows belong to groups that are held out for dev and validation; a "
            "student that is trained on them cannot be judged on those"
        )
    if isinstance(task, Code) and any(item.tests for item in items) and not task.run_tests:
        sentences.append(
            "the rows' tests are not run, so code has only to compile; --confirm_run_unsafe_code runs them"
        )
    return sentences


def check_instruction(path: str, task: Labels, items: Sequence[Item]) -> None:
    """Raises UserError for an input that does not begin with the task's instruction, which a label ranker puts."""
    instruction = task.task.prompt("")
    for item in items:
        if not item.prompt.startswith(instruction):
            raise UserError(
                f"{path}, row {item.number}: the input does not begin with the instruction of {task.name}, "
                "which the label ranker puts; give rows of that task"
            )
