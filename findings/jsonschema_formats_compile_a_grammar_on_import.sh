#!/usr/bin/env bash
# jsonschema 4.26.0 with its extra format-nongpl (rfc3987-syntax 1.1.0, lark 1.3.1): importing it compiles a grammar.
#
# The extra brings rfc3987-syntax for the formats iri and iri-reference. jsonschema imports it whenever it is imported
# itself, and rfc3987-syntax builds its parser on import, not on first use. So every program that imports jsonschema, if
# it ever sees an IRI or not, pays for it: 1.2 s of one core of an AMD EPYC, where jsonschema without the extra takes
# 0.1 s. The other packages of the extra cost next to nothing, and installed by themselves give all other formats.
#
# Here requirements.txt names the other packages of the extra one by one, and an IRI is told by the URI that it stands for
# (common/generation/string_formats.py).
#
# Seen 2026-11-29 on CPython 3.11, x86-64. Exits 1 when a later release would print something else.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'jsonschema[format-nongpl]==4.26.0' \
  rfc3987-syntax==1.1.0 lark==1.3.1
cat >"$folder/look.py" <<'PYTHON'
import sys
import time

started = time.process_time()
import jsonschema

seconds = time.process_time() - started
formats = jsonschema.Draft202012Validator.FORMAT_CHECKER.checkers
print("lark is imported:", "lark" in sys.modules, "| parsers built:", "rfc3987_syntax.syntax_helpers" in sys.modules)
print(len(formats), "formats, iri among them:", "iri" in formats)
print(f"{seconds:.2f} s", file=sys.stderr)
PYTHON
{
  "$folder/venv/bin/python" "$folder/look.py" # once, so that all of it is compiled to bytecode
  "$folder/venv/bin/python" "$folder/look.py"
  "$folder/venv/bin/pip" uninstall -q -y rfc3987-syntax
  "$folder/venv/bin/python" "$folder/look.py"
} >"$folder/seen" 2>"$folder/seconds"
diff "$folder/seen" - <<'SEEN'
lark is imported: True | parsers built: True
19 formats, iri among them: True
lark is imported: True | parsers built: True
19 formats, iri among them: True
lark is imported: False | parsers built: False
17 formats, iri among them: False
SEEN
cat "$folder/seen" "$folder/seconds"
sed -n 2,3p "$folder/seconds" | paste -sd ' ' | awk '{ exit !($1 > 3 * $3) }'
