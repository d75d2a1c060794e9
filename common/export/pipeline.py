"""Exports of a run: made in a folder of their own, proven, and only then put under their name.

Nothing half-written ever stands under the final name: the work is done in a hidden folder beside it, which is renamed
when the proof is passed, renamed to NAME.rejected when it is not, and removed when anything goes wrong.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import run_record
from common.cli import UserError, log
from common.data import task_record
from common.export import merge as merging
from common.export import parity
from common.export.model_card import EXPORT_FILE
from common.export.parity import Measurement, Speed
from common.export.proof_rows import ProofRows, encode
from common.files import atomic_write, lies_in, read_json, sha256_file
from common.models import adapters, chats, gguf_import, unproven
from common.models import loading as models
from common.models.batching import MAX_BATCH_TOKENS
from common.models.source import LLAMA_CPP, ModelSource
from common.models.tokenizers import PROBES, stop_ids
from common.models.torch_runtime import Runtime, TorchRuntime
from common.tasks.ranking import decision_json
from common.tasks.ranking.classifier import CALIBRATION

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from common.models.gguf_model import GgufModel

RECORD = EXPORT_FILE
WEIGHTS = (".safetensors", ".onnx", ".onnx_data", ".data", ".gguf")
ORIGINAL_BASE, NF4_BASE = "original base", "de-quantised NF4 base"


@dataclass(frozen=True)
class ExportSettings:
    """What is to be exported.

    Attributes:
        model_dir: the run: an adapter, or a whole model.
        base: the folder of its base; `model_dir` for a whole model.
        four_bit: the reference is the adapter on its base in 4 bits.
        dtype: of the export's weights, or of what is not quantised.
        quant: of a GGUF.
        scales, keep_lm_head: of INT8 (see `onnx_writer.quantize`).
        max_shard_bytes: see `merge.merge`.
        imatrix: rows that show which weights of a GGUF matter most; None: all count alike.
        proof_rows: that the run and the export are compared on; None: they are not, and the export is unproven.
    """

    format: str  # merged, onnx, int8, onnx_genai, gguf or gguf_lora
    model_dir: str
    base: Path
    four_bit: bool
    dtype: str
    quant: str
    scales: str
    keep_lm_head: bool
    max_shard_bytes: int
    trust_remote_code: bool
    imatrix: ProofRows | None = None
    proof_rows: ProofRows | None = None

    @property
    def proves(self) -> bool:
        """Whether it is compared with its run."""
        return self.proof_rows is not None


def base_folder(model_dir: str, base: str | None, form: str) -> Path:
    """Where the weights are that an export starts from; a base on the Hub is fetched.

    Raises:
        UserError: it cannot be had, it is stored quantised, or its architecture has no such export.
    """
    adapter = adapters.is_adapter(model_dir)
    folder = merging.local_base((base or adapters.base_of(model_dir)) if adapter else model_dir)
    if read_json(folder / "config.json").get("quantization_config"):
        raise UserError(f"{folder} is stored quantised; give its 16-bit original{' with --base' if adapter else ''}")
    if form == "merged":
        return folder
    from common.export import genai_writer, gguf_writer, onnx_writer

    if form in ("gguf", "gguf_lora"):
        gguf_writer.check(folder, form)
    elif form == "onnx_genai":
        genai_writer.check(folder)
    else:
        merging.check_architecture(folder, form, onnx_writer.ARCHITECTURES)
    return folder


def own_dtype(base: Path) -> str:
    """The type that a model's weights are stored in."""
    config = read_json(base / "config.json")
    return config.get("dtype") or config.get("torch_dtype") or "float32"


def trained_in_4bit(model_dir: str, load_in_4bit: str) -> bool:
    """Whether the run stands on a 4-bit base: as `--load_in_4bit` says, else as its run.json does."""
    if load_in_4bit != "auto" or not adapters.is_adapter(model_dir):
        return load_in_4bit == "on"
    run = run_record.read(model_dir)
    if run is None:
        return models.use_4bit("auto")
    asked = run.get("settings", {}).get("load_in_4bit", "auto")
    return asked == "on" or (asked == "auto" and not run.get("device", "CPU").startswith("CPU"))


def rejected_dir(save_dir: Path) -> Path:
    """Where an export goes that has failed its proof."""
    return save_dir.with_name(f"{save_dir.name}.rejected")


