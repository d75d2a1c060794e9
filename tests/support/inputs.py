"""Where things lie, and small inputs that many tests read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
LABELS = ("Good", "Standard", "Bad")

CORPUS = [
    "Classify the credit mix of this customer as Good, Standard or Bad. Return only the label.\n\n"
    f"Age: {20 + i % 40}, Occupation: {job}, Annual Income: {1000 + 37.5 * i}, Outstanding Debt: {3 * i + 0.25}"
    for i, job in enumerate(["Scientist", "Lawyer", "Engineer", "Writer"] * 20)
]
# Prompts of unlike lengths, two rows a group.
PROMPTS = [CORPUS[i][: 60 + 8 * (i % 9)] for i in range(24)]
GROUPS = [f"{i // 2:016x}" for i in range(24)]


def write_rows(path: Path, rows: Iterable[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path: Path | str) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_squad(path, articles=12, questions=3, **changes) -> str:
    """A file of numbered articles; `changes` replace keys of the first article's first question."""
    data = [
        {
            "title": f"Town {number}",
            "paragraphs": [
                {
                    "context": f"Town {number} was founded in {1800 + number} by the Smiths.",
                    "qas": [
                        {
                            "id": f"{number}-{place}",
                            "question": "When was it founded? ",
                            "answers": [{"text": str(1800 + number), "answer_start": 22}] * 2
                            + [{"text": f"in {1800 + number}", "answer_start": 19}],
                        }
                        for place in range(questions)
                    ],
                }
            ],
        }
        for number in range(articles)
    ]
    data[0]["paragraphs"][0]["qas"][0] |= changes
    path.write_text(json.dumps({"version": "1.1", "data": data}))
    return str(path)
