"""The jobs page in a real headless browser: submitted, watched, cancelled, downloaded. Skips where there is none."""

from __future__ import annotations

import re

import pytest
from support.jobs_served import make_place, serve_jobs, sha256, write_data
from support.pages import SIZES, colours_of, contrast, new_page, violations
from support.processes import wait_for

from common.evaluation import run_figures
from common.jobs.routes import PAGE

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serve_jobs(make_place(tmp_path_factory.mktemp("page"))) as running:
        yield running


@pytest.fixture
def page(browser, served):
    """The page; at the end, nothing may have gone wrong in its script."""
    opened = new_page(browser)
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.goto(served.url)
    opened.get_by_text(re.compile(r"\d running, \d+ waiting")).wait_for()
    yield opened
    opened.close()
    assert faults == []


def fill(page, served, how: str, steps: int) -> None:
    page.get_by_label("Method").select_option("sft")
    page.get_by_label(re.compile("^Student")).fill(str(served.data / "student"))
    page.get_by_label("Data file", exact=True).fill(str(served.data / f"{how}.jsonl"))
    page.get_by_label(re.compile("^Steps")).fill(str(steps))


def test_nothing_comes_from_elsewhere(served):
    text = served.ask("GET", "/")[1]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|src=|@import|url\(", text)
    assert "innerHTML" not in text  # what a log says is text
    assert "/* page." not in text  # put in
    assert PAGE.stat().st_size < 40_000


def test_a_job_from_the_form_to_its_files(page, served):
    write_data(served.data / "slower.jsonl", {"seconds": 0.1})  # so that the page is seen at work
    fill(page, served, "slower", 30)
    page.get_by_label("int8", exact=True).check()
    page.get_by_label("gguf-Q4_K_M", exact=True).check()
    page.get_by_role("button", name="Submit").click()
    page.get_by_role("progressbar").first.wait_for()
    job_id = page.locator("#detail-title").inner_text().removeprefix("Job ")
    page.get_by_text(re.compile(r"\d+(\.\d)?\s%, \d+ s left")).first.wait_for()
    page.get_by_role("img", name=re.compile("Curve to step")).first.wait_for()
    assert "training from step 0" in page.locator("#log").inner_text()
    page.get_by_role("heading", name="Files").wait_for()
    status = served.status(job_id)
    assert (status["state"], status["request"]["exports"]) == ("succeeded", ["int8", "gguf-Q4_K_M"])
    assert page.locator("#about .tag").inner_text() == "succeeded"
    drawn = page.locator("#panes svg")
    assert [pane.get_attribute("aria-label") for pane in drawn.all()] == [
        "Curve to step 30: loss 2.0000", "Curve to step 30: forward kl 0.0333"]  # fmt: skip
    assert drawn.nth(1).locator("text").all_text_contents()[0] == "0.2"  # round numbers
    page.get_by_label("Log scale").check()
    assert drawn.nth(1).locator("text").all_text_contents()[0] == "0.05"
    assert page.locator("#panes figcaption b").all_inner_texts() == ["loss, log scale", "forward kl, log scale"]
    listed = served.ask("GET", f"/artifacts/{job_id}")[1]["artifacts"]
    assert page.locator("#files a").all_inner_texts() == [entry["path"] for entry in listed]
    with page.expect_download() as download:
        page.get_by_role("link", name="int8/model.int8").click()
    assert download.value.path().read_text() == "int8"
    assert download.value.suggested_filename == "model.int8"
    assert page.get_by_role("link", name=re.compile(job_id)).get_attribute("aria-current") == "true"
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").click()
    wait_for(lambda: served.ask("GET", f"/status/{job_id}")[0] == 404)
    page.locator("#detail").wait_for(state="hidden")


def test_cancel_and_resume(page, served):
    fill(page, served, "slow", 400)
    page.get_by_role("button", name="Submit").click()
    page.get_by_role("img", name=re.compile("Curve to step")).first.wait_for()
    page.get_by_role("button", name="Cancel").focus()
    steps = page.locator("#about").get_by_text(re.compile("^[0-9]+ of 400$"))
    before = steps.inner_text()
    wait_for(lambda: steps.inner_text() != before)
    assert page.evaluate("document.activeElement.innerText") == "Cancel"  # it is not drawn anew at every step
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Resume").click()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Resume").wait_for()
    page.reload()  # the address holds the job
    page.get_by_text("stopped at").first.wait_for()
    assert page.locator("#about .tag").inner_text() == "cancelled"


