"""The pages: what is generated is fresh, what is named exists, requests reach routes, and the site is its own."""

from __future__ import annotations

import html.parser
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.inputs import ROOT, SHARED
from support.processes import LONGEST

from common.cli import UserError
from common.generation import json_schema
from docs import formats, generate, pictures

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("common/*.md"), *ROOT.glob("findings/*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
WRITTEN = [name for name in NAMES if name not in ("docs/cli.md", "docs/results.md", "CHANGELOG.md")]
KEPT = ("common", "bench", "recipes", "requirements", "tests", "docs", "k8s")  # folders of the repository itself
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def fenced(text: str) -> str:
    """The lines of a page that are in code blocks, continued lines joined."""
    return re.sub(r"\\\n\s*", " ", "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)))


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_pages_are_fresh(name):
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == generate.PAGES[name](), f"docs/{name} is stale; python -m docs.generate"


def test_generated_pages_do_not_depend_on_the_terminal(monkeypatch):
    before = generate.command_line()
    monkeypatch.setenv("COLUMNS", "40")
    assert generate.command_line() == before


def test_the_command_line_has_every_script_and_every_flag():
    assert sorted(f"{name}.py" for name in generate.SCRIPTS) == sorted(path.name for path in ROOT.glob("*.py"))
    sections = re.split(r"^## ", generate.command_line(), flags=re.MULTILINE)[1:]
    for section, parser in zip(sections, generate.parsers().values(), strict=True):
        for action in parser._actions:
            for flag in action.option_strings:
                assert action.dest == "help" or f"`{flag}`" in section, (section.splitlines()[0], flag)


def test_formats_have_every_keyword():
    known = json_schema.ENFORCED | json_schema.CHECKED | json_schema.UNSUPPORTED.keys()
    assert formats.EXAMPLES.keys() == known
    assert all(formats.treatment(keyword, schema)[0] == "checked" for keyword, _, schema in formats.EXCEPTIONS)


@pytest.mark.processes
@pytest.mark.skipif(not (SHARED / "data/jsonschema/cases.jsonl").exists(), reason="the public schemas are not here")
def test_public_schemas_are_treated_as_the_page_says():
    """A keyword that is said to be enforced is, but in the cases that the page names; the same for the others."""
    page = {keyword: {formats.treatment(keyword, schema)[0]} for keyword, schema in formats.EXAMPLES.items()}
    for keyword, _, _ in formats.EXCEPTIONS:
        page[keyword].add("checked")
    page["format"] |= {*formats.known_formats().values(), "refused"}
    seen = 0
    for line in (SHARED / "data/jsonschema/cases.jsonl").read_text().splitlines():
        try:
            keywords = json_schema.preflight(json.loads(line)["schema"], best_effort=True).keywords
        except UserError:
            continue
        seen += 1
        for keyword in keywords:
            name = keyword.path.rpartition("/")[2]
            assert formats.WORDS[keyword.treatment] in page[name], keyword
    assert seen >= 390


@pytest.mark.parametrize("source", sorted(ROOT.glob("docs/*.mmd")), ids=lambda path: path.name)
def test_pictures_show_their_text(source):
    drawn = source.with_suffix(".svg").read_text(encoding="utf-8")
    assert pictures.mark(source) in drawn, f"{source.name} has changed; python -m docs.pictures"


def test_findings_have_their_form():
    """What surprised, in which release, when, and what that decides here; pinned, apart, and in the index."""
    index = (ROOT / "findings/README.md").read_text()
    scripts = sorted(ROOT.glob("findings/*.sh"))
    assert len(scripts) >= 8
    assert sorted(re.findall(r"^\| \[(\w+\.sh)\]\(\1\) \| \S.* \|$", index, re.MULTILINE)) == [
        one.name for one in scripts
    ]
    for script in scripts:
        head, _, program = script.read_text().partition("\nset -euo pipefail\n")
        told = " ".join(head.replace("\n#", " ").split())
        assert re.search(r" \d+\.\d+\.\d+", told), script.name
        assert re.search(r"Seen 20\d\d-\d\d-\d\d .*[Ee]xits 1 when", told), script.name
        decides = re.findall(r"\b(?:(?:common|docs)/[\w/.]*\w|requirements\.txt)", told.partition(" Here ")[2])
        assert decides, f"{script.name} does not say what it decides here"
        assert all((ROOT / path).exists() for path in decides), (script.name, decides)
        assert "mktemp -d" in program and "-m venv" in program and "==" in program, script.name
        assert not re.search(r"^(import|from) common\b", program, re.MULTILINE), script.name


def test_the_readme_is_one_sitting():
    assert 230 <= len((ROOT / "README.md").read_text().splitlines()) <= 270


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", text)):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", path):
            continue
        file = page.parent / path if path else page
        assert file.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(file), f"{path} has no heading {anchor}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", WRITTEN)
def test_named_files_exist(name):
    """A path in backticks that begins with a folder of the repository; `*` and `{a,b}` stand for several."""
    text = (ROOT / name).read_text()
    if name == "docs/migrating.md":
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)  # what others call it
    for code in CODE.findall(text):
        for word in code.split():
            if not re.match(rf"({'|'.join(KEPT)})/[\w*{{}},./-]*$", word) or "<" in word:
                continue
            for path in expanded(word):
                assert list(ROOT.glob(path.rstrip("/"))), f"{name} names {path}"


def expanded(path: str) -> list[str]:
    head, brace, rest = path.partition("{")
    if not brace:
        return [path]
    choices, _, tail = rest.partition("}")
    return [longer for choice in choices.split(",") for longer in expanded(head + choice + tail)]


