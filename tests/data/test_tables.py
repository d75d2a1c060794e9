"""Rows and answers as CSV, JSONL and Parquet: the same rows in every form, and a sentence for what is none of them."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import struct

import pyarrow
import pytest
from pyarrow import parquet

from common.cli import UserError
from common.data import rows, tables
from common.distillation.rows import read_labelled
from common.tasks.ranking.task import LabelTask

ROWS = [
    {"input": 'Rate it.\n\nfine, but "slow"', "output": "good; really", "group": "00"},
    {"input": "größe\t日本", "output": "3", "group": "01"},
]


@pytest.mark.parametrize("form", tables.FORMATS)
def test_rows_come_back_from_every_form(form, tmp_path):
    path = tmp_path / f"rows.{form}"
    path.write_bytes(tables.packed(ROWS, form))
    assert rows.read_rows(path, rows.SFT_KEYS) == ROWS
    assert tables.packed(ROWS, form) == path.read_bytes()  # the same bytes each time
    renamed = path.rename(tmp_path / "rows.data")  # its content says what it is
    assert rows.read_rows(renamed, rows.SFT_KEYS) == ROWS


@pytest.mark.parametrize("separator", ",;\t")
def test_cells_are_separated_as_the_header_shows(separator, tmp_path):
    text = separator.join(["input", "output"]) + "\n" + separator.join(['"a, b; c\td"', "1,5"]) + "\n"
    if separator == ",":
        text = text.replace("1,5", '"1,5"')
    (tmp_path / "rows.csv").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    assert rows.read_rows(tmp_path / "rows.csv", rows.SFT_KEYS) == [{"input": "a, b; c\td", "output": "1,5"}]


def test_a_parquet_file_is_as_large_as_what_is_read_of_it(tmp_path):
    chat = [{"role": "user", "content": "x" * 5000}, {"role": "assistant", "content": "b"}]
    table = pyarrow.table({"messages": [chat] * 900, "n": list(range(900)), "id": [b"y" * 100] * 900})
    path = tmp_path / "rows.parquet"
    parquet.write_table(table, path)
    written = 900 * (5000 + len("userassistantb") + 100 + 8)
    assert path.stat().st_size < 60_000
    assert written < tables.parquet_bytes(path, 1 << 30) < 1.02 * written
    assert tables.parquet_bytes(path, 1000) > 1000


def test_parquet_rows_are_what_json_would_have(tmp_path):
    table = pyarrow.table(
        {
            "input": pyarrow.array(["a", "a", None]).dictionary_encode(),
            "output": [b"x", b"\xff", b"y"],
            "day": [datetime.date(2025, 10, 1)] * 3,
            "price": [decimal.Decimal("1.50")] * 3,
            "scores": [{"Good": 0.5, "Bad": None}] * 3,
        }
    )
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    unit, numbered, columns = rows.numbered_rows(tmp_path / "rows.parquet")
    assert (unit, columns) == ("row", ["input", "output", "day", "price", "scores"])
    (_, first), (_, second), (number, third) = numbered
    assert first == {
        "input": "a",
        "output": "x",
        "day": "2025-10-01",
        "price": "1.50",
        "scores": {"Good": 0.5, "Bad": None},
    }
    assert str(second) == "it holds bytes that are no UTF-8 text (byte 0)"
    assert (number, json.loads(json.dumps(third))["input"]) == (3, None)
    with pytest.raises(UserError, match=r"rows.parquet, row 2: it holds bytes that are no UTF-8 text"):
        rows.read_rows(tmp_path / "rows.parquet", rows.SFT_KEYS)


def test_a_parquet_row_that_python_cannot_have_is_named(tmp_path):
    """Spark casts bytes to text unseen, so that a column of texts holds what is none; and dates have no last year."""
    offsets, content = (pyarrow.py_buffer(part) for part in (struct.pack("<4i", 0, 1, 3, 4), b"a\xe4\xf6b"))
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, offsets, content])
    days = pyarrow.array([0, 0, 10_000_000], pyarrow.date32())
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"input": texts, "output": ["x", "y", "z"], "day": days}), path)
    numbers, (first, second, third) = zip(*tables.parquet_rows(path), strict=True)
    assert (numbers, first) == ((1, 2, 3), {"input": "a", "output": "x", "day": "1970-01-01"})
    assert str(second) == "it holds bytes that are no UTF-8 text (byte 0)"
    assert str(third).startswith("it holds what cannot be read (")
    with pytest.raises(UserError, match=r"rows.parquet, row 2: it holds bytes that are no UTF-8 text"):
        rows.read_rows(path, rows.SFT_KEYS)
    assert len(rows.read_rows(path, rows.SFT_KEYS, skip_bad_rows=True)) == 1


def test_a_cell_may_be_as_long_as_a_value_of_json(tmp_path):
    row = {"input": "word " * 60_000, "output": "b"}
    (tmp_path / "rows.csv").write_bytes(tables.packed([row], "csv"))
    assert rows.read_rows(tmp_path / "rows.csv", rows.SFT_KEYS) == [row]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "a.xlsx",
            b"PK\x03\x04rest",
            "is an Excel workbook or another archive, which is not read; save its rows as CSV",
        ),
        ("a.xls", b"\xd0\xcf\x11\xe0rest", "is an old Excel workbook, which is not read"),
        ("a.arrow", b"ARROW1\0\0", "is an Arrow file, which is not read"),
        ("a.parquet", b"input,output\na,b\n", "is not Parquet; write it again, or rename it"),
        ("a.parquet", b"PAR1 cut short", "is a damaged Parquet file"),
        ("a.csv", "input;output\nä;b\n".encode("latin-1"), "is not UTF-8 text"),
        ("a.csv", b"input,output\n", "has a header but no rows"),
        ("a.csv", b"", "is empty; give a file with rows, as a JSON list, JSONL, CSV or Parquet"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(name, content, sentence, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        rows.read_rows(tmp_path / name, rows.SFT_KEYS)
    assert str(raised.value).startswith(f"{tmp_path / name} {sentence}") and "\n" not in str(raised.value)


ANSWERS = [
    {"prediction": "2024-01-01", "scores": {"2024-01-01": 0.25, "b": -1}, "margin": 1.25},
    {"prediction": None, "scores": {"2024-01-01": 1, "b": 0.1}, "margin": 0.9, "warning": 'not "it", perhaps'},
]


@pytest.mark.parametrize("form", tables.FORMATS)
def test_answers_are_put_in_place_in_the_form_of_their_name(form, tmp_path):
    partial, output = tmp_path / "partial", tmp_path / f"answers.{form}"
    partial.write_text("".join(json.dumps(answer) + "\n" for answer in ANSWERS))
    tables.put_in_place(partial, str(output), ("prediction",))
    assert list(tmp_path.iterdir()) == [output]
    if form == "jsonl":
        assert [json.loads(line) for line in output.read_text().splitlines()] == ANSWERS
        return
    _, numbered, columns = rows.numbered_rows(output)
    assert columns == ["prediction", "scores.2024-01-01", "scores.b", "margin", "warning"]
    first, second = (list(row.values()) for _, row in numbered)
    if form == "csv":
        assert first == ["2024-01-01", "0.25", "-1", "1.25", ""]
        assert second == ["", "1", "0.1", "0.9", 'not "it", perhaps']
    else:
        assert first == ["2024-01-01", 0.25, -1, 1.25, None]
        assert second == [None, 1, 0.1, 0.9, 'not "it", perhaps']


@pytest.mark.parametrize("form", tables.FORMATS)
def test_label_probabilities_come_back_from_every_form(form, tmp_path):
    """Also where only some rows have them; what one form says, all say."""
    given = [
        {"input": "a", "output": "Bad"},
        {"input": "b", "probabilities": {"Good, or so": 0.75, "Bad": 0.25}, "output": "Bad"},
    ]
    path = tmp_path / f"rows.{form}"
    path.write_bytes(tables.packed(given, form))
    _, numbered, _ = rows.numbered_rows(path)
    assert [{key: value for key, value in row.items() if value is not None} for _, row in numbered] == given
    task = LabelTask("own", ("Good, or so", "Bad"), "Which?")
    read = read_labelled(str(path), task)
    assert [row.get("probabilities") for row in read] == [None, given[1]["probabilities"]]


def test_a_probability_that_is_no_number_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("input,probabilities.Good,probabilities.Bad\na,0.5,half\n")
    with pytest.raises(UserError, match=r"rows.csv, line 2: probabilities must be numbers from 0 to 1"):
        read_labelled(str(path), LabelTask("own", ("Good", "Bad"), "Which?"))


def test_answers_that_are_no_table_are_not_named_as_one():
    rows.check_output("answers.csv", "rows.jsonl", tables.FORMATS)
    with pytest.raises(UserError, match=r"--output answers.CSV: answers are written as JSONL here, not as csv"):
        rows.check_output("answers.CSV", "rows.jsonl")
