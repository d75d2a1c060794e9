"""Documents for tests: a schema, a row of its fields, PDFs and scans."""

from __future__ import annotations

import io

from PIL import Image, ImageDraw, ImageFont

SCHEMA = {
    "type": "object",
    "properties": {"company": {"type": "string"}, "date": {"type": "string", "format": "date"},
                   "total": {"type": "number"}, "paid": {"type": "boolean"}},
    "required": ["company", "total"],
    "additionalProperties": False,
}  # fmt: skip
ROW = {"document": "ACME\nTotal 12.50", "fields": {"company": "ACME", "total": 12.5}}


def pdf(*lines: str) -> bytes:
    """A PDF of one page with these lines of text, or none, as a scan has."""
    text = "BT /F1 12 Tf 50 700 Td 14 TL " + " ".join(f"({line}) Tj T*" for line in lines) + " ET" if lines else ""
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        "/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        f"<< /Length {len(text)} >>\nstream\n{text}\nendstream",
    ]
    out, offsets = io.BytesIO(b"%PDF-1.4\n"), []
    out.seek(0, io.SEEK_END)
    for number, body in enumerate(objects, start=1):
        offsets.append(out.tell())
        out.write(f"{number} 0 obj\n{body}\nendobj\n".encode())
    start = out.tell()
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    out.write(f"xref\n0 5\n0000000000 65535 f \n{table}trailer\n<< /Size 5 /Root 1 0 R >>\n".encode())
    out.write(f"startxref\n{start}\n%%EOF\n".encode())
    return out.getvalue()


def scan(*lines: str) -> Image.Image:
    """An image of text."""
    image = Image.new("RGB", (900, 100 + 80 * len(lines)), "white")
    font = ImageFont.load_default(size=48)
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((60, 50 + 80 * number), line, "black", font)
    return image
