"""The server's cascade: an endpoint or a larger run answers what a run is not sure of, in time or not at all."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.inputs import CORPUS, ROOT, read_rows
from support.processes import LONGEST
from support.served import make_run, make_runs, metric, same, serve
from support.teacher import HANG

from common.cli import UserError
from common.data import task_record
from common.models import adapters
from common.serving.settings import ServerSettings
from common.tasks.ranking.loading import load_task
from common.teachers.cascade.settings import CascadeSettings, RunTeacher, endpoint

pytestmark = pytest.mark.processes

ROWS = [text.partition("\n\n")[2] for text in CORPUS[:24]]

ALL = 0.9999  # a row below this is handed on


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base) -> Path:
    return make_runs(tmp_path_factory.mktemp("cascade") / "runs", base)


def test_an_endpoint_answers_what_is_unsure(runs, stub, tmp_path):
    own = Path(shutil.copytree(runs, tmp_path / "runs"))
    stub.reply = lambda body: "Bad"
    cascade = CascadeSettings(endpoint(stub.url, "big", 5.0), ALL, per_hour=3, timeout=5.0, keep=True)
    rows = [{"features": row} for row in ROWS[:5]]
    with serve(own) as plain:
        alone = plain.post("/infer/sft/batch", rows)
    with serve(own, cascade=cascade) as served:
        answers = served.post("/infer/sft/batch", rows)
        assert [answer["answered_by"] for answer in answers[:3]] == ["big"] * 3
        assert [answer["prediction"] for answer in answers[:3]] == ["Bad"] * 3
        for answer, wanted in zip(answers[3:], alone[3:], strict=True):
            assert answer["prediction"] == wanted["prediction"]
            assert answer["answered_by"] == str(own / "creditmix_sft")
            assert (answer["unsure"], answer["cascade"]) == (True, "the budget of 3 rows an hour is used up")
        assert "answered_by" not in alone[0]
        assert metric(served, 'cascade_rows_total{adapter="creditmix_sft",outcome="teacher"}') == 3
        assert metric(served, 'cascade_rows_total{adapter="creditmix_sft",outcome="unsure"}') == 2
        assert len(read_rows(own / "creditmix_sft" / "cascade.jsonl")) == 3


def test_a_text_that_names_no_column_is_handed_on_too(base, stub, tmp_path):
    """It may be that of a row with a text, which a teacher labels as any other."""
    task = replace(load_task(str(ROOT / "recipes" / "ticket_severity.yaml")), text_columns=("subject", "body"))
    task_record.write(make_run(tmp_path / "runs" / "severity", base, 5), task.record())
    stub.reply = lambda body: "High"
    cascade = CascadeSettings(endpoint(stub.url, "big", 5.0), ALL, timeout=5.0)
    with serve(tmp_path / "runs", cascade=cascade) as served:
        bare, line = served.post("/infer/severity/batch", [{"features": "It burns"}, {"features": "Subject: It burns"}])
    assert [(answer["answered_by"], answer["prediction"]) for answer in (bare, line)] == [("big", "High")] * 2
    assert bare["warning"].startswith("no column of ticket_severity is in the text") and "warning" not in line


def test_a_teacher_that_hangs_costs_its_time_out_and_no_answer(runs, stub):
    stub.reply = lambda body: HANG
    cascade = CascadeSettings(endpoint(stub.url, "big", 0.4), ALL, timeout=0.4)
    with serve(runs, cascade=cascade) as served:
        served.post("/infer/sft", {"features": ROWS[0]})
        started = time.monotonic()
        answers = served.post("/infer/sft/batch", [{"features": row} for row in ROWS])
        assert time.monotonic() - started < LONGEST
        assert {answer["unsure"] for answer in answers} == {True}
        assert not (runs / "creditmix_sft" / "cascade.jsonl").exists()


def test_a_larger_run_answers(runs):
    rows = [{"features": row} for row in ROWS[:6]]
    with serve(runs) as plain:
        own, theirs = plain.post("/infer/sft/batch", rows), plain.post("/infer/kd/batch", rows)
    with serve(runs, cascade=CascadeSettings(RunTeacher("kd"), ALL, timeout=20.0)) as served:
        for answer, mine, wanted in zip(served.post("/infer/sft/batch", rows), own, theirs, strict=True):
            assert (answer["prediction"], answer["answered_by"]) == (wanted["prediction"], "kd")
            same({key: answer[key] for key in mine} | {"prediction": mine["prediction"]}, mine)
        assert {a["answered_by"] for a in served.post("/infer/kd/batch", rows)} == {str(runs / "creditmix_kd")}


def test_a_version_of_a_run_that_teaches_does_not_ask_itself(runs):
    teacher = RunTeacher(f"kd@{adapters.adapter_hash(runs / 'creditmix_kd')[:16]}")
    with serve(runs, cascade=CascadeSettings(teacher, ALL, timeout=20.0)) as served:
        assert served.post("/infer/sft", {"features": ROWS[0]})["answered_by"] == teacher.run
        for run in ("kd", teacher.run):
            assert served.post(f"/infer/{run}", {"features": ROWS[0]})["answered_by"] == str(runs / "creditmix_kd")


def test_a_run_that_is_not_there_leaves_the_student_s_answer(runs):
    with serve(runs, cascade=CascadeSettings(RunTeacher("gone"), ALL)) as served:
        answer = served.post("/infer/sft", {"features": ROWS[0]})
        assert answer["unsure"] is True
        assert answer["cascade"].startswith("the teacher cannot be asked:")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"CASCADE_BELOW": "0.8"}, "CASCADE_BELOW goes with CASCADE_ENDPOINT or CASCADE_RUN"),
        ({"CASCADE_KEEP": "1"}, "CASCADE_KEEP goes with CASCADE_ENDPOINT"),
        ({"CASCADE_ENDPOINT": "http://x/v1", "CASCADE_RUN": "kd"}, "are two teachers; set one of them"),
        ({"CASCADE_ENDPOINT": "http://x/v1"}, "needs the model's name there"),
        ({"CASCADE_ENDPOINT": "x", "CASCADE_MODEL": "m"}, "x is no address such as"),
        ({"CASCADE_RUN": "kd", "CASCADE_BELOW": "80"}, "CASCADE_BELOW=80 is no probability"),
        ({"CASCADE_RUN": "kd", "CASCADE_PER_HOUR": "0"}, "CASCADE_PER_HOUR=0 is not a number of at least 1"),
    ],
)
def test_settings_that_cannot_be(environment, words, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        ServerSettings.from_environment()


def test_settings_from_the_environment(monkeypatch):
    assert ServerSettings.from_environment().cascade is None
    for name, value in {"RUN": "kd", "BELOW": "0.8", "PER_HOUR": "50", "TIMEOUT": "3", "KEEP": "1"}.items():
        monkeypatch.setenv(f"CASCADE_{name}", value)
    assert ServerSettings.from_environment().cascade == CascadeSettings(RunTeacher("kd"), 0.8, 50, 3.0, True)
