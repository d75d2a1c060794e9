"""Tokenizers and models, in torch, ONNX Runtime and llama.cpp."""
