"""Processes that are forked from one with the heavy imports, and waiting for them."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path

import pytest

LONGEST = 300  # seconds; a first request waits for a process that imports torch, on a busy machine beside others


def join(children: Sequence, folder: Path) -> None:
    """Wait for the two of `spawn.ranks`, which must have done their work."""
    for rank, child in enumerate(children):
        child.join(LONGEST)
        assert child.exitcode == 0, (folder / f"rank{rank}.log").read_text()[-3000:]


def wait_for(condition: Callable[[], bool], seconds: float = LONGEST) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def run_child(
    main: Callable, argv: Sequence[str], log: str, file_size: int | None, environment: dict[str, str]
) -> None:
    import resource

    from common import cli

    gc.freeze()  # what was imported before the fork stays, and its pages stay shared

    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.exit(cli.run(main, argv))


@functools.cache
def fork_server():
    """Where processes are forked from a fork of this one, with all that it has imported: a start in some milliseconds.

    It is to be forked before the first test: what this process does in a test, no other inherits.
    """
    import_module("support.preloaded")
    resource_tracker.ensure_running()  # not by a fork
    with pytest.MonkeyPatch.context() as patch:

        def fork(_, words: Sequence[str], kept: Sequence[int]) -> int:
            sys.stdout.flush()
            if pid := os.fork():
                return pid
            try:
                patch.undo()
                leave_pytest(kept)
                exec(words[-1], {})  # python -c
            finally:
                os._exit(0)

        patch.setattr(util, "spawnv_passfds", fork)
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def leave_pytest(kept: Sequence[int]) -> None:
    """In a fork: hold none of the files that are open, whose other ends wait for their last holder, and report to none
    of pytest's hooks."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > sys.__stderr__.fileno() and number not in kept:
            os.dup2(null, number)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__


@functools.cache
def import_for_forks() -> None:
    """Wait until that one can be forked."""
    child = fork_server().Process(target=int)
    child.start()
    child.join()
