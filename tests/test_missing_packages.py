"""Scripts on a Python that lacks something: the packages, or what only Linux and macOS have."""

from __future__ import annotations

import importlib
import pkgutil
import runpy
import subprocess
import sys

import pytest
from support.inputs import ROOT
from support.processes import LONGEST

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))

UNIX = ("fcntl", "resource", "pwd", "grp", "termios")
NEEDS_MORE = ("common.sandbox.box_child", "common.vram.__main__", "common.tasks.ranking.ray_scoring")


def import_everything(scripts: list[str]) -> None:
    """As on native Windows: what `UNIX` is for has to be done without, or refused with a sentence."""
    import fastapi
    import peft
    import torch
    import transformers
    import uvicorn  # whose own use of them is theirs to guard, as it is of the standard library

    assert all((fastapi, peft, torch, transformers, uvicorn))
    for name in [name for name in sys.modules if name.partition(".")[0] == "common"]:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(UNIX))
    import common

    for module in pkgutil.walk_packages(common.__path__, "common."):
        if module.name not in NEEDS_MORE:
            importlib.import_module(module.name)
    for script in scripts:
        runpy.run_path(script, run_name="imported")


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_packages_there_is_a_sentence(script):
    result = run(sys.executable, "-IS", "-c", f"import runpy, sys; sys.path.insert(0, '.'); runpy.run_path({script!r})")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: the package ")
    assert line.endswith("; source .venv/bin/activate, or pip install -r requirements.txt")
    assert result.returncode == 1


def test_a_module_of_the_projects_own_has_a_traceback():
    result = run(sys.executable, "-c", "import common, common.nothing")
    assert "Traceback" in result.stderr


def test_without_what_windows_lacks_everything_is_imported(spawn, tmp_path):
    child = spawn(import_everything, [str(ROOT / script) for script in SCRIPTS], tmp_path / "log")
    child.join(LONGEST)
    assert child.exitcode == 0, (tmp_path / "log").read_text()
