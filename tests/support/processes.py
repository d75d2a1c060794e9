"""Processes that are forked from one with the heavy imports, and waiting for them."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
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
    """Where processes are forked from one that has the heavy imports: a start in some milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where it looks for them
        forkserver.ensure_running()
    return context


@functools.cache
def import_for_forks() -> None:
    """Wait until that one has its imports."""
    child = fork_server().Process(target=int)
    child.start()
    child.join()
