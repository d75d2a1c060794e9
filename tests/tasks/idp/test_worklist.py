"""The joints of recipes/underwriting_worklist.sh: made-up letters, lines of features, the order of the work list."""

from __future__ import annotations

import csv
import json
import subprocess

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


def test_the_script_is_valid_shell():
    script = ROOT / "recipes" / "underwriting_worklist.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert script.stat().st_mode & 0o111
