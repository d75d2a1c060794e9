"""A table of jobs made again from the jobs' folders: losing jobs.db loses no job and no model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from common.cli import log
from common.jobs.folder import PLAN, RESULT, ROW, JobFolder
from common.jobs.store import FAILED, STATES, Job, Store

METHOD_OF_SCRIPT = {f"{method}_train.py": method for method in ("distill", "sft", "kd", "dpo")}
LOST = "the table of jobs was lost before it ended; resume it"


def keep_row(folder: JobFolder, job: Job) -> None:
    """Write a job's row to its folder. Raises OSError."""
    folder.path.mkdir(exist_ok=True)
    folder.write(ROW, asdict(job))


def adopt_folders(store: Store, jobs_dir: Path) -> int:
    """Take every job that has a folder, but no row, into the table; how many there were."""
    known = store.ids()
    folders = [JobFolder(path) for path in sorted(jobs_dir.iterdir()) if path.name not in known]
    jobs = [job for folder in folders if folder.is_marked and (job := job_of(folder))]
    adopted = sum(store.adopt(job) for job in sorted(jobs, key=lambda job: (job.created, job.place)))
    if adopted:
        log(f"{adopted} jobs that the table did not know were taken over from their folders in {jobs_dir}")
    return adopted


def job_of(folder: JobFolder) -> Job | None:
    """The job of a folder: its row where that was kept, else what its plan and its result say."""
    row = folder.read(ROW)
    with contextlib.suppress(TypeError, ValueError):
        return checked(row, folder.path.name)
    plan = folder.read(PLAN)
    with contextlib.suppress(TypeError, ValueError, KeyError, IndexError, AttributeError):
        return checked(row_of_plan(folder, plan), folder.path.name)
    log(f"{folder.path}: neither {ROW} nor {PLAN} says which job it is; it is left alone")
    return None


def checked(row: Mapping[str, Any], job_id: str) -> Job:
    """A row as a job. Raises TypeError or ValueError for one that is none."""
    job = Job(**row)
    kinds = {"id": str, "method": str, "request": dict, "commands": list, "state": str, "artifacts": list}
    kinds |= {"stops": list, "number": int, "place": int, "attempt": int, "created": int | float, "bytes": int}
    damaged = [name for name, kind in kinds.items() if not isinstance(getattr(job, name), kind)]
    if damaged or job.id != job_id or job.state not in STATES:
        raise ValueError(f"the row of {job_id} is damaged: {', '.join(damaged) or 'id or state'}")
    return job


def row_of_plan(folder: JobFolder, plan: Mapping[str, Any]) -> dict[str, Any]:
    """A row for a folder of a service that kept none there."""
    result = folder.result(plan["attempt"])
    (training,) = (command for command in plan["commands"] if command["output"] == "")
    written = os.stat(folder.path / PLAN).st_mtime
    row: dict[str, Any] = dict.fromkeys(field.name for field in fields(Job))
    row |= {
        "number": 0,
        "id": folder.path.name,
        "method": METHOD_OF_SCRIPT[Path(training["argv"][0]).name],
        "request": {},
        "commands": plan["commands"],
        "place": 0,
        "attempt": plan["attempt"],
        "created": written,
        "started": written,
        "artifacts": [],
        "bytes": folder.size(),
        "cancel": False,
        "stops": [],
    }
    if result:
        ended = os.stat(folder.path / RESULT).st_mtime
        outcome = {"state": result["state"], "error": result["error"], "artifacts": result["artifacts"]}
        return row | outcome | {"handed": False, "ended": ended}
    if folder.is_locked():  # its worker goes on
        return row | {"state": "running", "handed": True, "slot": 0}
    error = {"reason": LOST, "exit_code": None, "log": folder.log_tail()}
    return row | {"state": FAILED, "handed": False, "ended": written, "error": error}
