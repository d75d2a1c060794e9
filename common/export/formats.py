"""The formats that a run can be exported in, and what a GGUF's weights are rounded to."""

from __future__ import annotations

FORMATS = ("merged", "onnx", "int8", "onnx_genai", "gguf", "gguf_lora")
GGUF, GGUF_LORA = FORMATS[4:]
WITHOUT_LLAMA_CPP = ("Q8_0", "F16", "BF16")  # written by the gguf package alone; each number is rounded by itself
QUANTS = ("Q8_0", "F16", "BF16", "Q6_K", "Q5_K_M", "Q4_K_M")  # of a GGUF, the default first
