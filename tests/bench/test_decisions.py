"""bench/decisions.py: the same rows to all, and who wins named by figures."""

from __future__ import annotations

import json

import pytest
from support.inputs import ROOT, write_rows
from support.served import make_run

from bench import decisions
from common.data import task_record
from common.tasks.ranking.loading import load_task

TASK = load_task(str(ROOT / "recipes" / "ticket_urgency.yaml"))


@pytest.mark.processes
def test_all_contestants_answer_the_same_rows(base, tmp_path, capsys):
    run = make_run(tmp_path / "run", base, 1)
    task_record.write(run, TASK.record())
    rows = [{"ticket": f"Mail {n}", "urgency": TASK.labels[n % 4], "customer": str(n)} for n in range(12)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    few = ["--per_class", "2", "--timed_rows", "3", "--batch", "2", "--rounds", "1"]
    decisions.main(["--model_dir", str(run), "--data", data, *few])
    shown = capsys.readouterr()
    assert "pipeline_json left out:" in shown.err and "eval_creditmix.py --decision_json" in shown.err
    result = json.loads(shown.out.splitlines()[-1])
    assert set(result["quality"]) == {"ours", "ours_unfitted", "ours_other", "pipeline"}
    assert all(0 <= entry["accuracy"]["value"] <= 1 for entry in result["quality"].values())
    assert result["quality"]["ours"] == result["quality"]["ours_unfitted"]  # nothing was fitted
    assert min(result["settings"]["label_tokens"]) > 1
    sizes = [f"{name} x{size}" for size in (1, 2) for name in ("ours", "ours_other", "pipeline")]
    assert [row["name"] for row in result["rows"]] == sizes
    assert set(result["ratios"]) == {f"vs_{name}" for name in sizes if not name.startswith("ours ")}
