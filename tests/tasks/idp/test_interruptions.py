"""Documents are read batch by batch: a bar that moves, and what an interruption leaves."""

from __future__ import annotations

import json

import pytest
from support.inputs import read_rows, write_rows

import infer_idp
from common.generation import json_schema
from common.models import loading
from common.models.source import LoadedModel, ModelSource
from common.tasks.idp.extractor import ExtractionSettings, Extractor

pytestmark = pytest.mark.processes

ROWS = [
    {
        "document": f"Shop {number}\n" + "Cable 2.50\n" * (number % 4),
        "fields": {"company": f"Shop {number}", "total": 2.5},
    }
    for number in range(9)
]
SCHEMA = {
    "type": "object",
    "properties": {"company": {"type": "string"}, "total": {"type": "number"}},
    "required": ["company", "total"],
    "additionalProperties": False,
}
BUDGET, BATCH = 40, 1200


@pytest.fixture(scope="module")
def loaded(tiny_base):
    return LoadedModel(*loading.load_for_inference(ModelSource(tiny_base)), BATCH)


@pytest.fixture
def argv(tiny_base, tmp_path) -> list[str]:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    flags = ["--max_new_tokens", str(BUDGET), "--max_batch_tokens", str(BATCH), "--on_cut", "flag"]
    return ["--model_dir", tiny_base, "--schema", str(tmp_path / "schema.json"), *flags]


@pytest.fixture
def interrupt(monkeypatch):
    """Interrupts the reading of the batch with a number, from 0, or of none; gives the batches that were read."""
    batches: list[list[str]] = []
    original, state = Extractor.extract, {"at": None}

    def extract(self, texts, *args, **kwargs):
        if len(batches) == state["at"]:
            state["at"] = None
            raise KeyboardInterrupt
        batches.append(list(texts))
        return original(self, texts, *args, **kwargs)

    monkeypatch.setattr(Extractor, "extract", extract)

    def at(number: int | None) -> list[list[str]]:
        batches.clear()
        state["at"] = number
        return batches

    return at


def test_a_window_is_a_batch(loaded):
    extractor = Extractor(loaded, SCHEMA, json_schema.preflight(SCHEMA), ExtractionSettings(BUDGET))
    texts = [row["document"] for row in ROWS]
    windows = list(extractor.windows(texts, str))
    assert [text for window in windows for text in window] == texts
    assert len(windows) > 2
    sizes = [len(window) * (max(len(extractor.encode(text)) for text in window) + BUDGET) for window in windows]
    assert max(sizes) <= BATCH
    read = []
    answers = extractor.extract(texts, on_read=lambda: read.append(len(read)))
    assert len(read) == len(answers) == len(texts)
    assert list(extractor.windows([], str)) == []


def test_an_interrupted_file_keeps_every_batch_but_one(interrupt, argv, tmp_path):
    documents, out = (
        write_rows(tmp_path / "in.jsonl", [{"document": row["document"]} for row in ROWS]),
        tmp_path / "out",
    )
    files = ["--input", documents, "--output", str(out)]
    batches = interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        infer_idp.main([*argv, *files])
    first = [text for batch in batches for text in batch]
    assert len(first) >= 2
    partial = next(tmp_path.glob("out.*.partial"))
    assert len(read_rows(partial)) == len(first)
    batches = interrupt(None)
    infer_idp.main([*argv, *files])
    assert first + [text for batch in batches for text in batch] == [row["document"] for row in ROWS]
    assert len(read_rows(out)) == len(ROWS)
