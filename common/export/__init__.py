"""A run as a plain folder, ONNX, INT8 or GGUF, with a proof."""
