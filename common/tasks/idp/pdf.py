"""The words of a PDF's text layer, with their boxes, by PDFium."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import UserError
from common.tasks.idp.documents import Box
from common.tasks.idp.layout import Word

if TYPE_CHECKING:
    from PIL.Image import Image

POINTS = 72  # an inch
FINE = 100  # PDFium gives whole pixels of a page; so many a point
APART = 0.25  # of a character's size, the white space that ends a word
SOFT_HYPHEN = "\x02"  # what PDFium gives for a hyphen at a line's end


def read_pages(source: str | Path | bytes, name: str | None = None) -> list[list[Word]]:
    """The words of each page, with boxes in points from the upper left corner of the page as it is shown.

    Args:
        source: a file, or what is in it.
        name: what errors call it; default: the file's path.

    Raises:
        UserError: a file that cannot be read, is encrypted or broken.
    """
    name = name or str(source)
    pages = []
    with closing(open_pdf(source, name)) as document:
        for number in range(len(document)):
            with _named(name, number):
                pages.append(_words(document[number]))
    return pages


@contextmanager
def _named(name: str, number: int) -> Iterator[None]:
    """What PDFium cannot do with a page is an error that names it."""
    from pypdfium2 import PdfiumError

    try:
        yield
    except PdfiumError as error:
        raise UserError(
            f"{name}: page {number + 1} cannot be read ({error}); repair it, e.g. qpdf in.pdf out.pdf"
        ) from error


def open_pdf(source: str | Path | bytes, name: str) -> Any:
    """The `pypdfium2.PdfDocument` of a file. Raises what `read_pages` raises."""
    import pypdfium2
    from pypdfium2 import raw

    try:
        return pypdfium2.PdfDocument(source if isinstance(source, bytes) else Path(source).read_bytes())
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}; check the path and its permissions") from error
    except pypdfium2.PdfiumError as error:
        if error.err_code in (raw.FPDF_ERR_PASSWORD, raw.FPDF_ERR_SECURITY):
            raise UserError(f"{name} is encrypted; decrypt it first, e.g. qpdf --decrypt in.pdf out.pdf") from error
        raise UserError(f"{name} is a broken PDF ({error}); repair it, e.g. qpdf in.pdf out.pdf") from error


def draw_pages(path: str | Path, numbers: Sequence[int], dpi: int) -> Iterator[Image]:
    """The pages with these numbers, from 0, as images. Raises what `read_pages` raises."""
    with closing(open_pdf(path, str(path))) as document:
        for number in numbers:
            with _named(str(path), number):
                image = document[number].render(scale=dpi / POINTS).to_pil()
            yield image


def _words(page: Any) -> list[Word]:
    """Runs of characters without white space, in the order in which the page writes them."""
    words: list[Word] = []
    run: list[tuple[str, Box]] = []
    for character, box in _characters(page):
        if run and (character.isspace() or _apart(run[-1][1], box)):
            words.append(_word(run))
            run = []
        if not character.isspace():
            run.append((character, box))
    return [*words, _word(run)] if run else words


def _word(run: list[tuple[str, Box]]) -> Word:
    lefts, tops, rights, bottoms = zip(*(box for _, box in run), strict=True)
    return Word("".join(character for character, _ in run), (min(lefts), min(tops), max(rights), max(bottoms)))


def _apart(box: Box, following: Box) -> bool:
    """Does a character not follow another one in a word?"""
    size = max(box[2] - box[0], box[3] - box[1])
    gap = max(following[0] - box[2], box[0] - following[2], following[1] - box[3], box[1] - following[3])
    return gap > APART * size


def _characters(page: Any) -> Iterator[tuple[str, Box]]:
    """(character, box) in the page's order; white space has some box."""
    from pypdfium2 import raw

    width, height = (round(FINE * side) for side in page.get_size())
    x, y = ctypes.c_int(), ctypes.c_int()

    def shown(left: float, top: float) -> tuple[float, float]:
        raw.FPDF_PageToDevice(page, 0, 0, width, height, 0, left, top, x, y)
        return x.value / FINE, y.value / FINE

    text = page.get_textpage()
    for index in range(text.count_chars()):
        character = chr(raw.FPDFText_GetUnicode(text, index)).replace(SOFT_HYPHEN, "-")
        left, bottom, right, top = text.get_charbox(index, loose=True)
        corners = shown(left, top), shown(right, bottom)
        (x0, x1), (y0, y1) = (sorted(pair) for pair in zip(*corners, strict=True))
        yield character, (x0, y0, x1, y1)
