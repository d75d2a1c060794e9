"""Labels and texts that are awkward to rank."""

from __future__ import annotations

from common.tasks.ranking.task import LabelTask

TEXTS = [
    "Age: 23, Occupation: Scientist, Annual Income: 19114.12, Outstanding Debt: 809.98",
    "Age: 4",
    "Age: 35, Occupation: Lawyer, Annual Income: 143162.64, Outstanding Debt: 1303.01",
    "Age: 4",
    "",
    "Age: 51, Occupation: Engineer, Annual Income: 9.5, Outstanding Debt: 0.25, a much longer row than the others are",
]
# Labels of several tokens, some of which begin others, one with several forms.
AWKWARD = LabelTask(
    name="awkward",
    labels=("Bad", "Bad debt", "Bad debt, unpaid for very long", "größe", "日本 語"),
    instruction="Which one?",
    null_inputs=("N/A", "none"),
    verbalizers={"Bad": ["Poor", "Not good at all"]},
)
