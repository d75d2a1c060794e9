"""Files as documents: text as it stands, PDFs by their text layer, scans by text recognition where it is installed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import UserError, log
from common.data.resumable import AnswerStore, content_key
from common.files import read_text, sha256_file
from common.tasks.idp import layout, ocr, pdf
from common.tasks.idp.documents import Document, clean, to_row

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
SUFFIXES = (".pdf", ".txt", *IMAGES)
OCR = ("auto", "on", "off")


def file_rows(
    paths: Sequence[Path], recognise: str = "auto", kept: str | Path | None = None
) -> Iterator[tuple[Path, dict | ValueError]]:
    """(file, {"id": its name, "document"[, "lines"]} or what is wrong) of each of some files, in their order.

    With a progress bar, as text recognition takes seconds a page.

    Args:
        recognise: as in `read_document`.
        kept: a file that keeps what was read as it comes, so that an interruption loses one document; None: none does.
    """
    from tqdm import tqdm

    store = AnswerStore(kept)
    for path in tqdm(paths, unit=" files"):
        try:
            key = content_key(_content(path), recognise, ocr.installed())
            if key not in store:
                store.add([(key, to_row(read_document(path, recognise)))])
            yield path, {"id": path.name} | store[key]
        except UserError as error:
            yield path, ValueError(str(error))


def _content(path: Path) -> str:
    """The SHA-256 of a file. Raises UserError where it cannot be read."""
    try:
        return sha256_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error


def kept_beside(output: str | Path) -> Path:
    """Where the texts of a folder's documents are kept until `output` is there: recognising them takes long."""
    return Path(f"{output}.documents")


def document_files(folder: str | Path) -> list[Path]:
    """The files of a folder that `read_document` reads, by name."""
    return sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES)


def read_document(path: str | Path, recognise: str = "auto") -> Document:
    """A .pdf, an image or a UTF-8 text file.

    Args:
        recognise: text recognition "auto": of images and of a PDF's pages without text; "on": of all its pages; "off":
            of nothing.

    Raises:
        UserError: unreadable, encrypted, broken, without any text, or a scan that nothing here may read.
    """
    suffix = Path(path).suffix.lower()
    if suffix in IMAGES:
        if recognise == "off":
            raise UserError(f"{path} is an image, which takes text recognition; pass --ocr auto")
        document = layout.compose([_recognised(path, frame) for frame in ocr.open_image(path)])
    elif suffix == ".pdf":
        document = layout.compose(_pages(path, recognise))
    else:
        document = Document(clean(read_text(path)))
    if not document.text:
        raise UserError(f"{path} is empty; give a document with text")
    return document


def _pages(path: str | Path, recognise: str) -> list[list[layout.Word]]:
    """The words of a PDF's pages; those without any by text recognition, where it is wanted and there."""
    pages = pdf.read_pages(path)
    scan = not any(pages)
    if scan and recognise == "off":
        raise UserError(f"{path} has {len(pages)} pages and no text, as a scan has; pass --ocr auto")
    wanted = [number for number, words in enumerate(pages) if recognise == "on" or not words]
    if recognise == "off" or not (scan or recognise == "on" or ocr.installed()):
        if wanted:
            remedy = "pass --ocr auto" if recognise == "off" else "pip install -r requirements/ocr.txt"
            log(f"{path}: {len(wanted)} of {len(pages)} pages have no text; {remedy} to read them")
        return pages
    for number, image in zip(wanted, pdf.draw_pages(path, wanted, ocr.DPI), strict=True):
        pages[number] = _recognised(path, image, ocr.DPI / pdf.POINTS)
    return pages


def _recognised(path: str | Path, image: Image, scale: float = 1.0) -> list[layout.Word]:
    try:
        return ocr.recognise(image, scale)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
