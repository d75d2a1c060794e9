"""Draw docs/*.mmd as the SVG files that the pages show: python -m docs.pictures

Needs mermaid-cli (`npm install @mermaid-js/mermaid-cli`) and a Chromium: `mmdc` on PATH, or MMDC=path/to/mmdc, with
MMDC_OPTIONS for its own flags. Each SVG holds the SHA-256 of the text that it was drawn from, which
`tests/test_docs.py` compares: a picture cannot fall behind its text.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def mark(source: Path) -> str:
    """The comment in an SVG that says which text it shows."""
    return f"<!-- {source.name} {hashlib.sha256(source.read_bytes()).hexdigest()} -->"


def draw(source: Path) -> None:
    """Write the SVG beside `source`. Raises CalledProcessError where mermaid-cli fails."""
    target = source.with_suffix(".svg")
    mmdc = [os.environ.get("MMDC", "mmdc"), *shlex.split(os.environ.get("MMDC_OPTIONS", ""))]
    subprocess.run([*mmdc, "--quiet", "--input", source, "--output", target, "--svgId", source.stem], check=True)
    target.write_text(f"{target.read_text(encoding='utf-8').rstrip()}\n{mark(source)}\n", encoding="utf-8")


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.mmd")):
        draw(path)
