"""Every command that the project shows is one that its scripts understand, and every script answers at once."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
import yaml
from support.inputs import ROOT
from support.processes import LONGEST
from support.scripts import parser_of

from common import cli
from common.tasks.ranking.loading import load_task

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
ESTABLISHED = """
python creditmix_prepare.py --src data/creditmix_dataset.json --outdir data
python sft_train.py --student Qwen/Qwen2.5-3B-Instruct --data data/creditmix_sft.jsonl --save_dir runs/creditmix_sft \
    --epochs 5 --max_steps 7115
python kd_train.py --student Qwen/Qwen2.5-3B-Instruct --data data/creditmix_kd.jsonl --idp_mode \
    --save_dir runs/creditmix_kd --epochs 5 --max_steps 7115
python dpo_train.py --student Qwen/Qwen2.5-3B-Instruct --data data/creditmix_dpo.jsonl --save_dir runs/creditmix_dpo \
    --epochs 5 --beta 0.1 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --max_len 256 \
    --max_steps 7115
python eval_creditmix.py --model_dir runs/creditmix_sft --data data/creditmix_dataset.json --val_per_class 1500
python eval_creditmix.py --model_dir runs/creditmix_sft --data data/creditmix_dataset.json --val_frac 0.2
python eval_creditmix.py --model_dir Qwen/Qwen2.5-3B-Instruct --data data/creditmix_dataset.json --val_per_class 1500
python eval_creditmix.py --model_dir runs/creditmix_sft --fit_calibration data/creditmix_dev.jsonl
python infer_creditmix.py --model_dir runs/creditmix_sft --features "Age: 23.0, Occupation: Scientist, Annual Income: \
19114.12, Outstanding Debt: 809.98, Credit Utilization Ratio: 35.03, Payment Behaviour: Low_spent_Small_value_payments"
"""
SHELL = {"|", "||", "&&", "&", ";", ">", ">>", "<", "2>", "2>&1"}
PROGRAM = re.compile(
    r"(?:[A-Z_]+=\S+ +)*(?:\S*python3? |torchrun |accelerate |uvicorn \w+:|\S*pip install |\./\S|recipes/\S+\.sh)"
)


def code_of(page: str) -> str:
    """The lines of a Markdown page that are code: blocks, fenced or indented, and what stands between backticks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}.*$", page, re.MULTILINE)
    return "\n".join([*blocks, *indented, *re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page)])


def shown_commands() -> Iterator[tuple[str, str]]:
    """(where, command line) of what the documents, recipes and docstrings tell a reader to run."""
    texts = {"established": ESTABLISHED}
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("common/*.md")]:
        texts[str(path.relative_to(ROOT))] = code_of(path.read_text())
    for path in [*ROOT.glob("recipes/*.y*ml"), *ROOT.glob("requirements/*.txt"), ROOT / "mkdocs.yml"]:
        texts[str(path.relative_to(ROOT))] = re.sub(r"^# *", "", path.read_text(), flags=re.MULTILINE)
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("docs/*.py"),
        *ROOT.glob("common/**/*.py"),
        *ROOT.glob("bench/**/*.py"),
    ]:
        texts[str(path.relative_to(ROOT))] = ast.get_docstring(ast.parse(path.read_text())) or ""
    for where, text in texts.items():
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            command = line.strip().removeprefix("$ ")
            if PROGRAM.match(command):
                yield where, command


COMMANDS = sorted(set(shown_commands()))


def program_of(words: list[str]) -> tuple[Path | None, list[str]]:
    """(the file of this project that a command runs, what is given to it); None: a tool of somebody else's."""
    for index, word in enumerate(words):
        if word.endswith((".py", ".sh")):
            return ROOT / word, words[index + 1 :]
        if word == "-m" and words[index + 1].partition(".")[0] in ("common", "bench", "docs"):
            module = ROOT / words[index + 1].replace(".", "/")
            return module / "__main__.py" if module.is_dir() else module.with_suffix(".py"), words[index + 2 :]
    return None, []


