"""Documents as text: .txt as it stands, .pdf by its text layer."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from common.cli import UserError
from common.data import splits
from common.files import read_text

SUFFIXES = (".pdf", ".txt")


def read_document(path: str | Path) -> str:
    """The text of a .pdf or of a UTF-8 text file, cleaned (see `clean`).

    Raises:
        UserError: unreadable, encrypted, broken, or without any text, as a scanned PDF is.
    """
    text = clean(_pdf_text(path) if Path(path).suffix.lower() == ".pdf" else read_text(path))
    if not text:
        raise UserError(f"{path} is empty; give a document with text")
    return text


def clean(text: str) -> str:
    """Text without control characters and half characters, with plain line ends and no blank space at line ends."""
    text = re.sub(r"\r\n?|[\f\v\x85\u2028\u2029]", "\n", text)
    text = re.sub(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufeff]", "", text)
    return re.sub(r"[^\S\n]+$", "", text, flags=re.MULTILINE).strip("\n")


def group_of(text: str) -> str:
    """The group hash of a document: the same for texts that differ in case, punctuation and white space alone."""
    return splits.group_hash(" ".join(re.findall(r"\w+", text.casefold())))


def _pdf_text(path: str | Path) -> str:
    from pypdf import PdfReader
    from pypdf.errors import FileNotDecryptedError, PyPdfError

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of every oddity that it has mended
    try:
        pages = [page.extract_text() for page in PdfReader(path).pages]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error
    except FileNotDecryptedError as error:
        raise UserError(f"{path} is encrypted; decrypt it first, e.g. qpdf --decrypt in.pdf out.pdf") from error
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is a broken PDF ({error}); repair it, e.g. qpdf in.pdf out.pdf") from error
    text = "\n".join(pages)
    if not text.strip():
        raise UserError(
            f"{path} has {len(pages)} pages and no text, as a scan has; run text recognition (OCR) first, "
            "e.g. ocrmypdf in.pdf out.pdf, or tesseract page.png page"
        )
    return text
