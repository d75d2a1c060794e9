"""Scans: read by text recognition, one by one and from folders, which are prepared and judged on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.documents import ROW, SCHEMA, scan
from support.documents import pdf as pdf_of
from support.inputs import read_rows, write_rows

import eval_idp
import idp_prepare
import infer_idp
from common.cli import UserError
from common.generation import json_schema
from common.tasks.idp import documents, ocr, reading
from common.tasks.idp import rows as idp_rows
from common.tasks.idp.evaluate import Evaluation
from common.tasks.idp.extractor import ExtractionSettings
from common.tasks.idp.layout import Word

PLAIN = {"type": "object", "properties": {"company": {"type": "string"}, "total": {"type": "string"}}}


@pytest.fixture
def recognised(monkeypatch) -> list[str]:
    """The texts that were recognised. What is seen in an image follows from its width: no library is needed."""
    seen: list[str] = []

    def recognise(image, scale=1.0):
        number = image.size[0]
        seen.append(f"{number}")
        words = [("Shop", (10, 10, 50, 22)), (f"No {number}", (60, 10, 120, 22)), (f"{number}.50", (200, 40, 250, 52))]
        return [Word(text, tuple(edge / scale for edge in box)) for text, box in words]

    monkeypatch.setattr(ocr, "recognise", recognise)
    monkeypatch.setattr(ocr, "installed", lambda: True)
    return seen


def scans_in(folder: Path, numbers: range) -> Path:
    """Scans with their fields beside them, every other one a PDF."""
    folder.mkdir()
    for number in numbers:
        image = scan().resize((number, 40))
        name = folder / f"{number}"
        image.save(name.with_suffix(".pdf"), resolution=ocr.DPI) if number % 2 else image.save(name.with_suffix(".png"))
        name.with_suffix(".json").write_text(json.dumps({"company": f"Shop No {number}", "total": f"{number}.50"}))
    return folder


def schema_in(folder: Path) -> str:
    (folder / "schema.json").write_text(json.dumps(PLAIN))
    return str(folder / "schema.json")


def test_scans_are_recognised(tmp_path, monkeypatch):
    seen = []

    def recognise(image, scale=1.0):
        seen.append((image.size, scale))
        return [Word("Total 12.50", (60 / scale, 50, 300, 90))]

    monkeypatch.setattr(ocr, "recognise", recognise)
    monkeypatch.setattr(ocr, "installed", lambda: True)
    scan("Total 12.50").save(tmp_path / "a.png")
    image = reading.read_document(tmp_path / "a.png")
    assert (image.text, image.segments[0].box) == ("Total 12.50", (60, 50, 300, 90))
    (tmp_path / "scan.pdf").write_bytes(pdf_of())
    (tmp_path / "text.pdf").write_bytes(pdf_of("Invoice 7"))
    assert reading.read_document(tmp_path / "scan.pdf").text == "Total 12.50"
    assert reading.read_document(tmp_path / "text.pdf").text == "Invoice 7"
    assert reading.read_document(tmp_path / "text.pdf", "on").text == "Total 12.50"
    page = (1700, 2200), pytest.approx(200 / 72)  # in 200 dots an inch
    assert seen == [((900, 180), 1.0), page, page]
    for name in ("a.png", "scan.pdf"):
        with pytest.raises(UserError, match=f"{name} .*; pass --ocr auto"):
            reading.read_document(tmp_path / name, "off")


def test_what_was_recognised_in_a_folder_is_kept(tmp_path, monkeypatch):
    folder, seen = tmp_path / "in", []
    folder.mkdir()
    for number in range(4):
        scan(f"Total {number}").save(folder / f"{number}.png")

    def recognise(image, scale=1.0):
        seen.append(len(seen))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return [Word(f"text {len(seen)}", (0, 0, 9, 9))]

    monkeypatch.setattr(ocr, "recognise", recognise)
    files, out = reading.document_files(folder), tmp_path / "out.documents"
    with pytest.raises(KeyboardInterrupt):
        list(reading.file_rows(files, "auto", out))
    rows = {path.name: row for path, row in reading.file_rows(files, "auto", out)}
    assert [row["document"] for row in rows.values()] == ["text 1", "text 2", "text 4", "text 5"]
    assert rows["0.png"]["lines"] == [{"text": "text 1", "box": [0, 0, 9, 9]}]
    assert [row for _, row in reading.file_rows(files, "auto", out)] == [*rows.values()]
    assert len(seen) == 5
    list(reading.file_rows(files, "on", out))
    assert len(seen) == 9  # read otherwise, it is read anew


def test_what_is_recognised_stands_where_it_is_drawn(tmp_path):
    pytest.importorskip("rapidocr", reason="requirements/ocr.txt is not installed")
    scan("INVOICE 4711", "Total: 12.50").save(tmp_path / "a.pdf", resolution=100)
    document = reading.read_document(tmp_path / "a.pdf")
    assert document.text.split() == ["INVOICE", "4711", "Total:", "12.50"]
    x0, y0, x1, y1 = document.segments[0].box
    assert 0.72 * 40 < x0 < 0.72 * 70 and 0.72 * 40 < y0 < y1 < 0.72 * 120 < x1  # with some white around


def test_the_library_is_held_to_the_threads_that_are_allowed(monkeypatch):
    given = {}
    library = SimpleNamespace(RapidOCR=lambda params: given.update(params))
    monkeypatch.setitem(sys.modules, "rapidocr", library)
    monkeypatch.setattr(ocr, "installed", lambda: True)
    for threads, meant in (("3", 3), (None, -1)):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if threads:
            monkeypatch.setenv("OMP_NUM_THREADS", threads)
        ocr.engine.cache_clear()
        ocr.engine()
        assert given["EngineConfig.onnxruntime.intra_op_num_threads"] == meant
    ocr.engine.cache_clear()


def test_a_folder_of_scans_is_prepared(tmp_path, recognised):
    folder, out = scans_in(tmp_path / "scans", range(100, 124)), tmp_path / "data"
    argv = ["--src", str(folder), "--schema", schema_in(tmp_path), "--outdir", str(out)]
    idp_prepare.main([*argv, "--ocr", "auto"])
    assert len(recognised) == 24
    assert not [*out.glob("*.documents")]
    judged = read_rows(out / "idp_dev.jsonl") + read_rows(out / "idp_val.jsonl")
    sft = read_rows(out / "idp_sft.jsonl")
    assert len(judged) + len(sft) == 24 and judged
    asked = {row["input"].partition("Document:\n")[2] for row in sft} | {row["document"] for row in judged}
    # as infer_idp.py reads them
    read = {path.stem: row for path, row in reading.file_rows(reading.document_files(folder))}
    assert asked == {row["document"] for row in read.values()}
    for row in judged:
        assert {key: row[key] for key in ("document", "lines")} == {
            key: read[row["id"]][key] for key in ("document", "lines")
        }
        assert documents.of_row(row).segments
    preflight = json_schema.preflight(PLAIN)
    gold = Evaluation(judged, PLAIN, preflight, ExtractionSettings(), evidence=True).grounding_of_gold()
    assert gold["all"]["value"] == 1
    with pytest.raises(UserError, match=r"scans, file 100\.png: .*100\.png is an image.*pass --ocr auto"):
        idp_prepare.main([*argv, "--ocr", "off"])


def test_all_pages_are_recognised_where_that_is_asked_for(tmp_path, recognised):
    (tmp_path / "a.pdf").write_bytes(pdf_of("a text layer that is wrong"))
    (tmp_path / "a.json").write_text("{}")
    (auto,) = idp_rows.read(tmp_path, PLAIN)
    (on,) = idp_rows.read(tmp_path, PLAIN, recognise="on")
    assert auto["document"] == "a text layer that is wrong"
    assert on["document"].startswith("Shop No")


def test_an_interrupted_folder_goes_on_where_it_stopped(tmp_path, recognised, monkeypatch):
    argv = ["--src", str(scans_in(tmp_path / "scans", range(100, 124))), "--schema", schema_in(tmp_path)]
    argv += ["--outdir", str(tmp_path / "data")]
    whole = ocr.recognise

    def interrupted(image, scale=1.0):
        if len(recognised) == 20:
            raise KeyboardInterrupt
        return whole(image, scale)

    with monkeypatch.context() as patch:
        patch.setattr(ocr, "recognise", interrupted)
        with pytest.raises(KeyboardInterrupt):
            idp_prepare.main(argv)
    idp_prepare.main(argv)
    assert len(recognised) == 24


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("111.json", "{", r"file 111\.pdf: .*111\.json, line 1: not JSON"),
        ("111.json", '{"total": 7}', r"file 111\.pdf: the fields do not satisfy the schema: \$\.total"),
        ("111.txt", "Shop No 111", r"file 111\.pdf: 111\.txt has the same 111\.json; keep one of the two"),
    ],
)
def test_fields_are_checked_before_hours_of_recognition(tmp_path, recognised, name, content, sentence):
    folder = scans_in(tmp_path / "scans", range(100, 124))
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        idp_rows.read(folder, PLAIN)
    assert recognised == []
    assert len(idp_rows.read(folder, PLAIN, skip_bad_rows=True)) == 23


@pytest.mark.parametrize("command", [idp_prepare, eval_idp, infer_idp])
def test_ocr_is_refused_where_there_is_nothing_to_recognise(tmp_path, tiny_base, command):
    rows = write_rows(tmp_path / "rows.jsonl", [ROW])
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    argv = ["--ocr", "on", "--schema", str(tmp_path / "schema.json")]
    argv += {
        idp_prepare: ["--src", rows, "--outdir", str(tmp_path)],
        eval_idp: ["--model_dir", tiny_base, "--data", rows],
        infer_idp: ["--model_dir", tiny_base, "--input", rows, "--output", str(tmp_path / "out.jsonl")],
    }[command]
    with pytest.raises(UserError, match=r"--ocr is for a folder of documents, an image or a PDF.*leave it out"):
        command.main(argv)
