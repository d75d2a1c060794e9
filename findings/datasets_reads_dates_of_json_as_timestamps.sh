#!/usr/bin/env bash
# datasets 5.2.0: a column of JSONL in which every text is an ISO date is read as timestamps, and asking for strings gives
# other strings than the file has.
#
# {"input": "...", "output": "2025-10-01"}: where all outputs are such, row["output"] is a datetime, which a template or an
# f-string writes as "2025-10-01 00:00:00". features=Features({"output": Value("string"), ...}) makes a string of that: the
# same "2025-10-01 00:00:00", and times lose their "T". With one text of another kind in the column, or one date that is
# in no calendar, all stay as they are written. pyarrow's JSON reader decides it, before features are looked at. So a
# model that is trained on clean rows of extracted dates learns to write what stands in no row.
#
# Here rows are read by the json module (common/data/rows.py), and answers are made tables of with the types of their
# texts given to pyarrow (common/data/tables.py).
#
# Seen 2026-11-29 with datasets 5.2.0, pyarrow 26.0.1, CPython 3.11, x86-64. Exits 1 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
HF_HOME="$folder" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" >"$folder/seen" 2>"$folder/log" <<'PYTHON'
import json
import sys
from pathlib import Path

from datasets import Dataset, Features, Value, load_dataset

folder = Path(sys.argv[1])


def show(name: str, outputs: list[str], **how) -> None:
    path = folder / f"{name.replace(' ', '_')}.jsonl"
    path.write_text("".join(json.dumps({"input": "When?", "output": output}) + "\n" for output in outputs))
    rows = load_dataset("json", data_files=str(path), split="train", **how)
    print(f"{name}: {rows.features['output'].dtype}; the first is {rows[0]['output']}")


show("dates", ["2025-10-01", "2025-10-02"])
show("times", ["2025-10-01 12:30:00", "2025-10-02T12:30:00"])
show("a word among them", ["2025-10-01", "unknown"])
show("a date that is none", ["2025-10-01", "2025-02-30"])
show("in German", ["01.10.2025", "02.10.2025"])
texts = Features({"input": Value("string"), "output": Value("string")})
show("dates as texts", ["2025-10-01", "2025-10-02"], features=texts)
show("times as texts", ["2025-10-01T12:30:00", "2025-10-02T12:30:00"], features=texts)
rows = Dataset.from_list([{"input": "When?", "output": "2025-10-01"}])
print(f"rows of Python: {rows.features['output'].dtype}; the first is {rows[0]['output']}")
PYTHON
diff "$folder/seen" - <<'SEEN' || { tail -n 20 "$folder/log"; exit 1; }
dates: timestamp[s]; the first is 2025-10-01 00:00:00
times: timestamp[s]; the first is 2025-10-01 12:30:00
a word among them: string; the first is 2025-10-01
a date that is none: string; the first is 2025-10-01
in German: string; the first is 01.10.2025
dates as texts: string; the first is 2025-10-01 00:00:00
times as texts: string; the first is 2025-10-01 12:30:00
rows of Python: string; the first is 2025-10-01
SEEN
cat "$folder/seen"
