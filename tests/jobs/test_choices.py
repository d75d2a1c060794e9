"""What the form of a job suggests: models and data in reach, nothing of the service's own, the scripts' defaults."""

from __future__ import annotations

from common.jobs import choices, within_reach
from common.jobs.checks import Reach
from common.jobs.request import EXPORTS, Planner

SENT = "file-" + "0" * 16


def test_what_is_in_reach_is_suggested(tmp_path, monkeypatch):
    for name in ("runs/sft/adapter_config.json", "models/base/config.json", "models/base/tokenizer.json", "a.gguf",
                 "rows.jsonl", ".hidden/rows.jsonl", "runs/sft/checkpoints/rows.jsonl", "table.csv", "notes.md",
                 "own/jobs/0123/plan.json", "own/jobs/0123/artifacts/config.json", "own/jobs/0123/result.json",
                 "own/jobs.db-wal.json", f"own/files/{SENT}/file.json", f"own/files/{SENT}/content.csv",
                 "own/files/.incoming-1/content.csv", "own/caches/squad/meta.json", "own/reserve.csv"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    reach = Reach([tmp_path, tmp_path / "own", tmp_path / "runs", tmp_path], own=tmp_path / "own")
    found = choices.choices(reach, Planner(tmp_path, tmp_path / "own", reach))
    assert sorted(found["models"]) == ["a.gguf", "models/base", "own/jobs/0123/artifacts", "runs/sft"]  # each once
    data = sorted(file["path"] for file in found["data"])
    assert data == [f"own/files/{SENT}/content.csv", "own/reserve.csv", "rows.jsonl", "table.csv"]
    assert all(reach.local(path) for path in found["models"])
    assert found["defaults"]["dpo"]["beta"] == 0.1 and "beta" not in found["defaults"]["sft"]
    assert found["defaults"]["sft"]["learning_rate"] == 2e-4
    assert found["exports"] == list(EXPORTS)


def test_a_great_tree_is_not_walked_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(within_reach, "MOST_FOLDERS", 3)
    for number in range(9):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "rows.jsonl").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rows.jsonl").write_text("{}")
    reach = Reach([tmp_path, tmp_path / "other"])
    data = choices.choices(reach, Planner(tmp_path, tmp_path, reach))["data"]
    assert len(data) == 3 and any("other" in file["path"] for file in data)  # which has an allowance of its own