def test_a_file_is_sent_and_trained_on(page, served):
    fill(page, served, "quick", 3)
    rows = (served.data / "quick.jsonl").read_bytes()
    page.get_by_label("Send a data file").set_input_files({"name": "bad.jsonl", "mimeType": "", "buffer": rows + b"{"})
    page.locator("#sent").get_by_text("bad.jsonl, line 2: not JSON").wait_for()
    page.get_by_label("Send a data file").set_input_files({"name": "rows.jsonl", "mimeType": "", "buffer": rows})
    page.locator("#sent").get_by_text("rows.jsonl: 1 rows, kept as file-").wait_for()
    assert re.fullmatch(r"file-[0-9a-f]{16}", page.get_by_label("Data file", exact=True).input_value())
    page.get_by_role("button", name="Submit").click()
    page.get_by_role("heading", name="Files").wait_for()
    assert page.locator("#about .tag").inner_text() == "succeeded"


def test_errors_stand_where_they_belong(page, served):
    fill(page, served, "quick", -5)
    page.get_by_role("button", name="Submit").click()
    alert = page.locator("#answer").get_by_role("alert")
    alert.wait_for()
    assert re.search(r"max_steps: must be between -1 and .* \(request \S+\)$", alert.inner_text())
    assert page.evaluate("document.activeElement.id") == "max_steps"
    assert page.get_by_label(re.compile("^Steps")).get_attribute("aria-invalid") == "true"
    page.get_by_text("Further settings (JSON").click()
    page.get_by_label("Further settings", exact=True).fill("{")
    page.get_by_role("button", name="Submit").click()
    page.get_by_text("The further settings are not JSON").wait_for()
    page.get_by_label("Further settings", exact=True).fill('{"seed": 3}')
    page.get_by_label(re.compile("^Steps")).fill("3")
    page.get_by_label("Data file", exact=True).fill(str(served.data / "failing.jsonl"))
    page.get_by_role("button", name="Submit").click()
    page.locator("#about").get_by_text("the stand-in was told to fail").wait_for()
    page.get_by_text("Request", exact=True).click()
    assert '"seed": 3' in page.get_by_label("Request", exact=True).inner_text()
    page.goto(f"{served.url}#job-{'0' * 16}")
    page.get_by_text("there is no such job").wait_for()
    page.context.set_offline(True)
    page.get_by_role("button", name="Submit").click()
    page.get_by_text("The server cannot be reached.").first.wait_for()


def test_the_fields_follow_the_method(page):
    assert page.get_by_label(re.compile("^Teacher")).is_visible()
    page.get_by_label(re.compile("^Student")).fill("kept")
    page.get_by_label("Method").select_option("dpo")
    assert page.get_by_label(re.compile("^Teacher")).count() == 0
    assert page.get_by_label(re.compile("^Beta")).is_visible()
    assert page.get_by_label(re.compile("^Student")).input_value() == "kept"
    unnamed = page.evaluate("""[...document.querySelectorAll("input, textarea, select")].filter(
        control => !control.labels.length).map(control => control.id)""")
    assert unnamed == []


