"""What a job may be given: models and data that are in reach, and the defaults of each method's settings."""

from __future__ import annotations

from typing import Any

from common.jobs import within_reach
from common.jobs.checks import Reach
from common.jobs.request import EXPORTS, METHODS, Planner, described

DATA = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".jsonl.gz", ".csv.gz", ".json.gz")
OF_RUNS = {"config.json", "run.json", "task.json", "tokenizer.json", "tokenizer_config.json"}  # no data
MOST = 200


def choices(reach: Reach, planner: Planner) -> dict[str, Any]:
    """{"models": [path], "data": [{"path", "bytes"}], "defaults": {method: {setting: default}},
    "exports": [format]}; blocking.

    Paths are as a request may name them, the newest first, of each kind at most `MOST`.
    """
    models, data = [], []
    for folder, files in within_reach.folders(reach):
        found = within_reach.models_in(folder, files)
        models += found
        if folder not in found:
            data += [folder / name for name in files if name.endswith(DATA) and name not in OF_RUNS]
    newest = sorted(data, key=within_reach.changed, reverse=True)[:MOST]
    return {
        "models": [within_reach.named(path) for path in sorted(models, key=within_reach.changed, reverse=True)[:MOST]],
        "data": [{"path": within_reach.named(path), "bytes": path.stat().st_size} for path in newest if path.is_file()],
        "defaults": {method: defaults(planner, method) for method in METHODS},
        "exports": list(EXPORTS),
    }


def defaults(planner: Planner, method: str) -> dict[str, Any]:
    """What each setting of a method is where a request leaves it out, as far as it has a fixed default."""
    fields = {name: described(action) for name, action in planner.fields(method).items()}
    return {name: about["default"] for name, about in fields.items() if "default" in about}
