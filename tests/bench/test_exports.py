"""bench/exports.py: a model and what was made of it, each in its own runtime."""

from __future__ import annotations

import json

import exports
import pytest
from support.exported import labelled_rows, stories
from support.gguf_files import build, write

pytestmark = pytest.mark.exports


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "text"])
def test_speeds_of_a_model_and_of_a_gguf(labelled, base, tmp_path, capsys, monkeypatch):
    pytest.importorskip("xllamacpp")
    monkeypatch.setenv("GGUF_CACHE", str(tmp_path / "cache"))
    packed = str(write(build("llama"), "llama", tmp_path / "model.gguf"))
    rows = labelled_rows(tmp_path) if labelled else stories(tmp_path)
    exports.main(["--model_dir", base, packed, "--data", rows, "--rows", "6", "--together", "3", "--rounds", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["name"] for row in result["rows"]] == [base, packed]
    units = ["rows", "tokens", "tokens_together"] if labelled else ["tokens", "tokens_together"]
    for row in result["rows"]:
        assert list(row)[1:] == units
        assert all(row[unit][f"{unit}_per_s"] > 0 and row[unit]["limit_per_s"] > 0 for unit in units)
    assert all(result["ratios"][unit][base] == 1 for unit in units)
