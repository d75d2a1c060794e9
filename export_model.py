# PYTHON_ARGCOMPLETE_OK
"""Export a run for where its users run models, with a proof that it still does what it did.

    python export_model.py --model_dir runs/creditmix_sft --format merged --save_dir runs/creditmix_sft_merged
    python export_model.py --model_dir runs/creditmix_sft --format onnx --save_dir exports/onnx
    python export_model.py --model_dir runs/creditmix_sft --format int8 --save_dir exports/int8
    python export_model.py --model_dir runs/creditmix_sft --format onnx_genai --save_dir exports/onnx_genai
    python export_model.py --model_dir runs/creditmix_sft --format gguf --quant Q4_K_M --save_dir exports/gguf
    python export_model.py --model_dir runs/creditmix_sft --format gguf_lora --save_dir exports/adapter

merged is a plain transformers folder, onnx and int8 are for ONNX Runtime, onnx_genai is for onnxruntime-genai, which
writes text by itself, gguf is for llama.cpp and Ollama (a Modelfile
lies beside it), gguf_lora is the adapter alone for llama.cpp's --lora and Ollama's ADAPTER. The proof runs the exported
files in that runtime, and the run itself, on --proof_data, by default the dev rows of the run's task: rows with a
label, documents or problems; or rows of input and output. It goes to export.json with the SHA-256 of every file. Where
the metric has fallen by more than --max_metric_drop, the exit code is 1 and the files are kept apart in
SAVE_DIR.rejected. The table goes to stdout, and last one JSON line. --no_proof leaves all of that out; the files and
their card then say that they are unproven.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from common import cli, run_record
from common.data import task_record
from common.export.formats import FORMATS, QUANTS, WITHOUT_LLAMA_CPP
from common.files import write_json
from common.models import adapters
from common.models import loading as models
from common.models.flags import parse_args
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.loading import load_task, mismatch, trained_for
from common.tasks.ranking.task import LabelTask

SCALES = ("block", "channel")
MAX_METRIC_DROP = 0.01
DEV_ROWS = {task_record.IDP: "data/idp_dev.jsonl", task_record.CODEGEN: "data/codegen_dev.jsonl"}
DTYPES = {
    "merged": ("float32", "bfloat16", "float16"),
    "onnx": ("float32", "float16"),
    "onnx_genai": ("int4", "int8", "float32"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="export_model.py")
    parser.add_argument("--model_dir", required=True, help="run folder: an adapter, or a whole model")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--save_dir", type=cli.folder, required=True, help="where the export goes")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --save_dir")
    parser.add_argument("--base", help="base of the adapter, where it has moved from where it was trained")
    parser.add_argument(
        "--load_in_4bit",
        choices=("auto", "on", "off"),
        default="auto",
        help="what an adapter is compared on: its base in NF4 or not; auto: as it was trained",
    )
    parser.add_argument(
        "--dtype", help="of merged (default: the base's own), onnx (float32, float16), onnx_genai (int4, int8, float32)"
    )
    parser.add_argument("--max_shard_gb", type=float, default=2.0, help="of one file of weights; bounds the memory")
    parser.add_argument("--quant", choices=QUANTS, help="of gguf, or of gguf_lora's base; default: Q8_0")
    parser.add_argument("--imatrix", metavar="DATA", help="of K-quants: rows as of --proof_data; which weights matter")
    parser.add_argument(
        "--scales",
        choices=SCALES,
        help="of int8: one for each 32 weights (the default: answers are closer, and a row's are its own), or for each "
        "channel, as quantize_dynamic has it",
    )
    parser.add_argument("--keep_lm_head", action="store_true", help="int8: leave the head in floating point")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument(
        "--confirm_run_unsafe_code",
        action="store_true",
        help="of a coder: yes, run what it writes for problems with tests, in the sandbox",
    )
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="put a proven export there; a new one is private")
    proof = parser.add_argument_group("proof")
    proof.add_argument("--task", metavar="FILE.yaml", help="the label set; default: that of the run, else CreditMix")
    proof.add_argument("--proof_data", help="rows to compare on; default: the task's dev rows, data/TASK_dev.jsonl")
    proof.add_argument("--proof_rows", type=cli.positive_int, help="so many of them, evenly spaced; default: all")
    proof.add_argument(
        "--max_metric_drop",
        type=float,
        help=f"a larger fall is rejected (default: {MAX_METRIC_DROP:g}); of text rows the share by which a token's "
        "likelihood falls",
    )
    proof.add_argument("--no_proof", action="store_true", help="compare nothing; the files say that they are unproven")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    check_flags(args)
    task = load_task(args.task) if args.task else trained_for(args.model_dir) or CREDITMIX
    data = None if args.no_proof else args.proof_data or default_rows(task, args)
    if data and not Path(data).is_file():
        raise cli.UserError(f"{data} does not exist; give rows to compare on with --proof_data")

    from common.export import model_card, needs, pipeline, proof_table, publish
    from common.export.proof_rows import read_proof_rows

    quant = args.quant or QUANTS[0]
    needs.check_runtime(args.format, args.model_dir, quant, proves=data is not None)
    if args.push_to_hub:
        publish.check(args.push_to_hub)
    base = pipeline.base_folder(args.model_dir, args.base, args.format)
    save_dir = Path(args.save_dir)
    files = {"--proof_data": data, "--imatrix": args.imatrix, "--task": args.task}
    pipeline.check_kept(save_dir, {"--model_dir": args.model_dir, "the base": base, **files})
    dtype = pipeline.own_dtype(base) if args.format == "merged" else DTYPES.get(args.format, ("float32",))[0]
    settings = pipeline.ExportSettings(
        format=args.format,
        model_dir=args.model_dir,
        base=base,
        four_bit=pipeline.trained_in_4bit(args.model_dir, args.load_in_4bit),
        dtype=args.dtype or dtype,
        quant=quant,
        scales=args.scales or SCALES[0],
        keep_lm_head=args.keep_lm_head,
        max_shard_bytes=int(args.max_shard_gb * 1e9),
        trust_remote_code=args.trust_remote_code,
        imatrix=args.imatrix
        and read_proof_rows(args.imatrix, task, args.model_dir, None, flag="--imatrix", runs_code=True),
        proof_rows=data
        and read_proof_rows(data, task, args.model_dir, args.proof_rows, runs_code=args.confirm_run_unsafe_code),
    )
    needs.check(settings, save_dir)
    with pipeline.staging(save_dir) as stage:
        folder, record = pipeline.Export(settings).make(stage)
        most = MAX_METRIC_DROP if args.max_metric_drop is None else args.max_metric_drop
        record |= proof_table.verdict(record, most)
        write_json(folder / pipeline.RECORD, record | run_record.provenance("export_model.py", argv))
        rejected = record["passed"] is False
        target = pipeline.rejected_dir(save_dir) if rejected else save_dir
        pipeline.put_in_place(folder, target)
    model_card.write(target, args.push_to_hub)
    print(proof_table.table(record))
    print(json.dumps({"export": args.format, "save_dir": str(target), **proof_table.summary(record)}))
    if rejected:
        cli.log(f"error: {proof_table.reason(record)}; the files are kept apart in {target}")
        return cli.FAILED
    if args.push_to_hub:
        publish.push(target, args.push_to_hub)
    return cli.DONE


def default_rows(task: LabelTask, args: argparse.Namespace) -> str:
    """The rows of a proof where none are given: the dev rows of what the run was trained for.

    Raises:
        UserError: the run was trained for something that has none.
    """
    record = task_record.read(args.model_dir)
    if record and record["kind"] in DEV_ROWS and not args.task:
        return DEV_ROWS[record["kind"]]
    if fault := mismatch(task, record):
        raise cli.UserError(
            f"{args.model_dir} {fault}; give rows of input and output like those of its training with --proof_data, or "
            "the label set that it was trained for with --task"
        )
    return f"data/{task.name}_dev.jsonl"


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    models.check_model_dir(args.model_dir, args.base, onnx=False)
    if args.dtype and args.dtype not in DTYPES.get(args.format, ()):
        those = "; ".join(f"{name}: {', '.join(dtypes)}" for name, dtypes in DTYPES.items())
        raise cli.UserError(f"--dtype {args.dtype} is not for --format {args.format}; there are {those}")
    if args.quant and args.format not in ("gguf", "gguf_lora"):
        raise cli.UserError(f"--quant is for --format gguf; leave it out with {args.format}")
    if args.imatrix and args.format != "gguf":
        raise cli.UserError(f"--imatrix is for --format gguf; leave it out with {args.format}")
    if args.imatrix and not Path(args.imatrix).is_file():
        raise cli.UserError(f"--imatrix {args.imatrix} does not exist; give rows of the task")
    for flag in ("scales", "keep_lm_head"):
        if getattr(args, flag) and args.format != "int8":
            raise cli.UserError(f"--{flag} is for --format int8; leave it out with {args.format}")
    if args.imatrix and (quant := args.quant or QUANTS[0]) in WITHOUT_LLAMA_CPP:
        others = " or ".join(sorted(set(QUANTS).difference(WITHOUT_LLAMA_CPP)))
        raise cli.UserError(f"--imatrix changes nothing in {quant}; leave it out, or give --quant {others}")
    if args.base and not adapters.is_adapter(args.model_dir):
        raise cli.UserError(f"--base is for an adapter, and {args.model_dir} is a whole model; leave it out")
    if not 0 < args.max_shard_gb < math.inf:
        raise cli.UserError("--max_shard_gb must be above 0")
    for flag in ("proof_data", "proof_rows", "max_metric_drop", "confirm_run_unsafe_code", "push_to_hub"):
        if args.no_proof and getattr(args, flag) is not None and getattr(args, flag) is not False:
            raise cli.UserError(f"--{flag} goes with a proof; leave it out, or --no_proof")
    if args.max_metric_drop is not None and not args.max_metric_drop >= 0:
        raise cli.UserError("--max_metric_drop must be 0 or above")
    save_dir = Path(args.save_dir)
    if save_dir.exists() and not args.overwrite:
        raise cli.UserError(
            f"{save_dir} is there already; pass --overwrite to replace it, or choose another --save_dir"
        )


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
