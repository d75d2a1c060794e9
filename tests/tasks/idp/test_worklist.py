"""The joints of recipes/underwriting_worklist.sh: made-up letters, lines of features, the order of the work list."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest
from support.inputs import ROOT, write_rows

from common.cli import UserError
from common.generation import json_schema
from common.tasks.ranking import creditmix
from recipes import make_applications, worklist


def test_letters_say_what_their_fields_hold(tmp_path):
    out = tmp_path / "letters.jsonl"
    make_applications.main(["--rows", "50", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == 50
    schema = json_schema.load(ROOT / "recipes" / "application_schema.json")
    assert json_schema.preflight(schema).enforced
    for row in rows:
        assert json_schema.errors(row["fields"], schema) == []
        for key in ("age", "occupation", "annual_income", "outstanding_debt", "credit_utilization_ratio"):
            assert str(row["fields"][key]) in row["document"]
        line = worklist.features(row["fields"])
        assert creditmix.clean_features(line) == line
        assert [key for key, _ in creditmix.split_features(line)] == [
            "Age", "Occupation", "Annual Income", "Outstanding Debt", "Credit Utilization Ratio", "Payment Behaviour",
        ]  # fmt: skip
    debts = [row["fields"]["outstanding_debt"] for row in rows]
    assert len(set(debts)) == 50


def test_the_list_is_sorted_by_risk_and_doubt(tmp_path):
    fields = {"age": 30, "occupation": "Media Manager", "annual_income": 1.5, "outstanding_debt": 2.0,
              "credit_utilization_ratio": 30.0, "payment_behaviour": "Low_spent_Small_value_payments"}  # fmt: skip
    read = [{"id": name, "fields": fields, "confidence": {"age": 0.9, "occupation": 0.5}} for name in "abcd"]
    read.insert(2, {"id": "e", "error": "the JSON breaks off", "text": "{"})
    told = [("Good", 0.1), ("Bad", 2.0), ("Standard", 0.2), ("Bad", 0.3)]
    answers = [{"prediction": label, "top2_margin": margin, "probabilities": {"Bad": 0.4}} for label, margin in told]
    paths = [write_rows(tmp_path / name, rows) for name, rows in (("read.jsonl", read), ("answers.jsonl", answers))]
    out = tmp_path / "list.csv"
    worklist.main(["list", "--read", paths[0], "--answers", paths[1], "--out", str(out)])
    with out.open() as handle:
        rows = list(csv.DictReader(handle))
    assert [row["id"] for row in rows] == ["e", "d", "b", "c", "a"]
    assert rows[0]["note"] == "to be read by a person: the JSON breaks off"
    assert (rows[1]["prediction"], rows[1]["top2_margin"], rows[1]["least_confidence"]) == ("Bad", "0.300", "0.500")
    worklist.main(["features", "--read", paths[0], "--out", str(tmp_path / "features.jsonl")])
    lines = (tmp_path / "features.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[0])["features"].startswith("Age: 30, Occupation: Media_Manager, Annual Income: 1.5, ")
    with pytest.raises(UserError, match="list needs --answers"):
        worklist.main(["list", "--read", paths[0], "--out", str(out)])


SCRIPT = ROOT / "recipes" / "underwriting_worklist.sh"
STAND_IN = """#!{python} -IS
import json, os, pathlib, sys
words = sys.argv[1:]
with open("calls.log", "a") as log:
    log.write(json.dumps(words) + "\\n")
given = dict(zip(words, words[1:]))
stopped = os.environ.get("STOP_AT", "nowhere") in " ".join(words)
def leave(folder, name, text=""):
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    pathlib.Path(folder, name).write_text(text)
if words[0] == "sft_train.py":
    leave(given["--save_dir"], "run.json", json.dumps(dict(data=dict(path=given["--data"]))))
if stopped:
    sys.exit(130)
if words[0] == "sft_train.py":
    leave(given["--save_dir"], "adapter_config.json")
if "--report_dir" in given:
    leave(given["--report_dir"], "metrics.json")
if "--fit_calibration" in given:
    leave(given["--model_dir"], "calibration.json")
if words[1] == "list":
    leave("runs/underwriting", "worklist.csv")
"""


@pytest.fixture
def recipe(tmp_path):
    """Runs the script on a stand-in for Python, from another folder; the commands that it gave."""
    root = tmp_path / "check out"
    (root / "recipes").mkdir(parents=True)
    script = shutil.copy(SCRIPT, root / "recipes")
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=os.path.realpath(sys.executable)))
    python.chmod(0o755)

    def run(*arguments: str, code: int = 0, **extra: str) -> list[list[str]]:
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(python)} | extra
        done = subprocess.run([script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        log = root / "calls.log"
        found = [json.loads(line) for line in log.read_text().splitlines()]
        log.unlink()
        return found

    run.root = root
    return run


@pytest.mark.processes
@pytest.mark.parametrize("run", ["runs/sft_applications", "runs/creditmix_sft"])
def test_a_stopped_training_is_begun_anew(run, recipe):
    def trained(calls: list[list[str]]) -> list[list[str]]:
        return [call for call in calls if call[0] == "sft_train.py" and run in call]

    (first,) = trained(recipe(STOP_AT=f"--save_dir {run}", code=130))
    (again,) = trained(recipe())
    assert again == [*first, "--overwrite"]
    assert trained(recipe()) == []


@pytest.mark.processes
def test_what_follows_a_training_is_made_up_for(recipe):
    follows = ("--report_dir", "--fit_calibration")
    for flag in follows:
        recipe(STOP_AT=flag, code=130)
    calls = recipe()
    assert [call[0] for call in calls if "--fit_calibration" in call] == ["eval_creditmix.py"]
    assert not any(call[0] == "sft_train.py" for call in calls)
    assert not any(flag in call for call in recipe() for flag in follows)


@pytest.mark.processes
def test_a_run_of_somebody_else_is_left_alone(recipe, tmp_path):
    for name in ("reader", "classifier"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text('{"data": {"path": "rows.jsonl"}}')
    (tmp_path / "reader" / "adapter_config.json").write_text("")
    calls = recipe("letters.jsonl", READER="reader", CLASSIFIER="classifier")
    assert not any("--overwrite" in call or "make_applications" in call[0] for call in calls)
    (trained,) = (call for call in calls if call[0] == "sft_train.py")
    assert trained[-2:] == ["--save_dir", str(tmp_path / "classifier")]
    (read,) = (call for call in calls if call[0] == "infer_idp.py")
    assert read[2] == str(tmp_path / "reader")
    assert read[read.index("--input") + 1] == str(tmp_path / "letters.jsonl")


def test_the_script_is_valid_shell():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    assert SCRIPT.stat().st_mode & 0o111