def test_with_a_key(browser, tmp_path):
    with serve_jobs(make_place(tmp_path), api_key="s3cret", api_prefix="/slm") as served:
        page = new_page(browser)
        page.goto(f"{served.url}/slm/")
        page.get_by_text("send the API key").wait_for()
        page.get_by_text("API key", exact=True).click()
        page.get_by_label("Sent with every request").fill("s3cret")
        page.get_by_label("Sent with every request").press("Tab")
        page.get_by_text("No jobs yet").wait_for()
        fill(page, served, "quick", 2)
        page.get_by_role("button", name="Submit").click()
        with page.expect_download() as download:
            page.get_by_role("link", name="model.safetensors").click()
        key = {"Authorization": "Bearer s3cret"}
        (job,) = served.ask("GET", "/slm/jobs", headers=key)[1]["jobs"]
        listed = served.ask("GET", f"/slm/artifacts/{job['job_id']}", headers=key)[1]["artifacts"]
        wanted = {entry["path"]: entry["sha256"] for entry in listed}
        assert sha256(download.value.path().read_bytes()) == wanted["model.safetensors"]
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(browser, served, scheme):
    """No sideways scrolling, and text that stands out from its ground in both schemes."""
    job_id = served.submit("failing")
    served.until(job_id)
    page = new_page(browser, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.goto(f"{served.url}/#job-{job_id}")
    page.get_by_role("img", name=re.compile("Curve")).first.wait_for()
    page.get_by_role("heading", name="Files").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for kind in (
        "h2",
        ".quiet",
        "label",
        "button",
        "dt",
        ".tag.failed",
        ".error",
        ".jobs .name",
        "figcaption span",
        ".default",
    ):
        colours = colours_of(page, kind)
        assert contrast(*colours) >= 4.5, (scheme, kind, colours)
    assert page.get_by_role("button", name="Submit").bounding_box()["height"] >= 44  # a thumb
    page.close()


def test_the_fields_suggest_what_is_there_and_say_their_defaults(page, served):
    page.get_by_label("Method").select_option("sft")
    page.locator("#models option").first.wait_for(state="attached")
    models = page.locator("#models option").evaluate_all("options => options.map(option => option.value)")
    assert str(served.data / "student") in models
    files = page.locator("#data-files option").evaluate_all("options => options.map(option => option.value)")
    assert str(served.data / "quick.jsonl") in files
    assert page.get_by_label(re.compile("^Learning rate")).get_attribute("list") is None
    assert page.get_by_text("Learning rate default 0.0002").is_visible()


def test_a_job_has_a_name_and_the_figures_of_its_run(page, served):
    fill(page, served, "quick", 3)
    page.get_by_label("Name", exact=True).fill("a path/")
    page.get_by_role("button", name="Submit").click()
    page.get_by_text("name: give 1 to 64 letters").wait_for()
    page.get_by_label("Name", exact=True).fill("tickets-3")
    page.get_by_role("button", name="Submit").click()
    page.locator("#about").get_by_text("succeeded").wait_for()
    job_id = re.search(r"Job tickets-3 \((\w+)\)", page.locator("#detail-title").inner_text())[1]
    status = served.status(job_id)
    assert (status["name"], status["served_as"]) == ("tickets-3", "tickets-3")
    assert (served.service.settings.runs_dir / "tickets-3" / "config.json").is_file()
    page.get_by_text("Served by the inference server as tickets-3.").wait_for()
    message = served.refused(422, "/distill", served.payload("quick", name="tickets-3"))
    assert message == "name: there is a run called tickets-3; take another name"
    run = served.data / "jobs" / job_id / "artifacts"
    figure = {"value": 0.75, "low": 0.7, "high": 0.8}
    facts = {"evaluator": "creditmix", "split": "validation", "n": 90, "data": "val.jsonl", "data_sha256": None}
    run_figures.keep(facts | {"models": [{"model_dir": str(run), "accuracy": figure}]})
    page.reload()
    page.get_by_text("accuracy 0.750 [0.700, 0.800]").first.click()
    page.get_by_text("90 rows, validation of val.jsonl").wait_for()
    assert served.status(job_id)["evaluations"][0]["figures"] == {"accuracy": figure}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing(browser, served, scheme, size):
    job_id = served.submit("quick")
    served.until(job_id)
    page = new_page(browser, viewport=SIZES[size], color_scheme=scheme)
    page.goto(f"{served.url}/#job-{job_id}")
    page.get_by_role("heading", name="Files").wait_for()
    assert violations(page) == []
    page.close()
