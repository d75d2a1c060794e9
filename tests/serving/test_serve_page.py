"""The server's page in a real headless browser: clicked, read, and broken on purpose. Skips where there is none."""

from __future__ import annotations

import json
import re

import pytest
from support.documents import pdf
from support.inputs import ROOT
from support.pages import SIZES, colours_of, contrast, new_page, violations
from support.served import make_run, serve

from common.data.rows import numbered_rows
from common.serving.routes import PAGE
from common.tasks.idp import evidence
from common.tasks.idp.documents import Document
from common.web.app import whole_page

pytestmark = pytest.mark.processes
CHOICE = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


@pytest.fixture
def page(browser, served):
    """The page with the models listed; at the end, nothing may have gone wrong in its script."""
    opened = new_page(browser)
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.goto(served.url)
    opened.get_by_role("checkbox", name="creditmix_sft").wait_for()
    yield opened
    opened.close()
    assert faults == []


def test_nothing_comes_from_elsewhere():
    text = whole_page(PAGE)
    assert not re.search(r"https?://|src=|@import|url\(", text)
    assert "innerHTML" not in text  # what a model says is text


def test_a_row_by_every_model_side_by_side(page, served):
    page.get_by_role("button", name="Classify", exact=True).click()
    page.get_by_role("article").nth(3).wait_for()
    answers = page.get_by_role("article")
    assert [answer.get_attribute("aria-label") for answer in answers.all()] == [
        "base", "creditmix_dpo", "creditmix_kd", "creditmix_sft"]  # fmt: skip
    for answer in answers.all():
        run = answer.get_attribute("aria-label")
        wanted = served.post(f"/infer/{run}", {"features": page.get_by_label("Text", exact=True).input_value()})
        assert answer.locator(".prediction").inner_text() == wanted["prediction"]
        shares = [item.inner_text() for item in answer.get_by_role("listitem").all()]
        for shown, (label, share) in zip(shares, wanted["probabilities"].items(), strict=True):
            assert shown.split() == [label, f"{100 * share:.1f}", "%"]
        assert f"Margin {wanted['top2_margin']:.2f} nats: {said_of(wanted['probabilities'])}" in answer.inner_text()
        assert not answer.get_by_role("table").is_visible()
        answer.get_by_text("Scores", exact=True).click()
        cells = [cell.inner_text() for cell in answer.get_by_role("cell").all()]
        figures = [wanted[key][label] for label in wanted["scores"] for key in ("raw_scores", "prior", "scores")]
        assert [float(cell) for cell in cells] == pytest.approx(figures, abs=6e-4)
    page.get_by_text(re.compile(r"4 of 4 models loaded · latency of 4 requests: median \d+ ms, p95 \d+ ms")).wait_for()
    states = page.locator("#registry tr td:nth-child(2)").all_inner_texts()
    assert states == ["loaded"] * 4


def said_of(probabilities: dict[str, float]) -> str:
    (first, p), (second, q), *_ = sorted(probabilities.items(), key=lambda item: -item[1])
    times = p / q
    words = "about" if times < 1.04 else f"{times:.1f} times" if 1.06 < times < 9.9 else ""
    return f"{first} is {words}" + (f" as likely as {second}" if words else "")


