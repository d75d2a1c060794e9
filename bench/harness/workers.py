"""What the benches share: a worker of this folder in a process of its own, at work with some checkout."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import cli


def found_with(root: str | Path, worker: str, argv: Sequence[str] = (), given: Any = None, what: str = "") -> Any:
    """What a worker says last, as JSON.

    Args:
        root: the checkout, which is its first argument and where it runs.
        worker: a module of this folder.
        given: it reads this as JSON from its standard input.
        what: stands before the checkout in an error.

    Raises:
        UserError: its process failed.
    """
    command = [sys.executable, str(Path(__file__).with_name(f"{worker}.py")), str(root), *argv]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, cwd=root)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise cli.UserError(f"{what}{root} cannot be measured: {last[:500]}")
    return json.loads(done.stdout.splitlines()[-1])
