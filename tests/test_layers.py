"""The house's contract: rooms import only rooms below them, scripts stand alone, and `common` knows no script."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys

import pytest
from support.inputs import ROOT
from support.processes import LONGEST

SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
MODULES = sorted(ROOT.glob("common/**/*.py"))


@functools.cache
def tree_of(path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imported(path) -> set[str]:
    """Top-level names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def test_rooms_import_only_rooms_below_them():
    """The contracts in pyproject.toml, by import-linter."""
    command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=LONGEST)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_scripts_do_not_import_each_other(script):
    assert not imported(ROOT / f"{script}.py") & SCRIPTS


def test_common_neither_imports_nor_executes_a_script():
    for path in MODULES:
        assert not imported(path) & SCRIPTS, path
        assert not imported(path) & {"runpy"}, f"{path} runs a file by its path"
        assert "spec_from_file_location" not in path.read_text(), f"{path} runs a file by its path"


def test_what_was_asked_for_travels_as_settings():
    """Only scripts, `cli` and the modules of flags have functions that take a Namespace."""
    for path in MODULES:
        if path.name in ("cli.py", "flags.py"):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.arg) and node.annotation is not None:
                assert "Namespace" not in ast.unparse(node.annotation), f"{path}, line {node.lineno}"


def test_every_room_says_what_it_is():
    for folder in {path.parent for path in MODULES}:
        assert ast.get_docstring(tree_of(folder / "__init__.py")), f"{folder}/__init__.py says nothing"
