"""Tokenizers and models: loading, adapters, and the runtimes torch, ONNX Runtime and llama.cpp."""
