"""Documents as text, and labelled ones from folders."""

from __future__ import annotations

import pytest
from support.documents import pdf
from support.inputs import SHARED

from common.cli import UserError
from common.tasks.idp import documents
from common.tasks.idp import rows as idp_rows


def test_the_text_of_a_pdf(tmp_path):
    (tmp_path / "a.PDF").write_bytes(pdf("Invoice 7", "Total 12.50"))
    assert documents.read_document(tmp_path / "a.PDF").text == "Invoice 7\nTotal 12.50"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("scan.pdf", pdf(), "has 1 pages and no text, as a scan has; run text recognition .* ocrmypdf .* tesseract"),
        ("broken.pdf", b"%PDF-1.4 and then nothing", "is a broken PDF"),
        ("not.pdf", b"hello", "is a broken PDF"),
        ("empty.txt", b"\x00 \n", "is empty"),
        ("latin.txt", b"caf\xe9", "is not UTF-8"),
        ("gone.pdf", None, "cannot be read"),
    ],
)
def test_documents_that_cannot_be_read(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        documents.read_document(tmp_path / name)


def test_clean():
    assert documents.clean("\ufeffa\x00b\r\nc \t\r\x0cd\ud800\n\n") == "ab\nc\n\nd"


@pytest.mark.skipif(not (SHARED / "data" / "invoices").is_dir(), reason="no invoices here")
def test_real_invoices_are_read():
    rows = idp_rows.read(SHARED / "data" / "invoices", {"type": "object"})
    assert len(rows) == 9
    assert all(len(row["document"]) > 500 for row in rows)
    saeco = next(row for row in rows if row["id"] == "saeco")
    assert "E103184 Onderhoudsset CA6707/10 49,99 21 % 1 PCS 49,99" in saeco["document"]
