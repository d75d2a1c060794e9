"""ONNX files of causal language models, by torch's exporter, and their dynamic INT8 by ONNX Runtime's quantiser.

The graph's inputs and outputs have the names that are usual for decoders: input_ids, attention_mask, position_ids,
past_key_values.N.key and .value to logits, present.N.key and .value. One graph reads a prompt (with an empty past) and
goes on from it token by token; rows, tokens and past are dynamic. An optional input bounds how many logits are
computed, since those of a whole batch of prompts can take gigabytes.

Layers that see a window alone have it in their mask. Their keys and values are kept whole like those of the others: a
cache that forgets would tie the graph to one length of the past.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from common.cli import UserError, reason
from common.models.batching import head_size
from common.models.gguf_file import UNPROVEN_KEY
from common.models.onnx_runtime import KEEP, MODEL_FILE

if TYPE_CHECKING:
    import onnx_ir
    from transformers import PreTrainedModel

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "smollm3")
OPSET = 18
DATA_FILE = MODEL_FILE + "_data"
PROTOBUF_LIMIT = 2_000_000_000  # bytes that one file may have; larger models keep their weights beside it
ALL = 2**31 - 1
BLOCK = 32  # weights that share a scale


class _WithCache(nn.Module):
    """The model with its cache as plain tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, past):
        from transformers import DynamicCache

        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=DynamicCache(list(past)),  # made without the config, it keeps what is out of a window
            use_cache=True,
        )
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def export(model: PreTrainedModel, folder: str | Path, *, protobuf_limit: int = PROTOBUF_LIMIT) -> Path:
    """Write `folder`/model.onnx, checked by `onnx.checker`; weights above the limit go to model.onnx_data beside it.

    Args:
        model: on the CPU, in float32 or float16, in eval mode.

    Raises:
        UserError: torch cannot export the architecture.
    """
    import onnx
    import onnx_ir

    example, shapes = _example(model)

    def names(prefix: str) -> list[str]:
        layers = range(model.config.num_hidden_layers)
        return [f"{prefix}.{layer}.{kind}" for layer in layers for kind in ("key", "value")]

    try:
        with quiet_exporter():
            program = torch.onnx.export(
                _WithCache(model).eval(),
                example,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=["input_ids", "attention_mask", "position_ids", *names("past_key_values")],
                output_names=["logits", *names("present")],
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(
            f"torch cannot export {model.config.model_type} to ONNX ({reason(error)}); choose another format"
        ) from error
    _bound_logits(program.model.graph)
    _strip(program.model)
    path = Path(folder) / MODEL_FILE
    large = sum(value.const_value.nbytes for value in program.model.graph.initializers.values()) > protobuf_limit
    onnx_ir.save(program.model, path, external_data=DATA_FILE if large else None)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def _example(model: PreTrainedModel) -> tuple[tuple, tuple]:
    """Inputs that the model is traced with, and which of their dimensions are dynamic."""
    config = model.config
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    size = head_size(config)
    rows, tokens, past = 2, 3, 5  # an example of at least two tokens, or the exporter takes the number as fixed
    cache = [tuple(torch.zeros(rows, heads, past, size, dtype=model.dtype) for _ in range(2)) for _ in range(layers)]
    example = (
        torch.zeros(rows, tokens, dtype=torch.long),
        torch.ones(rows, past + tokens, dtype=torch.long),
        torch.arange(past, past + tokens).repeat(rows, 1),
        cache,
    )
    dim = torch.export.Dim
    of_rows, of_tokens, of_past = dim("batch"), dim("sequence"), dim("past")
    shapes = (
        {0: of_rows, 1: of_tokens},
        {0: of_rows, 1: dim.DYNAMIC},
        {0: of_rows, 1: of_tokens},
        [({0: of_rows, 2: of_past}, {0: of_rows, 2: of_past})] * layers,
    )
    return example, shapes


def _bound_logits(graph: onnx_ir.Graph) -> None:
    """Let the head see the last `KEEP` positions alone; as the input has a default, nobody has to feed it."""
    import numpy as np
    import onnx_ir as ir

    logits = next(value for value in graph.outputs if value.name == "logits")
    head = logits.producer()
    if head.op_type != "MatMul":
        raise UserError(
            "the exported graph does not end in a head that is a product of matrices; choose another format"
        )
    hidden = head.inputs[0]
    keep = ir.Value(
        name=KEEP,
        shape=ir.Shape([1]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(np.array([ALL]), name=KEEP),
    )
    constants = {}
    for name, number in (("last_end", ALL), ("token_axis", 1)):
        constants[name] = ir.Value(name=name, const_value=ir.tensor(np.array([number]), name=name))
        graph.register_initializer(constants[name])
    graph.inputs.append(keep)
    graph.register_initializer(keep)
    first = ir.node("Neg", [keep])
    last = ir.node("Slice", [hidden, first.outputs[0], constants["last_end"], constants["token_axis"]])
    graph.insert_before(head, [first, last])
    head.replace_input_with(0, last.outputs[0])
    logits.shape = ir.Shape([logits.shape[0], "kept", logits.shape[2]])


def _strip(model: onnx_ir.Model) -> None:
    """Take out the exporter's stack traces, which can be larger than a small model's weights."""
    graph = model.graph
    for owner in [model, graph, *graph.all_nodes(), *graph.inputs, *graph.outputs, *graph.initializers.values()]:
        owner.metadata_props.clear()
    for node in graph.all_nodes():
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def quantize(source: str | Path, target: str | Path, *, scales: str = "block", keep_lm_head: bool = False) -> Path:
    """Dynamic INT8: weights that are multiplied are stored so, activations are rounded to it as they come.

    With a scale for each channel, ONNX Runtime gives the activations of a whole batch one scale together: on the
    miniature the answer to a row then changed by up to 1.1 nats with the rows beside it. With a scale for each block
    of weights (ONNX Runtime's MatMulNBits) activations have scales of their own, too.

    A head that is tied to the embeddings stays in floating point with them, whatever is asked for.

    Args:
        source, target: folders; `target` gets model.onnx.
        scales: "block" (of 32 weights of a channel) or "channel".
        keep_lm_head: leave an untied head in floating point, too.
    """
    import onnx

    path, result = Path(source) / MODEL_FILE, Path(target) / MODEL_FILE
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    excluded = [node.name for node in nodes if "logits" in node.output] if keep_lm_head else []
    large = (Path(source) / DATA_FILE).is_file()
    with quiet_exporter():
        (_quantize_blocks if scales == "block" else _quantize_channels)(path, result, excluded, large)
    onnx.checker.check_model(str(result))
    return result


def _quantize_blocks(path: Path, result: Path, excluded: list[str], large: bool) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(str(path)),
        bits=8,
        block_size=BLOCK,
        is_symmetric=True,
        accuracy_level=4,  # INT8 activations
        nodes_to_exclude=excluded,
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(result), use_external_data_format=large)


def _quantize_channels(path: Path, result: Path, excluded: list[str], large: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(path),
        str(result),
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=excluded,
        use_external_data_format=large,
        extra_options={"MatMulConstBOnly": True},
    )


def mark_unproven(folder: str | Path) -> None:
    """Write into `folder`/model.onnx that nobody has compared it with its run; weights beside it stay as they are."""
    import onnx

    path = Path(folder) / MODEL_FILE
    model = onnx.load(str(path), load_external_data=False)
    entry = model.metadata_props.add()
    entry.key, entry.value = UNPROVEN_KEY, "true"
    onnx.save(model, str(path))


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without the notices on axes that share a name and operators that are not installed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "onnxruntime", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
