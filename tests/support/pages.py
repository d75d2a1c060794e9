"""Pages in a real browser: how to start it, and what is asked of colours and of everything else that axe-core knows."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from support.inputs import ROOT
from support.processes import LONGEST, wait_for

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]

COLOURS = """element => {
  let ground = element;
  while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
  return [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor];
}"""


def new_page(browser, **options):
    """A page of the browser, with a context of its own; it waits as long as a first request may take."""
    page = browser.new_page(**options)
    page.set_default_timeout(1000 * LONGEST)
    return page


def colours_of(page, kind: str) -> list[list[float]]:
    """The colours of the first element of a kind and of its ground; one that is being drawn anew has none as yet."""
    found: list[str] = []

    def has_them() -> bool:
        found[:] = page.locator(f"main {kind}").first.evaluate(COLOURS)
        return all(found)

    wait_for(has_them)
    return list(map(rgb, found))


def rgb(colour: str) -> list[float]:
    return [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]


def contrast(one: list[float], other: list[float]) -> float:
    """The contrast ratio of WCAG 2.2."""

    def luminance(colour: list[float]) -> float:
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def violations(page) -> list[str]:
    """What axe-core finds wrong with a page; skips where it is not there (`npm install --no-save axe-core@4.14.1`)."""
    script = Path(os.environ.get("AXE") or ROOT / "node_modules" / "axe-core" / "axe.min.js")
    if not script.is_file():
        pytest.skip("needs axe-core: npm install --no-save axe-core@4.14.1, or AXE with the path of its axe.min.js")
    page.evaluate(script.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run().then(result => result.violations)")
    return [
        f"{fault['id']}: {node['target']} {node['failureSummary']}" for fault in found for node in fault["nodes"][:5]
    ]


SIZES = {"phone": {"width": 390, "height": 844}, "desktop": {"width": 1280, "height": 900}}