@pytest.mark.parametrize(("where", "command"), COMMANDS, ids=[f"{w}-{c[:40]}" for w, c in COMMANDS])
def test_shown_commands_parse(where, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    if "..." in words:
        return  # left to the reader
    for file in re.findall(r"-r (\S+\.txt)", command) if "install" in words else ():
        assert Path(file).is_file(), f"{file} is not there"
    if "uvicorn" in words:
        return check_uvicorn(words[words.index("uvicorn") + 1 :])
    program, argv = program_of(words)
    if program is None:
        return
    assert program.is_file(), f"{program} is not there"
    if program.suffix == ".sh":
        assert os.access(program, os.X_OK)
        return
    end = next((i for i, word in enumerate(argv) if word in SHELL), len(argv))
    parser = parser_of(program)
    if parser and argv:  # without arguments it is named, not run
        cli.parse_args(parser, argv[:end])


def check_uvicorn(argv: list[str]) -> None:
    """uvicorn's own flags, and an application under the name that it is given."""
    module, _, name = uvicorn.main.make_context("uvicorn", argv).params["app"].partition(":")
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    defined |= {each.id for node in tree.body for each in getattr(node, "targets", ()) if isinstance(each, ast.Name)}
    assert name == "app" and "__getattr__" in defined, f"{module} makes no {name}"


def test_commands_are_found():
    """The search itself: all established ones, and those of every trainer's docstring."""
    assert sum(where == "established" for where, _ in COMMANDS) == 9
    assert {where for where, _ in COMMANDS} >= {*SCRIPTS}
    assert all("\\" not in command for _, command in COMMANDS)
    for word in ("python -m common.vram", "uvicorn serve_creditmix:app", "uvicorn serve_distill:app", "torchrun"):
        assert any(word in command for _, command in COMMANDS), word


BLOCKER = """
import runpy, sys
for name in ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "sklearn", "matplotlib"):
    sys.modules[name] = None  # importing it fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(script: str, *argv: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-c", BLOCKER, script, *argv]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST)


@pytest.mark.processes
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_usage_errors_come_without_torch(script):
    told = run(script, "--help")
    assert (told.returncode, told.stderr) == (0, "")
    docstring = ast.get_docstring(ast.parse((ROOT / script).read_text()))
    assert docstring.splitlines()[0] in told.stdout
    told = run(script, "--no_such_flag")
    assert (told.returncode, told.stdout) == (2, "")
    assert re.fullmatch(rf"error: .* \(see: python {script} --help\)\n", told.stderr)


@pytest.mark.processes
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_does_something(script):
    source = (ROOT / script).read_text()
    for room in re.findall(r"from common\.(\w+(?:\.\w+)?) import", source):
        source += "".join(path.read_text() for path in (ROOT / "common" / room.replace(".", "/")).glob("*.py"))
    for room in re.findall(r"from common\.([\w.]+)\.flags import", source):  # also those that a room's flags build on
        source += (ROOT / "common" / room.replace(".", "/") / "flags.py").read_text()
    parser = parser_of(ROOT / script)
    for action in parser._actions:
        if action.dest not in ("help", "config"):  # --config is read by cli.parse_args
            assert re.search(rf"\b(args|settings|self)\.{action.dest}\b|\"{action.dest}\"", source), (
                f"--{action.dest} is never read"
            )
            assert action.help or action.choices or action.default is not None or action.required, action.dest


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("recipes/*.y*ml")), ids=lambda path: path.name)
def test_recipes_are_settings_of_a_trainer_or_a_task(recipe):
    settings = yaml.safe_load(recipe.read_text())
    if "distributed_type" in settings:
        return  # accelerate's; see test_launch.py
    if isinstance(settings.get("labels"), list):
        load_task(str(recipe))
        return
    faults = []
    for script in SCRIPTS:
        parser = parser_of(ROOT / script)
        if "--config" not in parser._option_string_actions:
            continue
        try:
            needed = ["--student", "s", "--data", "d", "--save_dir", "r"]
            cli.parse_args(parser, [*needed, "--config", str(recipe)])
            return
        except cli.UserError as error:
            faults.append(str(error))
    pytest.fail(f"no trainer takes {recipe.name}: {faults}")
