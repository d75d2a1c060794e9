"""Files as documents: .txt as it stands, .pdf by its text layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from common.cli import UserError
from common.files import read_text
from common.tasks.idp import layout, pdf
from common.tasks.idp.documents import Document, clean, to_row

SUFFIXES = (".pdf", ".txt")


def folder_rows(folder: str | Path) -> Iterator[tuple[str, dict | ValueError]]:
    """(file name, {"id": that name, "document"[, "lines"]} or what is wrong) of each document in a folder, by name."""
    for path in document_files(folder):
        try:
            yield path.name, {"id": path.name} | to_row(read_document(path))
        except UserError as error:
            yield path.name, ValueError(str(error))


def document_files(folder: str | Path) -> list[Path]:
    """The files of a folder that `read_document` reads, by name."""
    return sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES)


def read_document(path: str | Path) -> Document:
    """A .pdf or a UTF-8 text file.

    Raises:
        UserError: unreadable, encrypted, broken, or without any text, as a scanned PDF is.
    """
    if Path(path).suffix.lower() != ".pdf":
        document = Document(clean(read_text(path)))
        if not document.text:
            raise UserError(f"{path} is empty; give a document with text")
        return document
    pages = pdf.read_pages(path)
    document = layout.compose(pages)
    if not document.text:
        raise UserError(
            f"{path} has {len(pages)} pages and no text, as a scan has; run text recognition (OCR) first, "
            "e.g. ocrmypdf in.pdf out.pdf, or tesseract page.png page"
        )
    return document
