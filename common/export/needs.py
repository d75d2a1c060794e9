"""What an export needs of this machine, asked before minutes are spent: its runtimes, room on the disk, memory."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import UserError
from common.export import genai_writer, gguf_writer, packages
from common.export import merge as merging
from common.export.packages import GGUFS, WRITERS
from common.models import adapters
from common.models.source import ModelSource
from common.vram import preflight as vram
from common.vram.formulas import FLOAT32, GB, PROCESS, predict

if TYPE_CHECKING:
    from common.export.pipeline import ExportSettings

FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ROOM = 1.1  # what is asked of the disk, for what is written
SPOOL = 256_000_000  # bytes of a GGUF that wait in memory before its temporary file gets them
ONNX_COPIES = 4  # of the weights while a graph is made: torch's, the graph's, its protobuf and what is written
ONNX_READ = 2  # copies of the file while ONNX Runtime opens it
GENAI_COPIES = 2  # of the weights while the builder works: torch's, and those that it rounds


def check(settings: ExportSettings, save_dir: Path) -> None:
    """All that can be known beforehand, the quickest first.

    Raises:
        UserError: no known architecture, an adapter that cannot be merged, or room or memory is short; it says how
            much, and what to do.
    """
    empty = merging.empty_model(settings.base, settings.trust_remote_code)
    places = merging.places_in(empty, merging.Checkpoint(settings.base).shapes)
    merging.deltas_on(settings.model_dir, places.values())
    check_room(settings, save_dir)
    check_memory(settings)


def check_runtime(form: str, model_dir: str, quant: str, *, proves: bool = True) -> None:
    """Refuse a format that this machine has not what to write with, or to prove it with.

    Raises:
        UserError: it is not installed, or there is no adapter to write.
    """
    if form == "gguf_lora" and not adapters.is_adapter(model_dir):
        raise UserError(f"{model_dir} is a whole model; use --format gguf")
    packages.check(form, quant, proves=proves)


# The disk.


def disk_bytes(settings: ExportSettings) -> tuple[int, int]:
    """(what lies beside the export while it is made, what lies in the folder for temporary files), at most."""
    numbers, out = merging.Checkpoint(settings.base).numbers, FLOAT_BYTES.get(settings.dtype, FLOAT32)
    temporary = 0
    if settings.format == "merged":
        both = settings.proves and settings.four_bit and adapters.is_adapter(settings.model_dir)
        size = numbers * out * (2 if both else 1)  # into two bases, to compare
    elif settings.format in GGUFS:
        written = settings.format == "gguf" or settings.proves  # gguf_lora: of the base, for the proof
        temporary = gguf_writer.predicted_bytes(settings.base, settings.quant) if written else 0
        size = temporary + (numbers * FLOAT32 if settings.format == "gguf" else _adapter_bytes(settings))
    elif settings.format == "onnx_genai":
        size = numbers * FLOAT32 + genai_writer.predicted_bytes(settings.base, settings.dtype)
    else:  # float32 weights, merged or as a graph, and what is made of them
        size = numbers * (FLOAT32 + (out if settings.format == "onnx" else FLOAT32))
    return int(size * ROOM), int(temporary * ROOM)


def _adapter_bytes(settings: ExportSettings) -> int:
    weights = Path(settings.model_dir, adapters.ADAPTER_WEIGHTS)
    return 2 * weights.stat().st_size if weights.is_file() else 0  # it is written in float32


def check_room(settings: ExportSettings, save_dir: Path) -> None:
    """Raises UserError where a disk has too little room for what is written."""
    beside, temporary = disk_bytes(settings)
    folder = next(parent for parent in save_dir.absolute().parents if parent.exists())
    scratch = Path(tempfile.gettempdir())
    needed = {folder: beside}
    if os.stat(folder).st_dev == os.stat(scratch).st_dev:
        needed[folder] += temporary
    elif temporary:
        needed[scratch] = temporary
    for place, size in needed.items():
        free = shutil.disk_usage(place).free
        if free < size:
            remedy = "choose another --save_dir" if place == folder else "set TMPDIR to a folder on another disk"
            raise UserError(
                f"--format {settings.format} needs about {size / GB:.2f} GB on the disk of {place}, and "
                f"{free / GB:.2f} GB are free; free some space, or {remedy}"
            )


# Memory.


@dataclass(frozen=True)
class Phase:
    """A part of an export that takes memory.

    Attributes:
        what: it is, in words.
        size: bytes of the whole process.
        remedy: against its size.
        on_device: it is torch's, on a card where there is one.
    """

    what: str
    size: int
    remedy: str
    on_device: bool = False


def phases(settings: ExportSettings) -> list[Phase]:
    """What takes memory, in its order; one whose model's memory is not known is left out."""
    checkpoint = merging.Checkpoint(settings.base)
    numbers, largest = checkpoint.numbers, max(math.prod(shape) for shape in checkpoint.shapes.values())
    form, machine, found = settings.format, "take a machine with more memory", []
    more = f"pass --no_proof, or {machine}"
    if settings.proves:
        four_bit = "on" if settings.four_bit else "off"
        base = str(settings.base) if adapters.is_adapter(settings.model_dir) else None
        found += _in_torch("the run itself", ModelSource(settings.model_dir, base, four_bit), more)
    if form != "gguf_lora":
        width = FLOAT_BYTES[settings.dtype] if form == "merged" else FLOAT32
        shard = 2 * min(settings.max_shard_bytes, numbers * width) + 2 * largest * FLOAT32
        found.append(Phase("merging", _process(shard), "lower --max_shard_gb"))
    if form == "onnx_genai":
        size = genai_writer.predicted_bytes(settings.base, settings.dtype)
        made = GENAI_COPIES * numbers * FLOAT32 + size
        found.append(Phase("the graph", _process(made), f"choose --format gguf, or {machine}"))
        if settings.proves:
            found.append(Phase("its proof in onnxruntime-genai", _process(ONNX_READ * size), more))
    elif form in WRITERS:
        made = ONNX_COPIES * numbers * FLOAT_BYTES[settings.dtype]
        found.append(Phase("the graph", _process(made), f"choose --format gguf, or {machine}"))
        if settings.proves:
            read = ONNX_READ * numbers * FLOAT_BYTES[settings.dtype]  # of INT8 the float32 one is measured, too
            found.append(Phase("its proof in ONNX Runtime", _process(read), more))
    if form in GGUFS:
        if settings.imatrix:
            size = _process(numbers * FLOAT32)
            found.append(Phase("--imatrix", size, f"leave --imatrix out, or {machine}"))
        size = gguf_writer.predicted_bytes(settings.base, settings.quant)
        written = _process(3 * largest * FLOAT32 + min(size, SPOOL))
        found.append(Phase("writing the GGUF", written, machine))
        if settings.proves:
            found.append(Phase("its proof in llama.cpp", _process(size), more))
    if form == "merged" and settings.proves:
        found += _in_torch("its proof", ModelSource(str(settings.base), dtype=settings.dtype, load_in_4bit="off"), more)
    return found


def _process(size: int) -> int:
    return int(PROCESS) + size


def _in_torch(what: str, source: ModelSource, remedy: str) -> list[Phase]:
    plan = vram.if_known(lambda: vram.inference_plan(source))
    return [Phase(what, predict(plan).total, remedy, on_device=True)] if plan else []


def check_memory(settings: ExportSettings, free: Callable[[bool], int | None] | None = None) -> None:
    """Raises UserError where a part of the export takes more memory than is free.

    Args:
        free: bytes, on a card where there is one if it is called with True; default: what the machine says.
    """
    free = free or (lambda on_device: vram.free_bytes() if on_device else vram.free_machine_bytes())
    for phase in phases(settings):
        there = free(phase.on_device)
        if there is not None and phase.size > there:
            raise UserError(
                f"--format {settings.format} takes about {phase.size / GB:.1f} GB of memory ({phase.what}), and "
                f"{there / GB:.1f} GB are free; {phase.remedy}"
            )
