"""`json_schema.preflight` in a process of its own, which can be ended where a schema takes it too long.

    python -m common.generation.schema_worker PARENT

Reads requests from standard input, one a line: {"schema": ..., "best_effort": false}. Answers each with a line on
standard output: {"error": a sentence or null}. Ends with its input, or with the process PARENT.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence

from common import processes
from common.cli import UserError
from common.generation import json_schema

MEMORY = 8 << 30  # bytes of address space, of which libraries and their threads take some hundred MiB


def main(argv: Sequence[str]) -> None:
    processes.die_with_parent(int(argv[0]))
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limits here
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        print(json.dumps({"error": check(line)}), flush=True)


def check(line: bytes) -> str | None:
    """Why a schema is refused, in one sentence; None where it can be followed."""
    try:
        request = json.loads(line)
        json_schema.preflight(request["schema"], request.get("best_effort", False))
    except UserError as error:
        return str(error)
    except RecursionError:
        return "the schema is nested too deeply; make it simpler"
    except MemoryError:
        return "the schema takes too much memory to check; make it smaller or simpler"
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
