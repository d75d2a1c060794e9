"""The cascade of code: which answers do not stand, and what they become once a teacher was asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data import splits
from common.tasks.codegen.answer import code_of, compile_error
from common.tasks.codegen.prompt import with_tests
from common.tasks.codegen.writer import CodeAnswer
from common.teachers.cascade import kept_rows
from common.teachers.cascade.handing import Cascade, Reply, in_turn
from common.teachers.tasks import Code, Item, ParsedAnswer


@dataclass(frozen=True)
class AnsweredCode:
    """An answer, and who wrote it.

    Attributes:
        facts: "answered_by", and where the teacher was to answer and did not "unsure" and "cascade".
    """

    answer: CodeAnswer
    facts: dict[str, Any]


def is_unsure(answer: CodeAnswer) -> bool:
    """Whether code is handed on: it is cut off, or no Python program. What it computes, only tests can tell."""
    return answer.cut or compile_error(answer.code) is not None


class CodeCascade:
    """A cascade for tasks to program.

    Args:
        model_dir: the student's, where kept rows go.
        allow_no_sandbox: where no sandbox works, run a teacher's code on tests without one.
    """

    def __init__(self, cascade: Cascade, model_dir: str, *, allow_no_sandbox: bool = False) -> None:
        self.cascade, self.model_dir = cascade, model_dir
        self.task = Code(run_tests=True, allow_no_sandbox=allow_no_sandbox)

    def item(self, number: int, task: str, tests: Sequence[str] = ()) -> Item:
        """What a teacher is asked: the task, with the tests that its code has to pass."""
        return self.task.item(number, {"prompt": with_tests(task, tests) if tests else task, "tests": list(tests)})

    def in_turn(
        self, tasks: Sequence[str], answers: Iterable[tuple[int, CodeAnswer]]
    ) -> Iterator[tuple[int, AnsweredCode]]:
        """(index of a task, its answer) of each, as it is there; the unsure ones after the teacher was asked."""

        def asked(unsure: list[tuple[int, CodeAnswer]]) -> Iterator[tuple[int, AnsweredCode]]:
            items = [self.item(index, tasks[index]) for index, _ in unsure]
            replies = self.cascade.ask(self.task, items)
            for (index, answer), item, reply in zip(unsure, items, replies, strict=True):
                yield index, self.joined(answer, item, reply)

        return in_turn(
            answers,
            lambda numbered: is_unsure(numbered[1]),
            lambda numbered: (numbered[0], self.own(numbered[1])),
            asked,
        )

    def tried(self, task: str, tests: Sequence[str], answer: CodeAnswer) -> AnsweredCode:
        """What becomes of code that fails its tests: the teacher's where that passes them."""
        item = self.item(0, task, tests)
        (reply,) = self.cascade.ask(self.task, [item])
        return self.joined(answer, item, reply)

    def own(self, answer: CodeAnswer) -> AnsweredCode:
        """The student's answer, which stands."""
        return AnsweredCode(answer, {"answered_by": self.model_dir})

    def joined(self, answer: CodeAnswer, item: Item, reply: Reply) -> AnsweredCode:
        """The student's answer, or the teacher's where it has one that passes the item's tests; kept, if asked for."""
        (checked,) = self.task.check([item], [ParsedAnswer(reply.answer, reply.reason)])
        if checked.answer is None or checked.fault:
            return AnsweredCode(answer, self.own(answer).facts | {"unsure": True, "cascade": checked.fault})
        if self.cascade.settings.keep:
            group = splits.group_hash(item.prompt)
            row = kept_rows.row(item.prompt, checked.answer, self.cascade.name, group)
            kept_rows.append(Path(self.model_dir), [row])
        tokens = reply.tokens[1] if reply.tokens else 0
        return AnsweredCode(CodeAnswer(code_of(checked.answer), "", True, tokens), {"answered_by": self.cascade.name})
