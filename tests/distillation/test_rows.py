"""Rows to distil on: texts of a data set that are stored as bytes, and files of several kinds of rows."""

from __future__ import annotations

import struct
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from support.inputs import write_rows

from common.cli import UserError
from common.data import shapes
from common.distillation import rows


def write(folder: Path, **columns: list) -> str:
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train.parquet")
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_pairs_and_text(tmp_path):
    pairs = write(tmp_path / "pairs", input=["é 1".encode(), b"2"], output=[b"Good", b"Bad"])
    read = rows.read_dataset(pairs, None, "train", "text")
    assert read == [{"input": "é 1", "output": "Good"}, {"input": "2", "output": "Bad"}]
    text = write(tmp_path / "text", text=[b"one\n", "zwei ü".encode()])
    assert rows.read_dataset(text, None, "train", "text") == [{"text": "one\nzwei ü"}]


def test_prompts_alone_are_for_on_policy(tmp_path):
    path = write(tmp_path / "asked", prompt=["1", "2"], source=["x", "y"])
    assert rows.read_dataset(path, None, "train", "text", takes=shapes.ON_POLICY) == [{"input": "1"}, {"input": "2"}]
    with pytest.raises(UserError, match="has the columns prompt, source; name that of the text"):
        rows.read_dataset(path, None, "train", "text")


def test_bytes_of_no_text_are_named(tmp_path):
    pairs = write(tmp_path / "pairs", input=[b"1", b"\xff"], output=[b"Good", b"Bad"])
    with pytest.raises(UserError, match=r"row 2: it holds bytes that are no UTF-8 text \(byte 0\)"):
        rows.read_dataset(pairs, None, "train", "text")
    assert len(rows.read_dataset(pairs, None, "train", "text", skip_bad_rows=True)) == 1
    text = write(tmp_path / "text", text=[b"\xff\xfe"])
    with pytest.raises(UserError, match="convert it to UTF-8"):
        rows.read_dataset(text, None, "train", "text")
    offsets, content = pyarrow.py_buffer(struct.pack("<2i", 0, 1)), pyarrow.py_buffer(b"\xff")
    claimed = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, content])  # as Spark casts bytes
    for columns in ({"text": claimed}, {"input": claimed, "output": ["b"]}):
        (tmp_path / "claimed").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "claimed" / "train.parquet")
        with pytest.raises(UserError, match=r"no UTF-8 text \(byte 0\); convert it to UTF-8"):
            rows.read_dataset(str(tmp_path / "claimed"), None, "train", "text")


def test_running_text_may_stand_among_answers(tmp_path, tokenizer):
    text, pair = {"text": "Acme makes lamps."}, {"input": "Hi", "output": "Hello"}
    path = write_rows(tmp_path / "rows.jsonl", [text, pair])
    for given in ([text, pair], [pair, text]):
        answer, window = rows.encode(tokenizer, path, given, 512, whole=False)
        assert tokenizer.decode(answer.input_ids).count("Hello") == 1 and answer.prompt_length > 1
        assert tokenizer.decode(window.input_ids) == "Acme makes lamps."
    assert rows.read(path, "train") == [text, pair]
