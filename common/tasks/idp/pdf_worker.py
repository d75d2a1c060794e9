"""The text layer of PDFs in a process of its own, which can be ended where one takes it too long.

    python -m common.tasks.idp.pdf_worker PARENT

Reads requests from standard input, one a line: {"pdf": base64}. Answers each with a line on standard output:
{"document", "lines", "pages", "empty" (how many pages have no text)}, or {"error": why it cannot be read}. Ends with
its input, or with the process PARENT.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any

from common import processes
from common.cli import UserError
from common.tasks.idp import documents, layout, pdf


def read(line: bytes) -> dict[str, Any]:
    """The document of a request."""
    try:
        pages = pdf.read_pages(base64.b64decode(json.loads(line)["pdf"]), "the document")
    except UserError as error:
        return {"error": str(error)}
    document = layout.compose(pages)
    if not document.text.strip():
        recognise = "recognise its text first, e.g. ocrmypdf in.pdf out.pdf"
        return {"error": f"the document has {len(pages)} pages and no text, as a scan has; {recognise}"}
    empty = sum(not words for words in pages)
    return documents.to_row(document) | {"pages": len(pages), "empty": empty}


if __name__ == "__main__":
    processes.answer_lines(int(sys.argv[1]), read)
