"""A run as a plain folder, ONNX, INT8 or GGUF, with a proof that it still does what it did."""
