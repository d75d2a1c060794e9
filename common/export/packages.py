"""The packages that an export is written and proven with; to ask for them imports none of them."""

from __future__ import annotations

import importlib.util

from common.cli import UserError
from common.export.formats import GGUF, GGUF_LORA, WITHOUT_LLAMA_CPP

WRITERS = {
    "onnx": ("onnx", "onnx_ir", "onnxscript"),
    "int8": ("onnx", "onnx_ir", "onnxscript", "onnxruntime"),
    "onnx_genai": ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai"),
}
PROVERS = {"onnx": ("onnxruntime",), "int8": ("onnxruntime",), "onnx_genai": ("onnxruntime_genai",)}
OPTIONAL = ("onnxruntime_genai",)  # packages of requirements/export.txt
GGUFS = (GGUF, GGUF_LORA)


def check(form: str, quant: str, *, proves: bool = True) -> None:
    """Refuse a format that this machine has not what to write with, or to prove it with.

    Raises:
        UserError: it is not installed; it says which requirement file to install.
    """
    for package in WRITERS.get(form, ()):
        if not _installed(package):
            raise UserError(f"--format {form} is written with {package}, which is not installed; {_remedy(package)}")
    for package in PROVERS.get(form, ()) if proves else ():
        if not _installed(package):
            raise UserError(
                f"--format {form} is proven in {package}, which is not installed; {_remedy(package)}, or pass "
                "--no_proof"
            )
    if form in GGUFS and (proves or (form == GGUF and quant not in WITHOUT_LLAMA_CPP)):
        from common.models import llama_cpp

        llama_cpp.library()


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # what a test has put in its place
        return False


def _remedy(package: str) -> str:
    return f"pip install -r requirements{'/export' if package in OPTIONAL else ''}.txt"
