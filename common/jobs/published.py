"""The models that jobs have put among the runs that are served: which they are, and how one goes again.

A run is set aside first, under a name that no server looks at, so that a kill leaves either all of it or nothing that
is served; what was set aside is deleted afterwards, at the latest by the next start. The steps go before their model,
which can then be asked to go again.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.cli import UserError
from common.jobs.folder import DELETED, JobFolder
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


def standing_on(runs_dir: Path, model: Path) -> Iterator[str]:
    """The names of the runs whose adapters are put on a model."""
    for run in sorted(runs_dir.iterdir()):
        if run.name.startswith(".") or not adapters.is_adapter(run):
            continue
        try:
            base = adapters.base_of(run)
        except UserError:  # a broken one stands on nothing
            continue
        if os.path.realpath(base) == os.path.realpath(model):
            yield run.name


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
