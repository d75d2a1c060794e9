"""The server's page in a real headless browser: clicked, read, and broken on purpose. Skips where there is none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.inputs import ROOT
from support.pages import COLOURS, contrast, rgb
from support.served import make_run, serve

from common.serving.routes import PAGE
from common.tasks.idp import evidence
from common.tasks.idp.documents import Document

pytestmark = pytest.mark.processes


@pytest.fixture
def page(browser, served):
    """The page with the models listed; at the end, nothing may have gone wrong in its script."""
    opened = browser.new_page()
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.goto(served.url)
    opened.get_by_role("checkbox", name="creditmix_sft").wait_for()
    yield opened
    opened.close()
    assert faults == []


def test_nothing_comes_from_elsewhere():
    text = PAGE.read_text()
    assert not re.search(r"https?://|src=|@import|url\(", text)
    assert "innerHTML" not in text  # what a model says is text


def test_a_row_by_every_model_side_by_side(page, served):
    page.get_by_role("button", name="Classify").click()
    page.get_by_role("article").nth(3).wait_for()
    answers = page.get_by_role("article")
    assert [answer.get_attribute("aria-label") for answer in answers.all()] == [
        "base", "creditmix_dpo", "creditmix_kd", "creditmix_sft"]  # fmt: skip
    for answer in answers.all():
        run = answer.get_attribute("aria-label")
        wanted = served.post(f"/infer/{run}", {"features": page.get_by_label("Features").input_value()})
        assert answer.locator(".prediction").inner_text() == wanted["prediction"]
        shares = [item.inner_text() for item in answer.get_by_role("listitem").all()]
        for shown, (label, share) in zip(shares, wanted["probabilities"].items(), strict=True):
            assert shown.split() == [label, f"{100 * share:.1f}", "%"]
        assert f"Margin {wanted['top2_margin']:.2f} nats" in answer.inner_text()
        assert not answer.get_by_role("table").is_visible()
        answer.get_by_text("Scores", exact=True).click()
        cells = [cell.inner_text() for cell in answer.get_by_role("cell").all()]
        figures = [wanted[key][label] for label in wanted["scores"] for key in ("raw_scores", "prior", "scores")]
        assert [float(cell) for cell in cells] == pytest.approx(figures, abs=6e-4)
    page.get_by_text(re.compile(r"4 of 4 models loaded · latency of 4 requests: median \d+ ms, p95 \d+ ms")).wait_for()
    states = page.locator("#registry tr td:nth-child(2)").all_inner_texts()
    assert states == ["loaded"] * 4


def test_with_the_keyboard_alone(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the first form"
    for box in page.locator("#compare input").all()[1:]:
        box.focus()
        page.keyboard.press("Space")
    page.get_by_label("Features").focus()
    page.keyboard.press("Control+Enter")
    page.get_by_role("article").first.wait_for()
    assert page.get_by_role("article").count() == 1


def test_errors_are_shown_nicely(page):
    page.get_by_label("Features").fill("Age: " + "7 " * 3000)
    page.get_by_role("button", name="Classify").click()
    alert = page.get_by_role("alert").first
    alert.wait_for()
    assert "does not fit the model's context" in alert.inner_text()
    assert re.search(r"\(request \S+\)$", alert.inner_text())
    for box in page.locator("#compare input").all():
        box.uncheck()
    page.get_by_role("button", name="Classify").click()
    page.get_by_text("Choose at least one model.").wait_for()
    page.get_by_text("JSON Schema").click()
    page.get_by_label("Schema", exact=True).fill("{")
    page.get_by_role("button", name="Extract").click()
    page.get_by_text("The schema is not JSON").wait_for()
    page.context.set_offline(True)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("The server cannot be reached.").first.wait_for()


def test_fields_and_code(page, served):
    page.get_by_text("JSON Schema").click()
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    page.get_by_label("Schema", exact=True).fill(json.dumps(schema))
    page.locator("#idp-run").select_option("creditmix_kd")
    page.get_by_role("button", name="Extract").click()
    fields = page.get_by_label("Fields", exact=True)
    fields.wait_for()
    assert isinstance(json.loads(fields.inner_text())["ok"], bool)
    assert re.search(r"runs/creditmix_kd, \d+ ms", page.locator("#idp-answer").inner_text())
    page.get_by_role("textbox", name="Task").fill("x")
    page.get_by_label("Write a plan first").check()
    page.get_by_role("button", name="Generate").click()
    page.get_by_label("Code", exact=True).wait_for(timeout=60_000)


def test_hovering_a_field_marks_its_text(page):
    text = "🙂 Shop\nTotal 9.00"
    found = {"shop": "Shop", "total": "9.00", "tax": "1"}
    answer = {"document": text, "written": found, "evidence": evidence.shown(Document(text), found)}
    page.evaluate("answer => $('idp-answer').replaceChildren(grounded(answer))", answer)
    assert page.get_by_label("Document", exact=True).last.inner_text() == text
    assert page.locator("mark").all_inner_texts() == ["Shop", "9.00"]
    row = page.get_by_role("row", name="total")
    row.hover()
    assert page.locator("mark.on").all_inner_texts() == ["9.00"]
    page.get_by_role("row", name="shop").focus()
    assert "Shop" in page.locator("mark.on").all_inner_texts()
    page.locator("mark").first.hover()
    assert page.locator("tr.on").all_inner_texts() == ["shop\tShop\texact"]
    assert "not found" in page.get_by_role("row", name="tax").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(browser, served, scheme):
    """No sideways scrolling, and text that stands out from its ground in both schemes."""
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    page.goto(served.url)
    page.get_by_role("button", name="Classify").click()
    page.get_by_role("article").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for kind in ("h2", ".quiet", "label", "button", "a"):
        colours = page.locator(f"main {kind}, header {kind}").first.evaluate(COLOURS)
        assert contrast(*map(rgb, colours)) >= 4.5, (scheme, kind, colours)
    assert page.get_by_role("button", name="Classify").bounding_box()["height"] >= 44  # a thumb
    context.close()


def test_every_control_has_a_name(page):
    unnamed = page.evaluate("""[...document.querySelectorAll("input, textarea, select")].filter(
        control => !control.labels.length).map(control => control.id)""")
    assert unnamed == []
    assert page.locator("html").get_attribute("lang") == "en"
    assert Path(PAGE).stat().st_size < 40_000


def test_each_label_set_has_its_models(browser, own, base):
    from common.data import task_record
    from common.tasks.ranking.loading import load_task

    tickets = load_task(str(ROOT / "recipes" / "ticket_severity.yaml"))
    task_record.write(make_run(own / "severity", base, seed=5), tickets.record())
    with serve(own) as served:
        page = browser.new_page()
        page.goto(served.url)
        page.get_by_role("checkbox", name="creditmix_sft").wait_for()
        assert page.get_by_role("checkbox", name="severity").count() == 0
        page.get_by_label("Label set").select_option("ticket_severity")
        page.get_by_role("checkbox", name="severity").wait_for()
        page.get_by_role("heading", name="ticket_severity: Low, Medium, High, Critical").wait_for()
        assert page.locator("#compare input").count() == 2  # and the base
        page.get_by_label("Features").fill("Mail. Users affected: 3")
        page.get_by_role("button", name="Classify").click()
        page.get_by_role("article").nth(1).wait_for()
        shown = [
            item.inner_text().split()[0] for item in page.get_by_role("article").nth(0).get_by_role("listitem").all()
        ]
        assert shown == list(tickets.labels)
        page.close()
