"""The files of a run of teacher_generate.py."""

from __future__ import annotations

import pytest
from support.inputs import write_rows


@pytest.fixture
def files(tmp_path):
    """`files(rows)` writes rows and gives --data and --out."""

    def write(rows: list[dict]) -> list[str]:
        return ["--data", write_rows(tmp_path / "rows.jsonl", rows), "--out", str(tmp_path / "out.jsonl")]

    write.out = tmp_path / "out.jsonl"
    return write
