"""Programming problems for tests, and a writer that answers them from a list."""

from __future__ import annotations

from common.data import splits
from common.tasks.codegen.writer import CodeAnswer


def problem(number: int) -> dict:
    """Add `number` to n; its group, and so its part, is that of the number."""
    return {
        "task_id": number,
        "prompt": f"Write plus{number}(n) that returns n plus {number}.",
        "solution": f"def plus{number}(n):\n    return n + {number}",
        "tests": [f"assert plus{number}(1) == {number + 1}", f"assert plus{number}(-2) == {number - 2}"],
        "group": splits.group_hash(str(number)),
    }


PARTS = {number: splits.part_of(problem(number)["group"]) for number in range(1, 31)}
HELD_OUT = [number for number, part in PARTS.items() if part == "validation"][:4]
TRAIN = [number for number, part in PARTS.items() if part == "train"][:4]


def right(number: int) -> str:
    return problem(number)["solution"]


def wrong(number: int) -> str:
    """Passes the second test only."""
    return f"def plus{number}(n):\n    return {number - 2}"


class Scripted:
    """A writer that answers from a list, in turn, and counts."""

    def __init__(self, answers: dict[str, list[str]], plan: str = "- Think.") -> None:
        self.answers, self.the_plan, self.asked = answers, plan, 0
        self.tokenizer = self.style = None

    def plan(self, tasks, decoding):
        return [[self.the_plan] * decoding.num_samples for _ in tasks]

    def write_each(self, tasks, decoding, plan_first=False):
        for index, task in enumerate(tasks):
            plans = self.plan([task], decoding) if plan_first else None
            yield index, self.write([task], decoding, plans)[0]

    def write(self, tasks, decoding, plans=None, *, streamer=None):
        self.asked += len(tasks)
        planned = "" if plans is None else self.the_plan
        codes = [self.answers[task][: decoding.num_samples] for task in tasks]
        return [[CodeAnswer(code, planned, "unfinished" not in code, 9) for code in row] for row in codes]
