"""A teacher, and rows that several tests of distillation read."""

from __future__ import annotations

import pytest
from support.inputs import CORPUS, GROUPS, LABELS, PROMPTS, write_rows
from support.models import build_base


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, tokenizer) -> str:
    """Wider and deeper than the student, on the same tokenizer."""
    return build_base(tmp_path_factory.mktemp("models") / "teacher", tokenizer, 0.3, hidden=48, layers=4, seed=5)


@pytest.fixture(scope="session")
def uneven(tmp_path_factory) -> str:
    """Rows whose completions differ in length."""
    rows = [{"input": PROMPTS[i], "output": CORPUS[i][: 3 + 5 * (i % 8)], "group": GROUPS[i]} for i in range(16)]
    return write_rows(tmp_path_factory.mktemp("uneven") / "rows.jsonl", rows)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> str:
    rows = []
    for i in range(16):
        p = [0.7, 0.2, 0.1]
        probabilities = dict(zip(LABELS, p[i % 3 :] + p[: i % 3], strict=True))
        rows.append({"input": PROMPTS[i], "probabilities": probabilities, "output": LABELS[i % 3], "group": GROUPS[i]})
    del rows[0]["output"], rows[1]["probabilities"]
    return write_rows(tmp_path_factory.mktemp("labelled") / "rows.jsonl", rows)
