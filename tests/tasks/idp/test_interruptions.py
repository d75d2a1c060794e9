"""Each document is kept as it has been read, and shown by the bar; an interruption leaves all but those under way."""

from __future__ import annotations

import json

import pytest
from support.inputs import read_rows, write_rows

import infer_idp
from common.generation import json_schema
from common.models import loading
from common.models.source import LoadedModel, ModelSource
from common.tasks.idp.extractor import Extraction, ExtractionSettings, Extractor

ROWS = [{"document": f"Shop {number}\n" + "Cable 2.50\n" * (number % 4), "id": f"d{number}"} for number in range(9)]
SCHEMA = {
    "type": "object",
    "properties": {"company": {"type": "string"}, "total": {"type": "number"}},
    "required": ["company", "total"],
    "additionalProperties": False,
}
BUDGET, BATCH = 40, 1200
EMPTY = Extraction({"company": "", "total": 0}, None, "")


@pytest.fixture(scope="module")
def loaded(tiny_base):
    return LoadedModel(*loading.load_for_inference(ModelSource(tiny_base, dtype="float32")), BATCH)


@pytest.fixture
def argv(tiny_base, tmp_path) -> list[str]:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    documents = write_rows(tmp_path / "in.jsonl", ROWS)
    flags = ["--max_new_tokens", str(BUDGET), "--max_batch_tokens", str(BATCH), "--dtype", "float32"]
    files = ["--input", documents, "--output", str(tmp_path / "out")]
    return ["--model_dir", tiny_base, "--schema", str(tmp_path / "schema.json"), *flags, *files]


@pytest.mark.processes
def test_documents_are_read_together_as_alone(loaded):
    """In a batch that has room for some of them, also those that are cut and tried again, or too long and in pieces."""
    long = "\n\n".join(f"Item {number}: {number}.50 in all" for number in range(35))
    texts = [row["document"] for row in ROWS] + [long]
    extractor = Extractor(loaded, SCHEMA, json_schema.preflight(SCHEMA), ExtractionSettings(BUDGET, max_len=500))
    found = list(extractor.extract_each(texts, confidence=True))
    order = [number for number, _ in found]
    assert sorted(order) == list(range(len(texts))) != order  # as they end
    together = dict(found)
    assert together[len(texts) - 1].pieces > 1
    for number, text in enumerate(texts):
        (alone,) = extractor.extract([text], confidence=True)
        assert together[number].confidence == pytest.approx(alone.confidence, abs=1e-4)
        for name in ("value", "error", "text", "tokens", "pieces", "cut", "notes"):
            assert getattr(together[number], name) == getattr(alone, name), name


def test_flags_that_decide_no_answer_leave_those_that_there_are(argv):
    def deciding(*more: str) -> dict:
        return infer_idp.deciding(infer_idp.build_parser().parse_args([*argv, *more]))

    same = ["--cascade_per_hour", "5", "--cascade_timeout", "2", "--cascade_keep", "--auto_fit", "--skip_bad_rows"]
    assert deciding() == deciding(*same)
    for other in (
        ["--dates", "day"],
        ["--cascade", "http://there/v1"],
        ["--cascade_below", "0.5"],
        ["--dtype", "float16"],
    ):
        assert deciding() != deciding(*other)


def test_a_file_beside_the_answers_to_rows_stays(argv, tmp_path, monkeypatch):
    """OUTPUT.documents is what a folder's files were read as, and nothing of ours where the input is a file."""
    monkeypatch.setattr(Extractor, "extract_each", lambda self, texts, *_, **__: enumerate([EMPTY] * len(texts)))
    (tmp_path / "out.documents").write_text("mine")
    infer_idp.main(argv)
    assert len(read_rows(tmp_path / "out")) == len(ROWS)
    assert (tmp_path / "out.documents").read_text() == "mine"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("Shop 1")
    infer_idp.main([*argv, "--input", str(tmp_path / "in"), "--output", str(tmp_path / "of_folder")])
    assert [row["id"] for row in read_rows(tmp_path / "of_folder")] == ["a.txt"]
    assert not (tmp_path / "of_folder.documents").exists()


def test_an_interrupted_file_keeps_every_document_that_was_read(argv, tmp_path, monkeypatch, capsys):
    infer_idp.main(argv)
    unbroken = read_rows(tmp_path / "out")
    assert [row["id"] for row in unbroken] == [row["id"] for row in ROWS]
    (tmp_path / "out").unlink()
    asked, original = [], Extractor.extract_each

    def extract_each(self, texts, *args, **kwargs):
        asked.append(list(texts))
        for number, found in enumerate(original(self, texts, *args, **kwargs)):
            if number == 5 and len(asked) == 1:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(Extractor, "extract_each", extract_each)
    with pytest.raises(KeyboardInterrupt):
        infer_idp.main(argv)
    assert not (tmp_path / "out").exists()
    with next(tmp_path.glob("out.*.partial")).open("a") as handle:
        handle.write('{"key": "')  # as a kill within a line leaves it
    capsys.readouterr()
    infer_idp.main([*argv, "--skip_bad_rows", "--auto_fit"])  # neither decides an answer
    assert [len(texts) for texts in asked] == [9, 4]
    assert read_rows(tmp_path / "out") == unbroken
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]
    assert "going on after 5 answers" in capsys.readouterr().err
