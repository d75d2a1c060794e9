"""docs/drift.md's release and its scheduled job, step by step as printed, with `gh` and `pip` that stand in."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.inputs import ROOT, write_rows
from support.served import make_run

import eval_creditmix
from common.files import sha256_file
from common.tasks.ranking import creditmix

pytestmark = pytest.mark.processes

PAGE = (ROOT / "docs" / "drift.md").read_text()
(RELEASE,) = (block for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) if "gh release" in block)
(JOB,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
GH = """#!/bin/sh
case "$1 $2 $3" in
"release create creditmix-1") cp "$4" "$RELEASED" ;;
"release download creditmix-1") test -n "$GH_TOKEN" && test "$4" = --pattern && cp "$RELEASED/$5" . ;;
*) exit 1 ;;
esac
"""
PIP = '#!/bin/sh\ntest "$1 $2" = "install -r" && test -f "$3"\n'


@pytest.fixture
def tools(tmp_path) -> dict[str, str]:
    """The environment in which the steps run."""
    folder, released = tmp_path / "bin", tmp_path / "released"
    folder.mkdir()
    released.mkdir()
    for name, text in (("gh", GH), ("pip", PIP), ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "RELEASED": str(released)}


def shell(script: str, cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    words = ["bash", "-eo", "pipefail", "-c", script]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_job_as_printed(base, tmp_path, tools, monkeypatch):
    home, place = tmp_path / "home", tmp_path / "runner"
    shutil.copytree(base, home / "models" / "tiny_student")
    run = make_run(home / "runs" / "creditmix_sft", base, seed=1)
    (run / "checkpoint-3").mkdir()
    rows = creditmix.synthesize(150, seed=3)
    baseline = write_rows(tmp_path / "rows.jsonl", rows)
    monkeypatch.chdir(home)
    argv = ["--data", baseline, "--split", "all", "--report_dir", "runs/creditmix_sft/baseline"]
    eval_creditmix.main(["--model_dir", "runs/creditmix_sft", *argv])
    told = shell(RELEASE, home, tools)
    assert told.returncode == 0, told.stderr
    archive = Path(tools["RELEASED"], "model.tar.gz")
    assert sha256_file(archive) in told.stdout

    steps = yaml.safe_load(JOB.replace("SHA256", sha256_file(archive)))["jobs"]["drift"]["steps"]
    checkouts = [step.get("with", {}).get("path", "") for step in steps if step.get("uses") == "actions/checkout@v4"]
    assert checkouts == ["", "toolkit"]
    write_rows_at(place / "slices" / "latest.jsonl", rows)
    for name in ("common", "recipes", "requirements"):
        shutil.copytree(ROOT / name, place / "toolkit" / name)
    for file in (*ROOT.glob("*.py"), ROOT / "requirements.txt"):
        shutil.copy(file, place / "toolkit")
    assert go_through(steps, place, tools) == 0
    assert not list(place.glob("runs/*/checkpoint-*"))
    assert json.loads((place / "drift" / "metrics.json").read_text())["drift"]["drifted"] is False

    stored = place / "runs" / "creditmix_sft" / "baseline" / "metrics.json"
    better = json.loads(stored.read_text())
    better["models"][0] |= {"predictions": better["rows"]["y"], "accuracy": {"value": 1.0, "low": 1.0, "high": 1.0}}
    stored.write_text(json.dumps(better))
    (judge,) = (step for step in steps if "eval_creditmix.py" in step.get("run", ""))
    assert go_through([judge], place, tools) == eval_creditmix.DRIFTED
    (report,) = (step["with"]["path"] for step in steps if step.get("uses", "").startswith("actions/upload-artifact"))
    assert (place / report / "report.html").is_file()


def write_rows_at(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True)
    write_rows(path, rows)


def go_through(steps: list[dict], place: Path, tools: dict[str, str]) -> int:
    """The exit code of the first step that fails, as the runner would stop there; 0 where none does."""
    for step in steps:
        if "run" in step:
            given = {name: re.sub(r"\$\{\{.*?\}\}", "secret", value) for name, value in step.get("env", {}).items()}
            told = shell(step["run"], place / step.get("working-directory", ""), tools | given)
            if told.returncode:
                return told.returncode
    return 0
