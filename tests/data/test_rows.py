"""Rows on disk: what a line holds that cannot be taken as it is written is named by its line."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file
from support.inputs import ROOT

from common import files
from common.cli import UserError
from common.data import rows, shapes, training_files
from common.tasks.ranking import file_scoring
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.loading import load_task
from common.tasks.ranking.row_check import RowCheck

TICKETS = load_task(str(ROOT / "recipes" / "ticket_severity.yaml"))
GOOD = '{"input": "a", "output": "b", "n": 12345678901234567890}\n'
BAD = {
    "a key twice": ('{"input": "a", "output": "b", "age": 23, "age": 45}', "the key 'age' is given twice"),
    "a key twice within": ('{"input": "a", "output": "b", "x": {"n": 1, "n": 1}}', "the key 'n' is given twice"),
    "digits": ('{"input": "a", "output": "b", "n": ' + "7" * 6000 + "}", "it has a number of 6,000 digits"),
    "depth": ('{"input": "a", "output": ' + "[" * 100_000 + "]" * 100_000 + "}", "it is nested too deeply"),
    "half": ('{"input": "a", "output"', "not JSON (Expecting ':' delimiter)"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_named(tmp_path, kind, capsys):
    line, reason = BAD[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + line + "\n" + GOOD)
    with pytest.raises(UserError) as raised:
        rows.read_rows(path, rows.SFT_KEYS)
    assert str(raised.value).startswith(f"{path}, line 2: {reason}; mend the row, or pass --skip_bad_rows")
    assert [row["n"] for row in rows.read_rows(path, rows.SFT_KEYS, skip_bad_rows=True)] == [12345678901234567890] * 2
    assert f"line 2: {reason}; skipped" in capsys.readouterr().err


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named(tmp_path, kind):
    path = tmp_path / "rows.json"
    path.write_text(f"[{GOOD}, {BAD[kind][0]}]")
    with pytest.raises(UserError, match="mend the file"):
        files.read_json(path)


READERS = {
    "rows": lambda path: rows.read_rows(path, rows.SFT_KEYS),
    "sft": lambda path: training_files.read(path, shapes.SFT),
    "dpo": lambda path: training_files.read(path, shapes.DPO, skip_bad_rows=True),
    "labels": lambda path: TICKETS.read(path),
    "creditmix": lambda path: CREDITMIX.read(path),
    "a teacher": lambda path: TICKETS.read_teacher(path),
    "texts": lambda path: file_scoring.check_input(path, RowCheck(TICKETS), skip_bad_rows=True),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_file_without_rows_is_not_called_bad(tmp_path, kind):
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(UserError, match=r"rows\.json has no rows; (give a file with rows|each needs its text)"):
        READERS[kind](str(tmp_path / "rows.json"))


def test_a_column_that_repeats_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("Age,Income,Age\n1,2,3\n")
    with pytest.raises(UserError, match="line 1: the column 'Age' is given twice; rename one of them"):
        rows.numbered_rows(path)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_permissions_that_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        files.write_json(tmp_path / "facts.json", {})
        save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
        files.grant(tmp_path)
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}
    finally:
        os.umask(before)
