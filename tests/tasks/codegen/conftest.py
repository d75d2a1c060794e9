"""Fixtures that the tests of CodeGen share."""

from __future__ import annotations

import pytest
from support.code_problems import HELD_OUT, TRAIN, Scripted, problem
from support.inputs import write_rows

import codegen_prepare
from common.tasks.codegen.writer import CodeWriter


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Rows of eight problems, of which one solution fails its tests."""
    folder = tmp_path_factory.mktemp("prepared")
    rows = [problem(number) for number in TRAIN + HELD_OUT]
    rows[1]["solution"] = rows[1]["solution"].replace("+", "-")
    source = write_rows(folder / "problems.jsonl", rows)
    for out in ("one", "two"):
        codegen_prepare.main(["--src", source, "--outdir", str(folder / out)])
    return folder


@pytest.fixture
def scripted(monkeypatch):
    """`scripted({task: [code, ...]})`: all models answer so from now on; gives the writer."""

    def use(answers: dict[str, list[str]]) -> Scripted:
        writer = Scripted(answers)
        monkeypatch.setattr(CodeWriter, "load", classmethod(lambda cls, *source, **how: writer))
        return writer

    return use
