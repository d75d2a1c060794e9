"""bench/text_generation.py: two checkouts, one of them this one, write the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import text_generation
from harness import write_text
from support.code_problems import HELD_OUT, TRAIN, problem
from support.inputs import write_rows

from common.cli import UserError

pytestmark = pytest.mark.processes


def test_contestants_write_the_same_in_fewer_steps_together(tiny_base, tmp_path, capsys, monkeypatch):
    """The baseline in a process of its own, as all of them are; this checkout's need none here."""
    apart, here = text_generation.written_by, text_generation.ROOT
    monkeypatch.setattr(
        text_generation, "written_by", lambda root, how: write_text.write(how) if root is here else apart(root, how)
    )
    rows = write_rows(tmp_path / "rows.jsonl", [problem(number) for number in TRAIN + HELD_OUT])
    ask = ["--model_dir", tiny_base, "--data", rows, "--tasks", "5", "--max_new_tokens", "6", "--dtype", "float32"]
    text_generation.main([*ask, "--baseline", str(Path(text_generation.__file__).parents[1]), "--one_by_one"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    ours, baseline, alone = result["rows"]
    assert [row["name"] for row in result["rows"]] == ["ours", "baseline", "one by one"] and result["n"] == 5
    assert {key: ours[key] for key in ("tokens", "steps", "rows_per_step", "prompt_passes")} == {
        key: baseline[key] for key in ("tokens", "steps", "rows_per_step", "prompt_passes")
    }
    assert ours["prompt_passes"] == alone["prompt_passes"] == 5 and ours["tokens"] == alone["tokens"]
    assert alone["rows_per_step"] == 1 and ours["steps"] < alone["steps"]
    assert all(ratio["same_answers"] == 5 for ratio in result["ratios"].values())
    with pytest.raises(UserError, match="cannot be measured"):
        apart(tmp_path, {})
