"""Tokenizers and models: loading, adapters, and the runtimes torch, ONNX Runtime, onnxruntime-genai and llama.cpp."""
