"""One server for runs of several label sets, and of other tasks: each is asked for what it was trained for."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import pytest
from support.inputs import ROOT
from support.served import ROWS, make_run, replace_adapter, same, serve, settings

from common.data import task_record
from common.models.source import ModelSource
from common.serving.routes import RunEntry
from common.serving.run_registry import LOOK, Version, describe
from common.serving.server import Server
from common.tasks.ranking.calibration import Calibration
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.loading import load_task

pytestmark = pytest.mark.processes

TICKETS = load_task(str(ROOT / "recipes" / "ticket_severity.yaml"))
TEXT = "Mail. Users affected: 3, Hours open: 2, mails arrive an hour late, no workaround"
TICKET, CREDIT = {"features": TEXT}, {"features": ROWS[0]}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "additionalProperties": False}


@pytest.fixture
def mixed(own, base):
    """Runs of two label sets, of documents and of code on one base."""
    task_record.write(own / "creditmix_sft", CREDITMIX.record())
    records = {
        "severity": TICKETS.record(),
        "forms": {"kind": "idp", "name": "idp", "schema": SCHEMA},
        "programs": {"kind": "codegen", "name": "codegen"},
    }
    for seed, (name, record) in enumerate(records.items(), start=5):
        task_record.write(make_run(own / name, base, seed), record)
    return own


@pytest.mark.parametrize("columns", [(), ("subject", "body")])
def test_the_columns_of_a_line_are_listed_in_their_order(tmp_path, columns):
    task = replace(TICKETS, text_columns=columns)
    known = describe(Version("a", str(tmp_path), str(tmp_path), "0" * 64, (), task.text))
    assert known["text_fields"] == ["ticket"]
    assert RunEntry(**known, loaded=False, current=True).text_columns == (list(columns) or None)


def test_two_label_sets_each_with_its_calibration(mixed, base):
    folder = mixed / "severity"
    Calibration(TICKETS.labels, "fitted", bias=(0.0, 40.0, 0.0, 0.0)).save(TICKETS.file_in(folder, "calibration"))
    Calibration(CREDITMIX.labels, "fitted", bias=(0.0, 0.0, 40.0)).save(mixed / "creditmix_sft" / "calibration.json")
    classifier = Classifier.load(ModelSource(str(folder)), TICKETS)
    wanted = classifier.answers([TEXT], classifier.calibration(None))[0]
    on_base = Classifier.load(ModelSource(base), TICKETS)
    with serve(mixed) as served:
        for _ in range(2):
            same(served.post("/infer/severity", TICKET), wanted)
            assert served.post("/infer/sft", CREDIT)["prediction"] == "Bad"
            assert set(served.post("/infer/kd", CREDIT)["scores"]) == set(CREDITMIX.labels)  # a run from before
            assert set(served.post("/infer/base", CREDIT)["scores"]) == set(CREDITMIX.labels)
            answer = served.post("/infer/base/batch?task=ticket_severity", [TICKET, TICKET])[1]
            same(answer, on_base.answers([TEXT], on_base.calibration(None))[0])
        assert served.post("/infer/severity?task=ticket_severity", TICKET)["prediction"] == "Medium"
        listed = {model["name"]: model for model in served.ask("GET", "/models")[1]["models"]}
        assert "was trained for ticket_severity" in served.refused(422, "/infer/severity?task=creditmix", CREDIT)
        assert "there are creditmix, ticket_severity" in served.refused(422, "/infer/base?task=other", CREDIT)
    assert (listed["severity"]["task"], listed["severity"]["labels"]) == ("ticket_severity", list(TICKETS.labels))
    assert (listed["creditmix_kd"]["task"], listed["base"]["task"]) == (None, None)


def test_a_run_of_another_task_is_refused(mixed):
    with serve(mixed) as served:
        for name in ("forms", "programs"):
            assert "not for creditmix" in served.refused(422, f"/infer/{name}", CREDIT)
        asked = {"document": "x", "schema": SCHEMA, "run": "severity"}
        assert "not for extracting fields from documents" in served.refused(422, "/infer/idp", asked)
        assert "not for writing code" in served.refused(422, "/infer/codegen", {"prompt": "x", "run": "forms"})
        # without a name, the run is chosen by what it was trained for
        answer = served.post("/infer/idp", {"document": "x", "schema": SCHEMA})
        assert answer["model_name"] == str(mixed / "forms")
        code = served.post("/infer/codegen", {"prompt": "x", "max_new_tokens": 4})
        assert code["model_name"] == str(mixed / "programs")


def test_what_is_kept_beside_a_model_makes_it_no_newer(mixed, base):
    """Figures, calibrations and teachers' answers are written into the folder of an old run, too."""
    newer = make_run(mixed / "invoices", base, 9)
    task_record.write(newer, {"kind": "idp", "name": "idp", "schema": SCHEMA})
    for file in ("idp_calibration.json", "cascade.jsonl", "README.md"):
        (mixed / "forms" / file).write_text("{}")
    (mixed / "idp_two").mkdir()
    for file in ("a.gguf", "b.gguf"):  # which of them it is cannot be said
        (mixed / "idp_two" / file).touch()
    server = Server(settings(mixed))
    assert server.newest("idp") == "invoices"
    replace_adapter(mixed / "forms", newer)
    assert server.newest("idp") == "invoices"  # which was trained a minute ago
    os.utime(mixed / "forms" / "adapter_model.safetensors")
    assert server.newest("idp") == "forms"


def test_a_record_that_comes_or_breaks_is_noticed(own):
    run = own / "creditmix_sft"
    with serve(own) as served:
        assert set(served.post("/infer/sft", CREDIT)["scores"]) == set(CREDITMIX.labels)
        replace_record(run, json.dumps(TICKETS.record()))
        assert set(served.post("/infer/sft", TICKET)["scores"]) == set(TICKETS.labels)
        replace_record(run, "[")
        assert "task.json is broken" in served.refused(409, "/infer/sft", TICKET)
        listed = {model["name"]: model["error"] for model in served.ask("GET", "/models")[1]["models"]}
        assert "task.json is broken" in listed.pop("creditmix_sft")
        assert set(listed.values()) == {None}
        assert set(served.post("/infer/kd", CREDIT)["scores"]) == set(CREDITMIX.labels)


def replace_record(run, text: str) -> None:
    """Put a record in place, a while ago, and wait until the server looks again."""
    (run / "new").write_text(text)
    os.utime(run / "new", (time.time() - 60 * len(text), time.time() - 60 * len(text)))
    os.replace(run / "new", run / task_record.FILE)
    time.sleep(1.1 * LOOK)
