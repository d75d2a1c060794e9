"""bench/checkouts.py: what a step and a row take in two checkouts."""

from __future__ import annotations

import json

import checkouts
import pytest
from harness import run_script
from support.inputs import CORPUS, read_rows, write_rows

from common import cli


@pytest.fixture
def data(tmp_path):
    rows = [{"input": text, "output": "Good", "prompt": text, "chosen": "Good", "rejected": "Bad"} for text in CORPUS]
    for name in ("sft", "dpo", "val"):
        write_rows(tmp_path / f"creditmix_{name}.jsonl", (rows * 40)[:400])
    return tmp_path


def test_medians_without_the_first_step_and_rows_without_loading(data, monkeypatch, capsys):
    """The other checkout takes 5 times as long a step, and 3 times as long for each row; loading takes 100 s."""
    asked = []

    def measured(root, script, argv):
        asked.append((root == checkouts.ROOT, script))
        slow = root != checkouts.ROOT
        rows = len(read_rows(argv[argv.index("--input") + 1])) if script == "infer_creditmix" else 0
        seconds = 100 + rows * (3 if slow else 1)
        steps = [(99.0, 99.0), *((step * (5 if slow else 1), step) for step in (1.0, 2.0, 4.0))]
        return {"seconds": seconds, "cpu_seconds": seconds, "steps": steps, "peak_bytes": 10**9}

    monkeypatch.setattr(checkouts, "measured", measured)
    flags = ["--student", "base", "--data_dir", str(data), "--baseline", str(data), "--steps", "3", "--rows", "64"]
    checkouts.main(flags)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in printed[:-1]] == ["5.00x", "5.00x", "3.00x"]
    found = json.loads(printed[-1])["found"]
    assert found["sft"] == {
        "baseline": {"seconds": 10.0, "cpu_seconds": 2.0, "peak_bytes": 10**9},
        "ours": {"seconds": 2.0, "cpu_seconds": 2.0, "peak_bytes": 10**9},
    }
    assert found["ranking of 64 rows"]["baseline"]["seconds"] == 192
    assert asked[:4] == [(False, "sft_train"), (True, "sft_train"), (False, "dpo_train"), (True, "dpo_train")]
    with pytest.raises(cli.UserError, match="400 rows, 496 are needed; take fewer --steps or --rows"):
        checkouts.main([*flags[:-3], "30", "--rows", "64"])


@pytest.mark.processes
def test_a_script_and_its_steps_are_measured(base, rows, tmp_path):
    flags = ["--student", base, "--data", rows["sft"], "--save_dir", str(tmp_path / "run"), "--max_steps", "3"]
    found = run_script.run("sft_train", flags)
    assert len(found["steps"]) >= 3 and all(wall > 0 for wall, _ in found["steps"])
    assert sum(wall for wall, _ in found["steps"]) < found["seconds"] and found["peak_bytes"] > 50e6


@pytest.mark.processes
def test_a_checkout_that_fails_is_named(tmp_path):
    """A checkout with a script of that name is enough, and it is that checkout's."""
    (tmp_path / "sft_train.py").write_text("def main(argv):\n    raise SystemExit(f'error: {argv}')\n")
    with pytest.raises(cli.UserError, match=r"sft_train.py of .* cannot be measured: error: \['--x'\]"):
        checkouts.measured(tmp_path, "sft_train", ["--x"])
