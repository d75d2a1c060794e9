"""Documents as text, and labelled ones from folders."""

from __future__ import annotations

import pypdfium2
import pytest
from PIL import Image
from support.documents import pdf as pdf_of
from support.documents import scan
from support.inputs import SHARED

from common.cli import UserError
from common.tasks.idp import documents, ocr, pdf, reading
from common.tasks.idp import rows as idp_rows
from common.tasks.idp.layout import Word, compose, lines_of


def test_the_text_of_a_pdf(tmp_path):
    (tmp_path / "a.PDF").write_bytes(pdf_of("Invoice 7", "Total 12.50"))
    assert reading.read_document(tmp_path / "a.PDF").text == "Invoice 7\nTotal 12.50"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "scan.pdf",
            pdf_of(),
            "scan.pdf: reading scans needs text recognition: pip install -r requirements/ocr.txt",
        ),
        ("broken.pdf", b"%PDF-1.4 and then nothing", "is a broken PDF"),
        ("not.pdf", b"hello", "is a broken PDF"),
        ("empty.txt", b"\x00 \n", "is empty"),
        ("latin.txt", b"caf\xe9", "is not UTF-8"),
        ("gone.pdf", None, "cannot be read"),
        ("gone.png", None, "cannot be read as an image"),
        ("broken.jpg", b"no image", "cannot be read as an image"),
    ],
)
def test_documents_that_cannot_be_read(tmp_path, monkeypatch, name, content, sentence):
    ocr.engine.cache_clear()
    monkeypatch.setattr(ocr, "installed", lambda: False)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        reading.read_document(tmp_path / name)


def test_clean():
    assert documents.clean("\ufeffa\x00b\r\nc \t\r\x0cd\ud800\n\n") == "ab\nc\n\nd"
    assert documents.clean("a \u3000b\u00a0\n \n c\u2003") == "a \u3000b\n\n c"


def test_white_space_is_cleaned_in_one_pass():
    """Not once more from each of its characters, which would take hours."""
    gap = " " * 1_000_000
    assert documents.clean(f"a{gap}b{gap}\n") == f"a{gap}b"


@pytest.mark.skipif(not (SHARED / "data" / "invoices").is_dir(), reason="no invoices here")
def test_real_invoices_are_read():
    rows = idp_rows.read(SHARED / "data" / "invoices", {"type": "object"})
    assert len(rows) == 9
    assert all(len(row["document"]) > 500 for row in rows)
    saeco = next(row for row in rows if row["id"] == "saeco")
    assert "E103184 Onderhoudsset CA6707/10 49,99 21 % 1 PCS 49,99" in " ".join(saeco["document"].split())
    invoice = next(row for row in rows if row["id"] == "coolblue1")
    assert "Factuurnummer: 993548900   " in invoice["document"]
    document = documents.of_row(invoice)
    segment = next(each for each in document.segments if document.text[each.start : each.end] == "993548900")
    assert segment.box == pytest.approx((111.7, 155.5, 152.7, 166.4), abs=1)


def test_lines_and_columns():
    words = [
        Word("Total", (10, 100, 60, 112)),
        Word("9.00", (210, 101, 250, 111)),
        Word("Item", (10, 60, 50, 72)),
        Word("Price", (210, 58, 260, 70)),
        Word("of", (260, 60, 280, 72)),
        Word("\x00", (0, 0, 300, 300)),
        Word("1", (210, 74, 220, 86)),
    ]
    document = compose([words, [Word("Page", (30, 0, 70, 10))]])
    assert document.text == ("Item                Price of\n                    1\n\nTotal               9.00\n\nPage")
    assert [document.text[each.start : each.end] for each in document.segments] == [
        "Item", "Price", "of", "1", "Total", "9.00", "Page"
    ]  # fmt: skip
    assert [each.page for each in document.segments] == [1] * 6 + [2]
    assert documents.of_row(documents.to_row(document)) == document
    title = [Word("BIG", (0, 0, 90, 30)), Word("a", (100, 0, 110, 10)), Word("b", (100, 20, 110, 30))]
    assert [[word.text for word in line] for line in lines_of(title)] == [["a"], ["BIG"], ["b"]]
    assert compose([[], []]).text == ""


