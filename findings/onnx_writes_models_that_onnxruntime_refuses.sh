#!/usr/bin/env bash
# onnx 1.23.2 with onnxruntime 1.31.1, each the newest: what helper.make_model() writes by default is refused, twice.
#
# make_model() stamps a model with the newest IR version and operator set that onnx knows, 14 and 28. onnxruntime 1.31.1
# takes versions up to 13 and sets up to 26, and names one at a time: first the IR version, and once that is lowered the
# operator set. Nothing in its requirements bounds onnx, so pip installs the pair without a word.
#
# Here every export names its operator set (common/export/onnx_writer.py).
#
# Seen 2026-11-29 on CPython 3.11, x86-64. Exits 1 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check onnx==1.23.2 onnxruntime==1.31.1
"$folder/venv/bin/python" - >"$folder/seen" 2>"$folder/log" <<'PYTHON'
import re

import onnxruntime
from onnx import TensorProto, helper

x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", [x], [y])


def attempt(name: str, **how) -> None:
    model = helper.make_model(graph, **how)
    print(f"{name}: IR version {model.ir_version}, operator set {model.opset_import[0].version}:", end=" ")
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        print("runs")
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:
        print(re.search(r"(Unsupported model IR version|only \*guarantees\* support|opset \d+ is under)", str(error))[0])


attempt("as it comes")
attempt("an older IR version", ir_version=11)
attempt("an older operator set, too", ir_version=11, opset_imports=[helper.make_opsetid("", 23)])
PYTHON
diff "$folder/seen" - <<'SEEN' || { cat "$folder/log"; exit 1; }
as it comes: IR version 14, operator set 28: Unsupported model IR version
an older IR version: IR version 11, operator set 28: only *guarantees* support
an older operator set, too: IR version 11, operator set 23: runs
SEEN
cat "$folder/seen"
