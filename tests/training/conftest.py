"""Runs and rows that several tests of the trainers look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.inputs import CORPUS, PROMPTS, write_rows
from support.training import RESUMABLE, SCRIPTS, train


@pytest.fixture(scope="session")
def uneven(tmp_path_factory) -> str:
    """Rows whose completions differ in length, so that a mean of means is not the mean."""
    rows = [{"input": PROMPTS[i], "output": CORPUS[i][: 3 + 5 * (i % 8)]} for i in range(16)]
    return write_rows(tmp_path_factory.mktemp("uneven") / "rows.jsonl", rows)


@pytest.fixture(scope="session")
def unbroken(base, rows, tmp_path_factory):
    """`unbroken(kind)`: a run that nobody disturbed; 12 steps an epoch."""
    folder = tmp_path_factory.mktemp("unbroken")
    done: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in done:
            done[kind] = train(*task(kind), folder / kind.replace(" ", "_"), *settings(kind))
        return done[kind]

    def task(kind: str):
        return SCRIPTS[kind[:3]], base, rows[kind[:3]]

    def settings(kind: str) -> list:
        return [*RESUMABLE, *(["--init_adapter", run("sft")] if kind == "dpo from sft" else [])]

    run.task, run.settings = task, settings
    return run