def test_words_of_a_pdf_and_where_they_are_shown(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf_of("Invoice 7", "Total 12.50"))
    (page,) = pdf.read_pages(tmp_path / "a.pdf")
    assert [word.text for word in page] == ["Invoice", "7", "Total", "12.50"]
    x0, y0, x1, y1 = page[0].box
    assert 49 < x0 < 51 and 85 < x1 < 95
    assert 78 < y0 < 792 - 700 < y1 < 98  # the base line is at 700 points from the page's lower edge
    upright = pdf_of("Invoice 7").replace(b"50 700 Td", b"0 1 -1 0 50 70 Tm")
    (tmp_path / "b.pdf").write_bytes(upright.replace(b"[0 0 612 792]", b"[0 0 612 792] /Rotate 90"))
    (page,) = pdf.read_pages(tmp_path / "b.pdf")
    assert [word.text for word in page] == ["Invoice", "7"]
    x0, y0, x1, y1 = page[0].box
    assert 69 < x0 < 71 and 105 < x1 < 115
    assert 36 < y0 < 50 < y1 < 56
    (tmp_path / "c.pdf").write_bytes(pdf_of("Invoice 7").replace(b"[0 0 612 792]", b"[0 0 612 792] /Rotate 90"))
    assert [word.text for word in pdf.read_pages(tmp_path / "c.pdf")[0]] == ["Invoice", "7"]  # from top to bottom


def test_pages_without_text_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pdf, "read_pages", lambda path: [[Word("Total", (0, 0, 9, 9))], [], []])
    monkeypatch.setattr(ocr, "installed", lambda: False)
    for recognise, remedy in (("auto", "pip install -r requirements/ocr.txt"), ("off", "pass --ocr auto")):
        assert reading.read_document("mixed.pdf", recognise).text == "Total"
        assert f"mixed.pdf: 2 of 3 pages have no text; {remedy} to read them" in capsys.readouterr().err


def test_a_page_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise pypdfium2.PdfiumError("Failed to load page.")

    monkeypatch.setattr(ocr, "installed", lambda: True)
    for name, content, broken in (
        ("text.pdf", pdf_of("Total 12.50"), (pypdfium2.PdfDocument, "get_page")),
        ("layer.pdf", pdf_of("Total 12.50"), (pypdfium2.PdfPage, "get_textpage")),
        ("scan.pdf", pdf_of(), (pypdfium2.PdfPage, "render")),
    ):
        (tmp_path / name).write_bytes(content)
        with monkeypatch.context() as patch:
            patch.setattr(*broken, fail)
            with pytest.raises(UserError, match=rf"{name}: page 1 cannot be read \(Failed to load page\.\)"):
                reading.read_document(tmp_path / name)


def test_an_image_beyond_all_bounds_is_named(tmp_path, monkeypatch):
    scan("Total 12.50").save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"a\.png cannot be read as an image \(Image size .* exceeds limit"):
        reading.read_document(tmp_path / "a.png")
    ((path, fault),) = reading.file_rows(reading.document_files(tmp_path))
    assert path.name == "a.png" and "cannot be read as an image" in str(fault)


def test_a_file_of_a_folder_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "a.pdf").mkdir()
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "c.txt").write_text("Total 12.50")
    folder, link, text = [row for _, row in reading.file_rows(reading.document_files(tmp_path))]
    remedy = "check the path and its permissions"
    assert str(folder) == f"{tmp_path}/a.pdf cannot be read: Is a directory; {remedy}"
    assert str(link) == f"{tmp_path}/b.txt cannot be read: No such file or directory; {remedy}"
    assert text == {"id": "c.txt", "document": "Total 12.50"}


def test_an_encrypted_pdf_is_named(tmp_path):
    lock = f"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{'00' * 32}> /U <{'11' * 32}> >> /ID [<00> <00>]"
    encrypted = pdf_of("x").replace(b"/Root 1 0 R", f"/Root 1 0 R {lock}".encode())
    (tmp_path / "locked.pdf").write_bytes(encrypted)
    with pytest.raises(UserError, match=r"locked.pdf is encrypted; decrypt it first"):
        reading.read_document(tmp_path / "locked.pdf")
