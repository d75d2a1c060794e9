"""The figures of evaluations, kept in the folder of the run that they are of: for the pages and the model card.

`evaluations/EVALUATOR.SPLIT.HASH.json` of a run or an export, written by every evaluator; the newest on the same data
takes the place of the one before:

    {"evaluator", "data", "data_sha256", "split", "n", "calibration"?, "contamination", "created", "command", "commit",
     "model_sha256", "figures": {"accuracy": {"value", "low", "high"}, ...}}

The `metrics.json` of a report within the folder is read like one of them.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common.cli import log
from common.evaluation.results import Result
from common.files import parse_json, write_json
from common.models import adapters

FOLDER = "evaluations"
REPORTS = ("metrics.json", "report/metrics.json")
RECORDS = ("run.json", "export.json")  # what tells a folder that was made here from a base model's
MOST = 50  # evaluations of one run that are read
MAX_TEXT = 100_000  # characters of a text in one
FACTS = ("evaluator", "data", "data_sha256", "split", "n", "created", "command")
TEXTS = (*(fact for fact in FACTS if fact != "n"), "calibration", "commit", "model_sha256")
BOUNDS = ("value", "low", "high")

Record = dict[str, Any]


def keep(result: Result) -> None:
    """Write what an evaluation's result says of each model that is a run or an export into that folder.

    A folder that cannot be written costs a line on standard error, and no evaluation.
    """
    for model in result["models"]:
        folder = Path(model["model_dir"])
        if any((folder / name).is_file() for name in RECORDS):
            record = of_model(result, model) | {"model_sha256": adapters.adapter_hash(folder)}
            try:
                write_json(folder / FOLDER / file_name(record), record)
            except OSError as error:
                log(f"{folder} cannot be written ({error.strerror}), so it does not keep its figures")


def of_model(result: Result, model: dict[str, Any]) -> Record:
    """What a result says of one of its models, without what only its report needs."""
    intervals = {key: value for key, value in model.items() if isinstance(value, dict) and "value" in value}
    figures = {key: {bound: value[bound] for bound in BOUNDS if bound in value} for key, value in intervals.items()}
    return {
        **{key: result.get(key) for key in FACTS},
        "calibration": model.get("calibration"),
        "contamination": model.get("contamination"),
        "commit": (result.get("versions") or {}).get("distill-slm"),
        "figures": {key: figure for key, figure in figures.items() if all(map(math.isfinite, figure.values()))},
    }


def file_name(record: Record) -> str:
    """The same for evaluations that ask the same of a run: one evaluator, one part of one file."""
    data = hashlib.sha256(str(record["data_sha256"] or record["data"]).encode()).hexdigest()[:12]
    parts = [re.sub(r"[^A-Za-z0-9_-]", "_", str(record[key]))[:60] for key in ("evaluator", "split")]
    return ".".join([*parts, data, "json"])


def read(folder: str | Path) -> list[Record]:
    """The evaluations that a run's folder keeps, the newest first.

    Raises:
        ValueError: one of them is no evaluation; names the file.
    """
    folder = Path(folder)
    names = {folder.name, folder.resolve().name}
    records = [_read(file, folder, check) for file in sorted((folder / FOLDER).glob("*.json"))[:MOST]]
    known = set(map(file_name, records))
    for file in filter(Path.is_file, (folder / name for name in REPORTS)):
        of_report = _read(file, folder, lambda report: _of_report(report, names))
        records += [record for record in of_report if file_name(record) not in known]
    return newest_first(records)


def newest_first(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=lambda record: record["created"] or "", reverse=True)


def check(record: Any) -> Record:
    """An evaluation as it was read from somewhere.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: it is none.
    """
    for key, figure in record["figures"].items():
        bounds = {"value": figure["value"]} | {bound: figure[bound] for bound in BOUNDS if bound in figure}
        if not all(map(math.isfinite, bounds.values())):
            raise ValueError(f"{key} is no finite number")
    for key in TEXTS:
        if not (record.get(key) is None or (isinstance(record[key], str) and len(record[key]) <= MAX_TEXT)):
            raise ValueError(f"{key} is no text")
    if not isinstance(record["n"], int):
        raise ValueError("n is no number of rows")
    return dict.fromkeys((*TEXTS, "contamination")) | record


def _read(file: Path, folder: Path, of: Callable[[Any], Any]) -> Any:
    try:
        return of(parse_json(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise ValueError(f"{file.relative_to(folder)} is unreadable ({reason})") from error


def _of_report(report: Any, names: set[str]) -> list[Record]:
    """The record of the model of one of these names, if the report is of it."""
    if not report["models"]:
        raise ValueError("it judges no model")
    return [check(of_model(report, model)) for model in report["models"] if Path(model["model_dir"]).name in names]
