"""The worker of a job: runs the commands of its plan one after the other, each as a person would.

    python -m common.jobs.worker FOLDER --attempt 1

Writes result.json at its end (see `common.jobs.folder`). Exit codes: 0 succeeded, 1 failed, 75 another worker has the
job, 143 asked to stop (the training then saves a checkpoint; there is no result, and a further attempt goes on).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import cli
from common.cli import log
from common.jobs.folder import CHECKPOINTS, PLAN, RESULT, WORKER, JobFolder
from common.processes import SET_PARENT_DEATH_SIGNAL

BUSY, STOPPED = 75, 128 + signal.SIGTERM


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="common.jobs.worker")
    parser.add_argument("folder", help="the job's")
    parser.add_argument("--attempt", type=cli.positive_int, required=True, help="of the plan; another is not run")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse_args(build_parser(), argv)
    folder = JobFolder(args.folder)
    lock = folder.take_lock()
    if lock is None or folder.read(PLAN).get("attempt") != args.attempt:
        return BUSY
    if result := folder.result(args.attempt):  # of a pod that was lost after it had ended
        return exit_code(result["state"])
    log(f"{folder.path.name}: attempt {args.attempt}; the commands write to {folder.log}")
    return Worker(folder, args.attempt, lock).run()


class Worker:
    """One attempt at a job.

    Args:
        lock: file descriptor of the folder's lock, which the commands inherit.
    """

    def __init__(self, folder: JobFolder, attempt: int, lock: int) -> None:
        self.folder, self.attempt, self.lock = folder, attempt, lock
        self.child: subprocess.Popen | None = None  # the command, until it was asked to stop
        self.stopped = False
        self.prctl = ctypes.CDLL(None).prctl

    def run(self) -> int:
        """All commands that are not finished yet; the exit code."""
        signal.signal(signal.SIGTERM, self._stop)
        commands = self.folder.read(PLAN)["commands"]
        finished = self.folder.read(WORKER).get("finished", 0)
        for number in range(finished, len(commands)):
            self.folder.write(WORKER, {"pid": os.getpid(), "finished": number})
            if self.stopped:
                return STOPPED
            if self._is_done(commands[number]):
                continue
            reason, code = self._run(commands[number])
            if self.stopped:
                return STOPPED
            if reason:
                return self._end("failed", {"reason": reason, "exit_code": code, "log": self.folder.log_tail()})
        self.folder.write(WORKER, {"pid": os.getpid(), "finished": len(commands)})
        shutil.rmtree(self.folder.artifacts / CHECKPOINTS, ignore_errors=True)
        return self._end("succeeded", None)

    def _is_done(self, command: dict[str, Any]) -> bool:
        """Whether a training had ended when its worker was killed."""
        return command["output"] == "" and self.folder.is_trained

    def _stop(self, *_) -> None:
        """Ask the command to stop, once: a server that was started again asks again, and a training that is asked
        twice ends without its checkpoint."""
        self.stopped = True
        child, self.child = self.child, None
        if child is not None:
            child.send_signal(signal.SIGTERM)

    def _run(self, command: dict[str, Any]) -> tuple[str | None, int]:
        """(why it failed or None, exit code) of a command."""
        argv = list(command["argv"])
        if command["output"]:  # an export is made anew, a training goes on
            shutil.rmtree(self.folder.artifacts / command["output"], ignore_errors=True)
        elif command["output"] == "" and self.folder.read_record():
            argv.append("--resume")
        with self.folder.open_log() as output:
            output.write(f"$ {shlex.join(['python', Path(argv[0]).name, *argv[1:]])}\n".encode())
            start = os.fstat(output.fileno()).st_size
            child = self.child = subprocess.Popen(
                [sys.executable, *argv],
                cwd=self.folder.path,
                env=os.environ | {"TQDM_MININTERVAL": "10"},  # a log is no place for ten lines a second
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(self.lock,),
                preexec_fn=lambda: self.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0),
            )
        if self.stopped:  # asked to while the command started
            self._stop()
        code = child.wait()
        return (failure(code, self.folder.log_tail(start=start)) if code else None), code

    def _end(self, state: str, error: dict[str, Any] | None) -> int:
        artifacts = self.folder.list_artifacts()
        self.folder.write(RESULT, {"attempt": self.attempt, "state": state, "error": error, "artifacts": artifacts})
        log(f"{self.folder.path.name}: {state}")
        return exit_code(state)


def exit_code(state: str) -> int:
    return cli.DONE if state == "succeeded" else cli.FAILED


def failure(code: int, tail: Sequence[str]) -> str:
    """Why a command ended with an exit code: its own sentence where it left one."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + ("; most likely there was not enough memory" if name == "SIGKILL" else "")
    sentences = [line.removeprefix("error: ") for line in tail if line.startswith("error: ")]
    return sentences[-1] if sentences else f"exit code {code}: {tail[-1] if tail else 'it said nothing'}"


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
