"""The models that jobs have put among the runs that are served: which they are, and how one goes again.

A run is set aside first, under a name that no server looks at, so that a kill leaves either all of it or nothing that
is served; what was set aside is deleted afterwards, at the latest by the next start. The steps go before their model,
which can then be asked to go again.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.cli import UserError
from common.jobs.folder import ARTIFACTS, DELETED, JOB_ID, JobFolder
from common.models import adapters
from common.web.app import Problem

OWNER = "owner.json"  # in a run's folder: the job that it is of
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
STEP = "-step-"  # between a model's name and the step of an earlier state


def owner_of(run: Path) -> str | None:
    """The job that has published a run; None where none has."""
    return None if run.is_symlink() else JobFolder(run).read(OWNER).get("job_id")


def states(runs_dir: Path, name: str) -> list[Path]:
    """The folders of a model that a job has published: its earlier states, and its own, the last.

    Raises:
        Problem: 404 where there is no such model, 403 where no job has made it.
    """
    run = runs_dir / name
    if not NAME.fullmatch(name) or not os.path.isdir(run):  # which Path.is_dir refuses to say of too long a name
        raise Problem(404, f"there is no model {name[:200]!r}; GET /v1/models lists those there are", "model")
    owner = owner_of(run)
    if owner is None:
        raise Problem(403, f"{name} was not made by a job of this service; delete its folder, {run}, by hand", "model")
    steps = [step for step in runs_dir.glob(f"{name}{STEP}*") if step.name.removeprefix(name + STEP).isdigit()]
    return [*sorted(step for step in steps if owner_of(step) == owner), run]


def standing_on(runs_dir: Path, jobs_dir: Path, model: Path) -> Iterator[str]:
    """The runs and the jobs whose adapters are put on a model: "model NAME" or "job ID" of each."""
    place = os.path.realpath(model)
    for name, base in (*_bases_of_runs(runs_dir), *_bases_of_jobs(jobs_dir)):
        if os.path.realpath(base) == place:
            yield name


def _bases_of_runs(runs_dir: Path) -> Iterator[tuple[str, str]]:
    for run in sorted(runs_dir.iterdir()):
        if run.name.startswith(".") or not adapters.is_adapter(run):
            continue
        with contextlib.suppress(UserError):  # a broken one stands on nothing
            yield f"model {run.name}", adapters.base_of(run)


def _bases_of_jobs(jobs_dir: Path) -> Iterator[tuple[str, str]]:
    for folder in sorted(jobs_dir.iterdir()):
        if JOB_ID.fullmatch(folder.name) and (base := base_of(JobFolder(folder))):
            yield f"job {folder.name}", base


def base_of(folder: JobFolder) -> str | None:
    """The base that the adapter among a job's artifacts is put on; None where there is no adapter, or a broken one."""
    base = folder.read(f"{ARTIFACTS}/{adapters.ADAPTER_CONFIG}").get("base_model_name_or_path")
    return base if isinstance(base, str) and base and "\0" not in base else None


def delete(folders: Sequence[Path]) -> None:
    """Delete runs, one after the other. Raises OSError where one cannot be set aside; it is whole then."""
    delete_set_aside(folders[0].parent)  # an earlier one of the same name would be in the way
    for folder in folders:
        folder.rename(folder.with_name(f".{folder.name}{DELETED}"))
    delete_set_aside(folders[0].parent)


def delete_set_aside(runs_dir: Path) -> None:
    """Delete the runs that were set aside; all others are left alone, whatever they are."""
    for folder in runs_dir.glob(f".*{DELETED}"):
        if NAME.fullmatch(folder.name[1:]) and folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)
