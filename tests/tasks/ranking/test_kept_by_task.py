"""A base's folder keeps the priors and calibrations of several tasks, and reads those of a folder that kept one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.inputs import ROOT

from common.data import task_record
from common.models.source import ModelSource
from common.tasks.ranking.calibration import Calibration
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.loading import load_task

TICKETS = load_task(str(ROOT / "recipes" / "ticket_severity.yaml"))
TEXT = "Mail. Users affected: 3, Hours open: 2, mails arrive an hour late, no workaround"


@pytest.fixture
def folder(tiny_base, tmp_path) -> Path:
    """A base, without what other tests have had computed for it."""
    left_out = shutil.ignore_patterns("prior*.json", "calibration*.json")
    return Path(shutil.copytree(tiny_base, tmp_path / "base", ignore=left_out))


def fitted(task, bias: float) -> Calibration:
    return Calibration(task.labels, "fitted", bias=(bias, *[0.0] * (len(task.labels) - 1)))


def test_two_tasks_on_one_base(folder):
    fitted(CREDITMIX, 1.0).save(CREDITMIX.file_in(folder, "calibration"))
    fitted(TICKETS, 2.0).save(TICKETS.file_in(folder, "calibration"))
    for task, bias in ((CREDITMIX, 1.0), (TICKETS, 2.0), (CREDITMIX, 1.0)):
        classifier = Classifier.load(ModelSource(str(folder)), task)
        assert classifier.calibration(None).bias[0] == bias and classifier.prior.shape == (len(task.labels),)
        assert classifier.answers([TEXT], classifier.calibration(None))[0]["prediction"] in task.labels
    names = {file.name for file in folder.glob("*.json") if file.name.startswith(("calibration", "prior"))}
    assert names == {
        "calibration.json", "prior.json", "calibration.ticket_severity.json", "prior.ticket_severity.json"}  # fmt: skip


def test_what_another_task_has_left_is_not_taken(folder):
    fitted(CREDITMIX, 1.0).save(folder / "calibration.json")
    assert Classifier.load(ModelSource(str(folder)), TICKETS).calibration(None).method == "prior"


def test_nothing_is_subtracted_of_a_model_that_was_trained_for_the_task(folder):
    """Of a base, and of what was trained for something else, the prior is."""
    records = {"none": CREDITMIX.record(), "prior": task_record.of_prompts(task_record.ROWS, "rows", [])}
    for method, record in records.items():
        task_record.write(folder, record)
        assert Classifier.load(ModelSource(str(folder)), CREDITMIX).calibration(None).method == method
    (folder / task_record.FILE).unlink()
    classifier = Classifier.load(ModelSource(str(folder)), CREDITMIX)
    assert classifier.calibration(None).method == "prior"
    assert classifier.answers([TEXT], classifier.calibration(None))[0]["prior"]["Good"] != 0


def test_a_folder_that_kept_one_task_is_read(folder):
    fitted(TICKETS, 3.0).save(folder / "calibration.json")
    classifier = Classifier.load(ModelSource(str(folder)), TICKETS)
    assert classifier.calibration(None).bias[0] == 3.0
    assert not TICKETS.file_in(folder, "prior").exists()  # nobody has asked for it
    assert classifier.prior.shape == (len(TICKETS.labels),)
    computed = TICKETS.file_in(folder, "prior")
    entry = json.loads(computed.read_text())
    computed.unlink()
    entry["prior"] = dict.fromkeys(TICKETS.labels, -7.0)
    (folder / "prior.json").write_text(json.dumps(entry))
    assert list(Classifier.load(ModelSource(str(folder)), TICKETS).prior) == [-7.0] * len(TICKETS.labels)
