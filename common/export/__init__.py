"""A run as a plain folder, ONNX, INT8, onnxruntime-genai or GGUF, with a proof that it still does what it did."""
