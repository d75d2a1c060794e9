"""The worker of a job, as a process: what it is asked twice, and what is there already."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.inputs import ROOT
from support.processes import LONGEST, wait_for

from common.jobs.folder import PLAN, RESULT, JobFolder
from common.jobs.worker import BUSY, STOPPED

pytestmark = pytest.mark.processes

COMMAND = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: open("asked", "a").write("x"))
pathlib.Path("ready").touch()
while not pathlib.Path("enough").exists():
    time.sleep(0.01)
"""


def prepared(path: Path, code: str) -> JobFolder:
    folder = JobFolder(path)
    folder.prepare(1, [{"argv": ["-c", code], "output": None}])
    return folder


def start(folder: JobFolder) -> subprocess.Popen:
    words = [sys.executable, "-m", "common.jobs.worker", str(folder.path), "--attempt", "1"]
    return subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)


def test_a_command_is_asked_once_to_stop(tmp_path):
    """A server that is started again asks again; the second signal would end a training without its checkpoint."""
    folder = prepared(tmp_path, COMMAND)
    worker = start(folder)
    wait_for((tmp_path / "ready").exists)
    worker.send_signal(signal.SIGTERM)
    wait_for((tmp_path / "asked").exists)
    worker.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(0.3)
    (tmp_path / "enough").touch()
    assert worker.wait(LONGEST) == STOPPED
    assert (tmp_path / "asked").read_text() == "x"


def test_an_attempt_that_has_ended_ends_again_as_it_did(tmp_path):
    """A pod that is replaced after the result was written would else be replaced for ever."""
    folder = prepared(tmp_path, "open('again', 'w')")
    for state, code in (("succeeded", 0), ("failed", 1)):
        folder.write(RESULT, {"attempt": 1, "state": state, "error": None, "artifacts": []})
        assert start(folder).wait(LONGEST) == code
    folder.write(PLAN, {"attempt": 2, "commands": []})
    assert start(folder).wait(LONGEST) == BUSY
    assert not (tmp_path / "again").exists()
