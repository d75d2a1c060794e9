"""Text recognition of scans, by a library that is installed on request (requirements/ocr.txt)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import UserError
from common.tasks.idp.layout import Word

if TYPE_CHECKING:
    from PIL.Image import Image

DPI = 200  # in which a PDF's pages are drawn


def installed() -> bool:
    """Whether there is a library for it."""
    return find_spec("rapidocr") is not None


def open_image(path: str | Path) -> Iterator[Image]:
    """The frames of an image file, upright. Raises UserError where it is none, or one beyond all bounds."""
    from PIL import Image, ImageOps, ImageSequence

    page = 1
    try:
        with Image.open(path) as image:
            for page, frame in enumerate(ImageSequence.Iterator(image), start=1):  # noqa: B007 (for the message)
                yield ImageOps.exif_transpose(frame)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # of Pillow
        which = f"page {page} of {path}" if page > 1 else str(path)
        raise UserError(f"{which} cannot be read as an image ({error}); check the file") from error


def recognise(image: Image, scale: float = 1.0) -> list[Word]:
    """The lines of text in an image, with their boxes.

    Args:
        scale: pixels to a unit of the boxes.

    Raises:
        UserError: nothing is installed that can.
    """
    import numpy as np

    result = engine()(np.asarray(image.convert("RGB"))[:, :, ::-1])  # it takes blue, green, red
    if result.boxes is None:
        return []
    edges = ((*corners.min(0), *corners.max(0)) for corners in result.boxes)
    boxes = (tuple(float(edge) / scale for edge in sides) for sides in edges)
    return [Word(text, box) for text, box in zip(result.txts, boxes, strict=True)]


@cache
def engine() -> Any:
    """The library's recogniser; `OMP_NUM_THREADS` bounds its threads as it does torch's.

    Raises:
        UserError: there is none.
    """
    if not installed():
        raise UserError(
            "reading scans needs text recognition: pip install -r requirements/ocr.txt; or run it first, "
            "e.g. ocrmypdf in.pdf out.pdf"
        )
    from rapidocr import RapidOCR

    threads = int(os.environ.get("OMP_NUM_THREADS") or -1)
    return RapidOCR(params={"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": threads})
