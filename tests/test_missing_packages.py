"""Scripts on a Python that lacks something: the packages, or what only Linux and macOS have."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.inputs import ROOT

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))

# As on native Windows: what these modules are for has to be done without, or refused with a sentence.
AS_ON_WINDOWS = """
import asyncio, importlib, multiprocessing, pkgutil, runpy, subprocess, sys, tempfile, uuid
import torch, transformers, peft, fastapi, uvicorn  # whose own use of them is theirs to guard
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
import common
for module in pkgutil.walk_packages(common.__path__, "common."):
    if module.name not in ("common.sandbox.box_child", "common.vram.__main__", "common.tasks.ranking.ray_scoring"):
        importlib.import_module(module.name)
for script in sys.argv[1:]:
    runpy.run_path(script, run_name="imported")
"""


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


@pytest.mark.processes
def test_without_what_windows_lacks_everything_is_imported():
    result = run(sys.executable, "-c", AS_ON_WINDOWS, *SCRIPTS)
    assert result.returncode == 0, result.stderr
