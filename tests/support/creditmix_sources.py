"""CreditMix rows in every format that the toolkit reads, and what creditmix_prepare.py makes of them."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

from pyarrow import parquet
from pyarrow.csv import read_csv

import creditmix_prepare
from common import cli
from common.data.rows import iter_jsonl
from common.files import jsonl_text, read_json
from common.tasks.ranking import creditmix
from support.inputs import SHARED

REAL = SHARED / "data" / "creditmix"
LINE = "Age: 23.0, Occupation: {}, Annual Income: 19114.12, Outstanding Debt: {}, Credit Utilization Ratio: {}"
FORMATS = ("list.json", "lines.jsonl", "raw.csv", "raw.csv.gz", "raw.parquet")


def customers(count: int = 300) -> list[dict]:
    """Raw six-feature rows of customers whose occupation names them: "Customer 17"."""
    names: dict[str, str] = {}
    rows = []
    for row in creditmix.synthesize(3 * count, seed=1):
        pairs = dict(creditmix.split_features(row["question"]))
        pairs["Occupation"] = names.setdefault(pairs["Outstanding Debt"].strip("_"), f"Customer {len(names)}")
        rows.append({"question": creditmix.join_features(pairs.items()), "answer": row["answer"]})
    return rows


def as_csv(rows: list[dict], **changes: str) -> str:
    """The raw CSV of question/answer rows; `changes` overrides columns of every row."""
    lines = []
    for row in rows:
        pairs = dict(creditmix.split_features(row["question"]))
        cells = {column.source: pairs.get(column.key, "1") for column in creditmix.COLUMNS}
        lines.append({"Customer_ID": pairs["Occupation"], "Credit_Mix": row["answer"], **cells, **changes})
    return csv_text(lines)


def csv_text(lines: list[dict]) -> str:
    quoted = [list(lines[0]), *([*line.values()] for line in lines)]
    return "".join(",".join(f'"{cell}"' for cell in cells) + "\n" for cells in quoted)


def write_source(path: Path, rows: list[dict]) -> Path:
    """`rows` in the format that the file's name says."""
    if path.suffix == ".parquet":  # numbers where a column has nothing else
        parquet.write_table(read_csv(io.BytesIO(as_csv(rows).encode())), path)
        return path
    if ".csv" in path.suffixes:
        text = as_csv(rows)
    elif path.suffix == ".json":
        text = json.dumps(rows)
    else:
        text = jsonl_text(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def prepare(src: Path, outdir: Path, *flags: str) -> dict:
    """Run the script on `src`; returns its manifest."""
    assert cli.run(creditmix_prepare.main, ["--src", str(src), "--outdir", str(outdir), *flags]) == cli.DONE
    return read_json(outdir / "creditmix_manifest.json")


def read(outdir: Path, what: str) -> list[dict]:
    return [row for _, row in iter_jsonl(outdir / f"creditmix_{what}.jsonl")]


def customer(line: str) -> str:
    return dict(creditmix.split_features(line.split("\n")[-1]))["Occupation"]
