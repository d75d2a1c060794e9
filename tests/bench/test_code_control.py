"""bench/code_control.py: two engines on one file, judged alike."""

from __future__ import annotations

import json

import code_control
import pytest
from support.code_problems import HELD_OUT, problem
from support.gguf_files import build, write
from support.inputs import read_rows, write_rows

from common import cli

pytestmark = pytest.mark.exports


def test_both_engines_are_judged_and_what_they_wrote_is_kept(tmp_path, capsys, monkeypatch):
    pytest.importorskip("xllamacpp")
    monkeypatch.setenv("GGUF_CACHE", str(tmp_path / "cache"))
    model = write(build("llama"), "llama", tmp_path / "model.gguf")
    rows = write_rows(tmp_path / "rows.jsonl", [problem(number) for number in HELD_OUT])
    ask = ["--gguf", str(model), "--data", rows, "--max_new_tokens", "4", "--report_dir", str(tmp_path / "report")]
    with pytest.raises(cli.UserError, match="--confirm_run_unsafe_code"):
        code_control.main(ask)
    code_control.main([*ask, "--confirm_run_unsafe_code"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["name"] for row in result["rows"]] == ["llama.cpp", "ours"] and result["n"] == len(HELD_OUT)
    assert all(row["pass_at_1"]["value"] == 0 for row in result["rows"]) and result["difference"]["value"] == 0
    kept = len(read_rows(tmp_path / "report/answers.jsonl"))
    assert kept >= 2 * len(HELD_OUT)  # and verdicts
    code_control.main([*ask, "--confirm_run_unsafe_code"])
    assert len(read_rows(tmp_path / "report/answers.jsonl")) == kept
