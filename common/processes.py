"""Processes of this program: started from this checkout, ended with their parent, kept within a time."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SET_PARENT_DEATH_SIGNAL = 1  # of prctl
MOST_MEMORY = 8 << 30  # bytes of address space of a helper, of which libraries and their threads take some hundred MiB


class OutOfTime(Exception):
    """A `time_limit` has passed."""


def module_command(module: str, *words: str) -> list[str]:
    """The command that runs a module of this checkout, whatever lies where the user stands (-P)."""
    return [sys.executable, "-P", "-m", module, *words]


def module_environment() -> dict[str, str]:
    """This process's environment, in which `module_command` finds this checkout."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path}


def die_with_parent(parent: int) -> None:
    """End this process by SIGKILL as soon as the one that started it has ended, whatever either is doing.

    The kernel does so on Linux; elsewhere nothing happens. It takes the end of the parent's thread for that of the
    parent, so that a process has to be started from a thread that lives as long as it is wanted.

    Args:
        parent: process id; one that has ended already ends this process, too.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def answer_lines(parent: int, answer: Callable[[bytes], Any]) -> None:
    """Answer each line of standard input by one of JSON on standard output, within `MOST_MEMORY`.

    Ends with its input, or with the process `parent`; whoever asks can end it where an answer takes too long.
    """
    die_with_parent(parent)
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limits here
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    for line in sys.stdin.buffer:
        print(json.dumps(answer(line)), flush=True)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime within the block once it has taken so long.

    By an alarm signal, to which Python code and regular expressions being matched pay attention; other compiled code
    only when it returns. Outside the main thread, inside another limit, and where there are no alarms, there is no
    limit.
    """
    usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not usable or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise OutOfTime(f"{seconds:g} s have passed")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
