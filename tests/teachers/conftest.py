"""A chat API that misbehaves on demand, and a run's files."""

from __future__ import annotations

import pytest
from support.inputs import write_rows
from support.teacher import Stub

from common.teachers import chat_endpoint


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(chat_endpoint, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running = Stub()
    yield running
    running.close()


@pytest.fixture
def files(tmp_path):
    """`files(rows)` writes rows and gives --data and --out."""

    def write(rows: list[dict]) -> list[str]:
        return ["--data", write_rows(tmp_path / "rows.jsonl", rows), "--out", str(tmp_path / "out.jsonl")]

    write.out = tmp_path / "out.jsonl"
    return write
