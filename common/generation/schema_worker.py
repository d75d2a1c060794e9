"""`json_schema.preflight` in a process of its own, which can be ended where a schema takes it too long.

    python -m common.generation.schema_worker PARENT

Reads requests from standard input, one a line: {"schema": ..., "best_effort": false}. Answers each with a line on
standard output: {"error": a sentence or null}. Ends with its input, or with the process PARENT.
"""

from __future__ import annotations

import json
import sys

from common import processes
from common.cli import UserError
from common.generation import json_schema


def check(line: bytes) -> dict[str, str | None]:
    """Why a schema is refused, in one sentence; None where it can be followed."""
    try:
        request = json.loads(line)
        json_schema.preflight(request["schema"], request.get("best_effort", False))
    except UserError as error:
        return {"error": str(error)}
    except RecursionError:
        return {"error": "the schema is nested too deeply; make it simpler"}
    except MemoryError:
        return {"error": "the schema takes too much memory to check; make it smaller or simpler"}
    return {"error": None}


if __name__ == "__main__":
    processes.answer_lines(int(sys.argv[1]), check)