def test_with_the_keyboard_alone(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the task"
    for box in page.locator("#compare input").all()[1:]:
        box.focus()
        page.keyboard.press("Space")
    page.get_by_label("Text", exact=True).focus()
    page.keyboard.press("Control+Enter")
    page.get_by_role("article").first.wait_for()
    assert page.get_by_role("article").count() == 1


def test_errors_are_shown_nicely(page):
    page.get_by_label("Text", exact=True).fill("Age: " + "7 " * 3000)
    page.get_by_role("button", name="Classify", exact=True).click()
    alert = page.get_by_role("alert").first
    alert.wait_for()
    assert "does not fit the model's context" in alert.inner_text()
    assert re.search(r"\(request \S+\)$", alert.inner_text())
    for box in page.locator("#compare input").all():
        box.uncheck()
    page.get_by_role("button", name="Classify", exact=True).click()
    page.get_by_text("Choose at least one model.").wait_for()
    page.get_by_label("Task", exact=True).select_option("documents")
    page.get_by_text("JSON Schema").click()
    page.get_by_label("Schema", exact=True).fill("{")
    page.get_by_role("button", name="Extract").click()
    page.get_by_text("The schema is not JSON").wait_for()
    page.get_by_label("Task", exact=True).select_option("code")
    page.context.set_offline(True)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("The server cannot be reached.").first.wait_for()


def test_fields_and_code(page, served):
    page.get_by_label("Task", exact=True).select_option("documents")
    page.get_by_text("JSON Schema").click()
    page.get_by_label("Schema", exact=True).fill(json.dumps(CHOICE))
    page.locator("#documents-run").select_option("creditmix_kd")
    page.get_by_role("button", name="Extract").click()
    fields = page.get_by_label("Fields", exact=True)
    fields.wait_for()
    assert isinstance(json.loads(fields.inner_text())["ok"], bool)
    assert re.search(r"runs/creditmix_kd, \d+ ms", page.locator("#documents-answer").inner_text())
    assert re.search(r"ok\t(true|false)\t\d+\.\d\s%", page.get_by_label("Where the fields stand").inner_text())
    page.get_by_label("Task", exact=True).select_option("code")
    page.get_by_label("What the code is to do").fill("x")
    page.get_by_label("Write a plan first").check()
    page.get_by_role("button", name="Generate").click()
    page.get_by_label("Code", exact=True).wait_for()


def test_hovering_a_field_marks_its_text(page):
    text = "🙂 Shop\nTotal 9.00"
    found = {"shop": "Shop", "total": "9.00", "tax": "1"}
    page.get_by_label("Task", exact=True).select_option("documents")
    answer = {"document": text, "fields": found, "written": found, "evidence": evidence.shown(Document(text), found)}
    page.evaluate("answer => $('documents-answer').replaceChildren(grounded(answer))", answer)
    assert page.get_by_label("Document", exact=True).last.inner_text() == text
    assert page.locator("mark").all_inner_texts() == ["Shop", "9.00"]
    row = page.get_by_role("row", name="total")
    row.hover()
    assert page.locator("mark.on").all_inner_texts() == ["9.00"]
    page.get_by_role("row", name="shop").focus()
    assert "Shop" in page.locator("mark.on").all_inner_texts()
    page.locator("mark").first.hover()
    assert page.locator("tr.on").all_inner_texts() == ["shop\tShop\t–\tShop\texact"]
    assert "not found" in page.get_by_role("row", name="tax").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(browser, served, scheme):
    """No sideways scrolling, and text that stands out from its ground in both schemes."""
    page = new_page(browser, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.goto(served.url)
    page.get_by_role("button", name="Classify", exact=True).click()
    page.get_by_role("article").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for kind in ("h2:visible", ".quiet:visible", "label:visible", "button:visible", "a:visible"):
        colours = colours_of(page, kind)
        assert contrast(*colours) >= 4.5, (scheme, kind, colours)
    assert page.get_by_role("button", name="Classify", exact=True).bounding_box()["height"] >= 44  # a thumb
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing(browser, served, scheme, size):
    page = new_page(browser, viewport=SIZES[size], color_scheme=scheme)
    page.goto(served.url)
    page.get_by_role("button", name="Classify", exact=True).click()
    page.get_by_role("article").first.wait_for()
    page.get_by_text("Scores", exact=True).first.click()
    assert violations(page) == []
    for task, button in (("documents", "Extract"), ("code", "Generate"), ("chat", None)):
        page.get_by_label("Task", exact=True).select_option(task)
        if button:
            page.get_by_role("button", name=button).click()
            page.locator(f"#{task}").get_by_role("button", name="Copy").first.wait_for()
        assert violations(page) == [], task
    page.close()


def test_every_control_has_a_name(page):
    unnamed = page.evaluate("""[...document.querySelectorAll("input, textarea, select")].filter(
        control => !control.labels.length).map(control => control.id)""")
    assert unnamed == []
    assert page.locator("html").get_attribute("lang") == "en"
    assert len(whole_page(PAGE)) < 80_000


def test_each_label_set_has_its_models(browser, own, base):
    from common.data import task_record
    from common.tasks.ranking.loading import load_task

    tickets = load_task(str(ROOT / "recipes" / "ticket_severity.yaml"))
    task_record.write(make_run(own / "severity", base, seed=5), tickets.record())
    with serve(own) as served:
        page = new_page(browser)
        page.goto(served.url)
        page.get_by_role("checkbox", name="creditmix_sft").wait_for()
        assert page.get_by_role("checkbox", name="severity").count() == 0
        page.get_by_label("Task", exact=True).select_option("labels:ticket_severity")
        page.get_by_role("checkbox", name="severity").wait_for()
        page.get_by_role("heading", name="ticket_severity: Low, Medium, High, Critical").wait_for()
        assert page.locator("#compare input").count() == 2  # and the base
        page.get_by_label("Text", exact=True).fill("Mail. Users affected: 3")
        page.get_by_role("button", name="Classify", exact=True).click()
        page.get_by_role("article").nth(1).wait_for()
        shown = [
            item.inner_text().split()[0] for item in page.get_by_role("article").nth(0).get_by_role("listitem").all()
        ]
        assert shown == list(tickets.labels)
        page.close()


def rows_csv(folder, count: int) -> str:
    file = folder / "rows.csv"
    lines = [f'"Age: {20 + i}, Occupation: ""Lawyer""",Good' for i in range(count)]
    file.write_text("\n".join(["features,answer", *lines]) + "\n")
    return str(file)


def test_a_csv_file_becomes_a_table_and_a_download(page, served, tmp_path):
    for name in ("base", "creditmix_dpo", "creditmix_kd"):
        page.get_by_role("checkbox", name=name).uncheck()
    page.get_by_text("Many rows: a CSV file").click()
    page.locator("#rows-file").set_input_files(rows_csv(tmp_path, 70))
    page.wait_for_function("document.querySelector('#rows-column').value === 'features'")  # once the file is read
    page.get_by_role("button", name="Classify the rows").click()
    page.get_by_text(re.compile(r"^70 rows in \d+\.\d s$")).wait_for()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download CSV").click()
    _, rows, columns = numbered_rows(saved.value.path().rename(tmp_path / "labels.csv"))
    assert columns == ["row", "text", "label", "probability"] and len(rows) == 70
    texts = [row["text"] for _, row in rows]
    assert texts[3] == 'Age: 23, Occupation: "Lawyer"'
    wanted = served.post("/infer/creditmix_sft/batch", [{"features": text} for text in texts])
    assert [row["label"] for _, row in rows] == [answer["prediction"] for answer in wanted]
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download JSON").click()
    assert json.loads(saved.value.path().read_text())[3]["text"] == texts[3]


def test_files_of_documents_become_a_table(page, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.pdf").write_bytes(pdf("ACME", f"Invoice {name}"))
    (tmp_path / "scan.pdf").write_bytes(pdf())
    page.get_by_label("Task", exact=True).select_option("documents")
    page.get_by_text("JSON Schema").click()
    page.get_by_label("Schema", exact=True).fill(json.dumps(CHOICE))
    page.locator("#files").set_input_files([str(tmp_path / f"{name}.pdf") for name in ("one", "scan", "two")])
    page.get_by_role("button", name="Extract").click()
    page.get_by_text(re.compile(r"3 of 3 files in")).wait_for()
    names = page.get_by_label("Results").get_by_role("rowheader").all_inner_texts()
    assert names == ["one.pdf", "scan.pdf", "two.pdf"]
    assert "no text, as a scan has" in page.get_by_label("Results").inner_text()
    page.get_by_role("button", name="Show").last.click()
    page.get_by_label("Document", exact=True).last.get_by_text("Invoice two").wait_for()


def test_a_chat_is_streamed_stopped_and_copied(page, served):
    page.get_by_label("Task", exact=True).select_option("chat")
    page.get_by_text("System message and length").click()
    page.get_by_label("Tokens of an answer").fill("12")
    page.get_by_label("Message", exact=True).fill("Age: 23")
    page.get_by_role("button", name="Send").click()
    page.get_by_text(re.compile(r"12 tokens, \d+\.\d s; cut off by the token budget")).wait_for()
    asked = {"model": "base", "messages": [{"role": "user", "content": "Age: 23"}], "max_tokens": 12}
    wanted = served.post("/v1/chat/completions", asked)["choices"][0]["message"]["content"]
    assert page.get_by_role("region", name="base").text_content() == wanted
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    page.get_by_label("Message", exact=True).fill("More")
    with served.held():
        page.get_by_role("button", name="Send").click()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text(re.compile(r"Stopped after \d+\.\d s")).wait_for()


def test_a_link_tries_one_run(browser, served):
    page = new_page(browser)
    page.goto(f"{served.url}/#run=creditmix_kd")
    page.get_by_role("checkbox", name="creditmix_kd").wait_for()
    assert page.locator("#compare input:checked").evaluate_all("boxes => boxes.map(box => box.value)") == [
        "creditmix_kd"
    ]
    page.close()
