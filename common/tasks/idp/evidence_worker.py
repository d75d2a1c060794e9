"""`evidence.shown` in a process of its own, which can be ended where a document takes it too long.

    python -m common.tasks.idp.evidence_worker PARENT

Reads requests from standard input, one a line: {"document", "lines", "value"}. Answers each with a line on standard
output: {"evidence": where the leaves of the value stand}. Ends with its input, or with the process PARENT.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from common import processes
from common.tasks.idp import documents, evidence


def find(line: bytes) -> dict[str, Any]:
    """The evidence of a request."""
    request = json.loads(line)
    return {"evidence": evidence.shown(documents.of_row(request), request["value"])}


if __name__ == "__main__":
    processes.answer_lines(int(sys.argv[1]), find)
