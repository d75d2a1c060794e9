"""llama.cpp's C interface, in the library that the prebuilt wheel `xllamacpp` brings (requirements/export.txt).

The wheel's own Python classes are a server, which gives no logits of a prompt. Its library exports llama.cpp's public
functions (llama.h) as well, and they are called here through ctypes. Of the two parameter structures, whose layout
grows with llama.cpp, only the first fields are touched, which have been the same since they exist; both are passed as
larger blocks, of which the library reads what it knows.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_void_p
from pathlib import Path

from common.cli import UserError

QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)(lambda level, text, data: None)


class Parameters(ctypes.Structure):
    """llama_model_params or llama_context_params: both are smaller."""

    _fields_ = (("words", ctypes.c_uint32 * 256),)


class Batch(ctypes.Structure):
    """llama_batch: tokens with their positions and sequences, and of which of them logits are wanted."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


FUNCTIONS = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (type(QUIET), c_void_p)),
    "llama_model_default_params": (Parameters, ()),
    "llama_context_default_params": (Parameters, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, Parameters)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_init_from_model": (c_void_p, (c_void_p, Parameters)),
    "llama_free": (None, (c_void_p,)),
    "llama_set_n_threads": (None, (c_void_p, c_int32, c_int32)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
    "llama_batch_init": (Batch, (c_int32, c_int32, c_int32)),
    "llama_batch_free": (None, (Batch,)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_seq_rm": (c_bool, (c_void_p, c_int32, c_int32, c_int32)),
    "llama_memory_seq_cp": (None, (c_void_p, c_int32, c_int32, c_int32, c_int32)),
    "llama_adapter_lora_init": (c_void_p, (c_void_p, c_char_p)),
    "llama_set_adapters_lora": (c_int32, (c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float))),
    "ggml_quantize_chunk": (
        c_size_t,
        (ctypes.c_int, POINTER(c_float), c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, POINTER(c_float)),
    ),
}


@functools.cache
def library() -> ctypes.CDLL:
    """llama.cpp, ready to be called, and silent.

    Raises:
        UserError: xllamacpp is not installed, or of a version that this does not know.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise UserError(
            "a GGUF runs in llama.cpp, which is not installed; pip install -r requirements/export.txt"
        ) from error
    wrong = UserError("this xllamacpp has another interface; pip install -r requirements/export.txt")
    try:
        loaded = ctypes.CDLL(next(map(str, Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError, StopIteration) as error:
        raise wrong from error
    # n_ctx, n_batch, n_ubatch and n_seq_max, as llama.h has their defaults
    if list(loaded.llama_context_default_params().words[:4]) != [512, 2048, 512, 1]:
        raise wrong
    loaded.llama_log_set(QUIET, None)
    loaded.llama_backend_init()
    return loaded