def test_every_page_is_in_the_index_and_in_the_navigation():
    index, nav = (ROOT / "docs/index.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, f"docs/index.md lacks {page.name}"
        assert f": {page.name}\n" in nav, f"mkdocs.yml lacks {page.name}"


def test_the_map_of_the_rooms_is_the_house():
    text = (ROOT / "common/README.md").read_text()
    rows = dict(re.findall(r"^\| `([\w/]+)` \| (.+) \|$", text, re.MULTILINE))
    rooms = {path.parent.relative_to(ROOT / "common").as_posix(): path for path in ROOT.glob("common/*/**/__init__.py")}
    assert rows == {room: path.read_text().strip().strip('"') for room, path in rooms.items()}
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    drawn = re.search(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1].splitlines()
    assert drawn == ["scripts, bench", *contract["layers"]]
    picture = (ROOT / "docs/ARCHITECTURE.mmd").read_text()
    for room in " | ".join(contract["layers"]).split(" | "):
        assert f'["{room}<br/>' in picture or f'["{room}.' in picture, f"docs/ARCHITECTURE.mmd lacks {room}"


# Requests.


def requests() -> list[tuple[str, list[str]]]:
    """(page, words of a curl command) of all pages."""
    found = []
    for page, name in zip(PAGES, NAMES, strict=True):
        for line in fenced(page.read_text()).splitlines():
            if re.match(r"(\$ )?curl ", line.strip()):
                found.append((name, shlex.split(re.sub(r"<(\w+)>", r"\1", line), comments=True)))
    return found


@pytest.fixture(scope="module")
def routes(tmp_path_factory) -> dict[str, list]:
    """{"inference": routes, "jobs": routes} as {path: methods}, of the servers that the pages start."""
    from common.jobs import routes as jobs
    from common.serving import routes as serving

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_DIR", str(tmp_path_factory.mktemp("runs")))
        patch.setenv("DATA_DIR", str(tmp_path_factory.mktemp("jobs")))
        return [app.openapi()["paths"] for app in (serving.create_app(), jobs.create_app())]


def test_requests_reach_a_route(routes):
    assert len(requests()) > 15
    for page, words in requests():
        url = next(word for word in words if word.startswith(("localhost:8000", "http://localhost:8000")))
        path = "/" + url.partition("8000/")[2].partition("?")[0]
        body = words[words.index("-d") + 1] if "-d" in words else None
        method = words[words.index("-X") + 1] if "-X" in words else "POST" if body or "-F" in words else "GET"
        known = {one for paths in routes for one, methods in paths.items() if method.lower() in methods}
        assert any(re.fullmatch(re.sub(r"\{\w+(:path)?\}", ".+", one), path) for one in known), (page, method, path)
        if body:
            json.loads(body)


def test_fields_of_jobs_are_settings_of_their_method():
    from common.jobs.request import ALIASES, LISTED, METHODS, SWITCHES

    sent = [json.loads(words[words.index("-d") + 1]) for _, words in requests() if any("/distill" in w for w in words)]
    assert len(sent) >= 4
    for payload in sent:
        script = METHODS[payload.pop("method", "distill")].script
        parser = generate.parsers()[f"python {script}"]
        flags = {flag[2:] for action in parser._actions for flag in action.option_strings}
        assert payload.keys() <= flags | SWITCHES.keys() | ALIASES.keys() | {LISTED}


def test_the_environment_of_the_servers_is_told():
    """Each variable that a server reads has a row on its page, and no row is of a variable that nobody reads."""
    for page, sources in {
        "serving.md": ["serving/*.py", "models/loading.py"],
        "jobs.md": ["jobs/*.py"],
    }.items():
        text = "\n".join(path.read_text() for source in sources for path in ROOT.glob(f"common/{source}"))
        read = set(re.findall(r'(?:\benv\.\w+\(|environ\.get\()\s*"([A-Z_0-9]+)"', text))
        read -= {"LOCAL_RANK", "PYTHONPATH", "CUDA_VISIBLE_DEVICES", "HF_DATASETS_CACHE"}  # of other programs
        cells = re.findall(r"^\| ((?:`[A-Z_0-9]+`(?:, )?)+) \|", (ROOT / "docs" / page).read_text(), re.MULTILINE)
        assert read == {name for cell in cells for name in re.findall(r"[A-Z_0-9]+", cell)}, page


# The site.


class Resources(html.parser.HTMLParser):
    """Addresses that a browser loads by itself when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes) -> None:
        given = dict(attributes)
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next", "alternate", "edit"):
            self.addresses.append(given.get("href") or "")
        self.addresses += [given[name] or "" for name in ("src", "srcset", "data", "poster") if name in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.processes
def test_the_site_builds_without_a_warning(site):
    for page in ROOT.glob("docs/*.md"):
        assert (site / f"{page.stem}.html").is_file()


@pytest.mark.processes
def test_the_site_loads_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        resources = Resources()
        resources.feed(page.read_text(encoding="utf-8"))
        assert resources.addresses
        for address in resources.addresses:
            assert not re.match(r"(https?:)?//", address), f"{page.name} loads {address}"
            local = address.partition("#")[0].partition("?")[0]
            assert (
                not local
                or local.startswith("data:")
                or (page.parent / local.lstrip("/")).exists()
                or page.name == "404.html"
            ), address
        assert 'class="mermaid"' not in page.read_text(), (
            "a diagram would be fetched from a CDN; draw it with docs.pictures"
        )
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style.name