def check_kept(save_dir: Path, needed: Mapping[str, str | Path | None]) -> None:
    """Refuse an export in whose place something lies that it is made of.

    Args:
        needed: paths by what they are, in words; None for what is not given.

    Raises:
        UserError: one of them is a folder that would be replaced, or lies in one.
    """
    for what, path in needed.items():
        if path is None:
            continue
        folder = save_dir if lies_in(path, save_dir) else rejected_dir(save_dir)
        if lies_in(path, folder):
            raise UserError(f"{folder} would replace {what} {path}; choose another --save_dir")


@contextlib.contextmanager
def staging(save_dir: Path) -> Iterator[Path]:
    """A hidden folder beside `save_dir`, which is gone afterwards; what a killed export left there goes first."""
    folder = save_dir.parent / f".{save_dir.name}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, target: Path) -> None:
    """Rename a finished folder to `target`; what was there goes once it is out of the way."""
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(folder, target)
    shutil.rmtree(old, ignore_errors=True)


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """{"bytes", "sha256"} of every file of an export."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files}


class Export:
    """An export on its way: the reference is measured first, then the export is made and measured beside it; without
    rows for a proof it is only made."""

    def __init__(self, settings: ExportSettings) -> None:
        self.settings, self.proof_rows = settings, settings.proof_rows
        self.is_adapter = adapters.is_adapter(settings.model_dir)
        self.task = task_record.read(settings.model_dir)
        self.from_nf4 = settings.four_bit and self.is_adapter
        # imports, too, what loading would else be timed with
        empty, self.tokenizer = merging.texts_of(settings.model_dir, settings.base, settings.trust_remote_code)
        self.stops = stop_ids(self.tokenizer, empty.generation_config)
        precision = self._measure_reference() if settings.proves else "NF4" if settings.four_bit else None
        self.origin = {
            "model_dir": settings.model_dir,
            "sha256": adapters.adapter_hash(settings.model_dir),
            "base": str(settings.base) if self.is_adapter else None,
            **self._gguf_origin(),
            "reference": "adapter on its base" if self.is_adapter else "whole model",
        }
        if precision:
            self.origin["reference"] += f" in {precision}"

    def _measure_reference(self) -> str:
        """Measure the run itself; the precision of its weights."""
        settings, rows = self.settings, self.proof_rows
        log(f"measuring {settings.model_dir} on {len(rows.prompts):,} rows of {rows.path}")
        load = functools.cache(lambda: self._load_torch(settings.model_dir, settings.four_bit))
        self.reference = self._loaded(load, {Path(settings.model_dir), settings.base}).result()
        return "NF4" if settings.four_bit else str(load().model.dtype).removeprefix("torch.")

    def _gguf_origin(self) -> dict[str, Any]:
        """ "gguf": the file that the base was made of, or the base of a run that trained all of its weights."""
        run = run_record.read(self.settings.model_dir) or {}
        trained = {"gguf": run["gguf"]} if "gguf" in run else {}
        return gguf_import.origins(base=str(self.settings.base)) or trained

    def make(self, stage: Path) -> tuple[Path, dict[str, Any]]:
        """Write the export within `stage` and prove it.

        Returns:
            Its folder, and what export.json says of it.

        Raises:
            UserError: the model cannot be exported so.
        """
        settings = self.settings
        makers = {
            "merged": self._merged,
            "onnx": self._onnx,
            "int8": self._int8,
            "onnx_genai": self._onnx_genai,
            "gguf": self._gguf,
            "gguf_lora": self._gguf_lora,
        }
        folder, facts = makers[settings.format](stage)
        source = Path(settings.model_dir)
        kept = [*sorted(source.glob(f"{CALIBRATION}*.json")), source / run_record.GROUPS_FILE]
        kept += [source / decision_json.FILE] if settings.format == "merged" else []  # for transformers alone
        for file in kept:
            if file.is_file():
                shutil.copy(file, folder / file.name)
        if self.task:
            task_record.write(folder, self.task)
        files = {"files": describe_files(folder)}
        return folder, {"format": settings.format, "origin": self.origin, task_record.KEY: self.task, **facts, **files}

    def _loaded(self, load: Callable[[], Runtime], files: Collection[Path]) -> Measurement:
        """`files`: of the model, or folders of them."""
        started = time.perf_counter()
        runtime = load()
        speed = Speed(sum(map(weight_bytes, files)), round(time.perf_counter() - started, 3))
        return Measurement(runtime, self.tokenizer, self.proof_rows, self.stops, speed)

    def _speed(self, load: Callable[[], Runtime], files: Collection[Path]) -> Speed:
        measurement = self._loaded(load, files)
        measurement.time()
        return measurement.speed

    def _prove(self, load: Callable[[], Runtime], files: Collection[Path]) -> dict[str, Any]:
        return parity.compare(self.reference, self._loaded(load, files).result(), self.proof_rows)

    def _proven(self, load: Callable[[], Runtime], files: Collection[Path]) -> dict[str, Any]:
        """ "proof", or without rows for one "unproven"."""
        return {"proof": self._prove(load, files)} if self.settings.proves else {unproven.RECORD_KEY: True}

    def _load_torch(self, model_dir: str, four_bit: bool) -> TorchRuntime:
        model, _ = models.load_for_inference(
            ModelSource(
                model_dir,
                base=str(self.settings.base) if adapters.is_adapter(model_dir) else None,
                load_in_4bit="on" if four_bit else "off",
                trust_remote_code=self.settings.trust_remote_code,
            )
        )
        return TorchRuntime(model)

    def _merge(self, target: Path, dtype: str, from_nf4: bool) -> Path:
        settings = self.settings
        log(f"merging into the {NF4_BASE if from_nf4 else ORIGINAL_BASE}, in {dtype}")
        target.mkdir()
        merging.merge(
            settings.model_dir,
            settings.base,
            target,
            dtype=dtype,
            from_nf4=from_nf4,
            max_shard_bytes=settings.max_shard_bytes,
            trust_remote_code=settings.trust_remote_code,
        )
        return target

    def _merged(self, stage: Path) -> tuple[Path, dict[str, Any]]:
        """Into each base that the adapter may stand on; the better metric is kept, of equal ones the lower KL. Without
        a proof into the one that training saw."""
        if not self.settings.proves:
            into = NF4_BASE if self.from_nf4 else ORIGINAL_BASE
            folder = self._merge(stage / "merged", self.settings.dtype, self.from_nf4)
            facts = {"merged_into": into, "dtype": self.settings.dtype, "runtime": _runtime("transformers")}
            return folder, facts | {unproven.RECORD_KEY: True}
        folders, proofs = {}, {}
        for into in (ORIGINAL_BASE, NF4_BASE) if self.from_nf4 else (ORIGINAL_BASE,):
            folder = self._merge(stage / into.replace(" ", "_"), self.settings.dtype, into == NF4_BASE)
            folders[into] = folder
            proofs[into] = self._prove(lambda folder=folder: self._load_torch(str(folder), False), [folder])
        best = max(proofs, key=lambda into: (_metric(proofs[into]), -proofs[into]["logits"]["mean_kl"]))
        facts = {"merged_into": best, "dtype": self.settings.dtype, "runtime": _runtime("transformers")}
        facts["proof"] = proofs.pop(best)
        return folders[best], facts | ({"also_tried": proofs} if proofs else {})

    def _plain(self, stage: Path) -> tuple[Path, dict[str, Any]]:
        """The float32 weights that the other formats are made from: on the base that training saw."""
        into = NF4_BASE if self.from_nf4 else ORIGINAL_BASE
        return self._merge(stage / "merged", "float32", self.from_nf4), {"merged_into": into}

    def _graph(self, stage: Path, dtype: str) -> tuple[Path, dict[str, Any]]:
        import torch
        from transformers import AutoModelForCausalLM

        from common.export import onnx_writer

        merged, facts = self._plain(stage)
        log(f"exporting to ONNX, in {dtype}")
        model = AutoModelForCausalLM.from_pretrained(merged, dtype=getattr(torch, dtype)).eval()
        folder = _with_texts(merged, stage / "onnx")
        onnx_writer.export(model, folder)
        shutil.rmtree(merged)
        return folder, facts | {"dtype": dtype, "runtime": _runtime("onnxruntime")}

    def _onnx(self, stage: Path) -> tuple[Path, dict[str, Any]]:
        folder, facts = self._graph(stage, self.settings.dtype)
        return folder, facts | self._proven_in_onnx(folder)

    def _int8(self, stage: Path) -> tuple[Path, dict[str, Any]]:
        from common.export import onnx_writer
        from common.models.onnx_runtime import OnnxModel

        graph, facts = self._graph(stage, "float32")
        float32 = self._speed(lambda: OnnxModel(str(graph)), [graph]) if self.settings.proves else None
        scales = self.settings.scales
        log(f"quantising to INT8, a scale for each {scales}")
        folder = _with_texts(graph, stage / "int8")
        onnx_writer.quantize(graph, folder, scales=scales, keep_lm_head=self.settings.keep_lm_head)
        proven = self._proven_in_onnx(folder)
        if float32:
            proven["proof"]["speed"]["float32_onnx"] = asdict(float32)
        return folder, facts | {"dtype": "int8", "scales": scales} | proven

    def _proven_in_onnx(self, folder: Path) -> dict[str, Any]:
        from common.export import onnx_writer
        from common.models.onnx_runtime import OnnxModel

        if not self.settings.proves:
            onnx_writer.mark_unproven(folder)
        return self._proven(lambda: OnnxModel(str(folder)), [folder])

    def _onnx_genai(self, stage: Path) -> tuple[Path, dict[str, Any]]:
        from common.export import genai_writer, onnx_writer
        from common.models.batching import context_of

        merged, facts = self._plain(stage)
        dtype = self.settings.dtype
        log(f"building for onnxruntime-genai, in {dtype}")
        folder = stage / "onnx_genai"
        context = context_of(models.load_config(str(self.settings.base)))
        genai_writer.write(merged, folder, dtype, self.tokenizer, self.stops, context)
        shutil.rmtree(merged)
        if not self.settings.proves:
            onnx_writer.mark_unproven(folder)
        facts |= {"dtype": dtype, "runtime": _runtime("onnxruntime-genai")}
        return folder, facts | self._proven_in_genai(folder)

    def _proven_in_genai(self, folder: Path) -> dict[str, Any]:
        """The proof of a folder that onnxruntime-genai has read as the same tokens."""
        from common.models.genai_model import GenaiModel

        if not self.settings.proves:
            return {unproven.RECORD_KEY: True}
        context = parity.context(self.tokenizer, self.proof_rows)
        alike = self._check_tokens(GenaiModel(folder, context).tokenize, "onnxruntime-genai")
        return {
            "proof": self._prove(lambda: GenaiModel(folder, context), [folder]) | {"prompts_tokenized_alike": alike}
        }

    def _gguf(self, stage: Path) -> tuple[Path, dict[str, Any]]:
        from common.export import gguf_writer

        merged, facts = self._plain(stage)
        quant = self.settings.quant
        log(f"writing GGUF, in {quant}")
        folder = stage / "gguf"
        folder.mkdir()
        file = folder / gguf_writer.file_name(quant)
        importance = self._importance(merged)
        marked = not self.settings.proves
        gguf_writer.write(merged, file, quant, self.tokenizer, self.stops, importance, self.task, unproven=marked)
        self._write_modelfile(folder, file.name)
        self._tell_lost_stops()
        facts |= {"dtype": quant, **self._imatrix_facts(), "runtime": _runtime("xllamacpp")}
        return folder, facts | self._proven_in_llama_cpp([file])

    def _gguf_lora(self, stage: Path) -> tuple[Path, dict[str, Any]]:
        """The adapter alone, proven on its base in GGUF, which is written for that and not kept."""
        from common.export import gguf_lora, gguf_writer

        quant = self.settings.quant
        log(f"writing the adapter{f', and its base in {quant} to prove it on' * self.settings.proves}")
        folder = stage / "gguf_lora"
        folder.mkdir()
        base = stage / f"base-{quant}.gguf"
        if self.settings.proves:
            gguf_writer.write(self.settings.base, base, quant, self.tokenizer, self.stops)
        adapter = folder / gguf_lora.ADAPTER_FILE
        gguf_lora.write(self.settings.model_dir, self.settings.base, adapter, unproven=not self.settings.proves)
        self._write_modelfile(folder, base.name, adapter.name)
        facts = {"merged_into": None, "dtype": "float32", "base_quant": quant, "runtime": _runtime("xllamacpp")}
        return folder, facts | self._proven_in_llama_cpp([base, adapter])

    def _proven_in_llama_cpp(self, files: Sequence[Path]) -> dict[str, Any]:
        """The proof of a model, and perhaps an adapter, that llama.cpp has read as the same tokens."""
        from common.models.gguf_model import GgufModel

        if not self.settings.proves:
            return {unproven.RECORD_KEY: True}
        context = parity.context(self.tokenizer, self.proof_rows)

        def load() -> GgufModel:
            return GgufModel(files[0], context, *files[1:])

        with contextlib.closing(load()) as model:
            alike = self._check_tokens(model.tokenize, "llama.cpp")
        return {"proof": self._prove(load, files) | {"prompts_tokenized_alike": alike}}

    def _imatrix_facts(self) -> dict[str, Any]:
        """ "imatrix": the rows that it was measured on."""
        rows = self.settings.imatrix
        if rows is None:
            return {}
        return {"imatrix": {"data": rows.path, "sha256": sha256_file(rows.path), "rows": len(rows.prompts)}}

    def _importance(self, merged: Path) -> dict[str, np.ndarray] | None:
        rows = self.settings.imatrix
        if rows is None:
            return None
        from common.export.importance import importance_of

        log(f"measuring what matters on {len(rows.prompts):,} rows of {rows.path}")
        return importance_of(merged, encode(self.tokenizer, rows))

    def _tell_lost_stops(self) -> None:
        """Say which tokens that end an answer a GGUF has no place for."""
        from common.export import gguf_vocabulary

        lost = gguf_vocabulary.other_stops(self.tokenizer, self.stops)[gguf_vocabulary.OTHER_STOPS :]
        if lost:
            names = ", ".join(self.tokenizer.convert_ids_to_tokens(lost))
            log(
                f"a GGUF has no place for {names}, at which answers end, too: Ollama stops there by the Modelfile, "
                "scripts and server here by a key of its own, llama.cpp only where it knows the token by its name"
            )

    def _write_modelfile(self, folder: Path, gguf_file: str, adapter: str | None = None) -> None:
        from common.export.modelfile import MODELFILE, modelfile
        from common.models.batching import context_of

        self.tokenizer.save_pretrained(folder)
        stop = list(dict.fromkeys(self.tokenizer.convert_ids_to_tokens(self.stops)))
        context = context_of(models.load_config(str(self.settings.base)))
        with atomic_write(folder / MODELFILE) as handle:
            handle.write(modelfile(self.tokenizer, gguf_file, stop, context, adapter))

    def _check_tokens(self, tokenize: Callable[[str], list[int]], runtime: str) -> str:
        """That a runtime reads the proof's prompts and answers, and awkward texts, as the same tokens; how many.

        Raises:
            UserError: it does not.
        """

        def other(texts: Iterable[str]) -> list[str]:
            return [text for text in texts if tokenize(text) != self._plain_ids(text)]

        asked = [[turn["content"] for turn in chats.as_turns(prompt)] for prompt in self.proof_rows.prompts]
        prompts = [other(texts) for texts in asked]
        wrong = [*other((*self.proof_rows.outputs, *PROBES)), *chain.from_iterable(prompts)]
        if wrong:
            raise UserError(
                f"{runtime} reads other tokens than the model was trained on, in {wrong[0][:60]!r} for one; choose "
                "another format"
            )
        return f"{prompts.count([])} of {len(prompts)}"

    def _plain_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def load(model_dir: str) -> tuple[Runtime, PreTrainedTokenizerBase]:
    """A run or an export of it in its own runtime, and its tokenizer."""
    from common.models.genai_model import GenaiModel, is_genai
    from common.models.onnx_runtime import OnnxModel, is_onnx
    from common.models.tokenizers import load_tokenizer

    if is_onnx(model_dir):
        return OnnxModel(model_dir), load_tokenizer(model_dir)
    if is_genai(model_dir):
        return GenaiModel(model_dir, MAX_BATCH_TOKENS), load_tokenizer(model_dir)
    if gguf_import.local_gguf(model_dir):
        packed = ModelSource(gguf_import.packed_folder(model_dir), engine=LLAMA_CPP)
        return models.load_gguf(packed, MAX_BATCH_TOKENS)
    model, tokenizer = models.load_for_inference(ModelSource(model_dir))
    return TorchRuntime(model), tokenizer


def _metric(proof: dict[str, Any]) -> float:
    return proof["metric"]["export"]["value"]


def weight_bytes(path: Path) -> int:
    """Of a model's file, or of all that are in its folder."""
    files = path.iterdir() if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.suffix in WEIGHTS)


def _with_texts(source: Path, target: Path) -> Path:
    """A new folder with all files of `source` but its weights: configs and tokenizer."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix not in WEIGHTS and path.name != merging.INDEX:
            shutil.copy(path, target / path.name)
    return target


def _runtime(package: str) -> str:
    """What a format is for, by name and version; without the version where nobody has proven it in one."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package
