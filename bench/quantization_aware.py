"""What quantisation by torchao costs a model in macro-F1 and NLL, trained with and without --quantization_aware.

    python bench/quantization_aware.py --model_dir runs/plain runs/qat --kind int8 --data data/creditmix_dev.jsonl

Whole models are meant (sft_train.py --lora_r 0, the second with --quantization_aware int8). The same for ONNX Runtime's
INT8 is in the proof of export_model.py --format int8. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import harness  # noqa: F401 (which finds the repository)

from common import cli
from common.models import adapters
from common.models import loading as models
from common.models.source import ModelSource
from common.tasks.ranking.creditmix import CREDITMIX
from common.training import quantization_aware


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/quantization_aware.py")
    parser.add_argument("--model_dir", required=True, nargs="+", help="whole models")
    parser.add_argument("--kind", choices=quantization_aware.KINDS, default="int8")
    parser.add_argument("--data", required=True, help="labelled rows")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    for model_dir in args.model_dir:
        models.check_model_dir(model_dir)
        if adapters.is_adapter(model_dir):
            raise cli.UserError(f"{model_dir} is an adapter; give a whole model, trained with --lora_r 0 or merged")

    from common.export.proof_rows import ProofRows, read_proof_rows
    from common.tasks.ranking import metrics
    from common.tasks.ranking.calibration import Calibration, Scores
    from common.tasks.ranking.torch_ranker import TorchRanker

    def judge(model, tokenizer, proof_rows: ProofRows) -> Scores:
        ranker = TorchRanker(model, tokenizer, CREDITMIX)
        calibration = proof_rows.calibration or Calibration(CREDITMIX.labels, "prior", tuple(ranker.prior()))
        return calibration.apply(ranker.raw_scores(proof_rows.texts))

    rows = []
    for model_dir in args.model_dir:
        proof_rows = read_proof_rows(args.data, CREDITMIX, model_dir, None)
        model, tokenizer = models.load_for_inference(ModelSource(model_dir, load_in_4bit="off", dtype="float32"))
        exact = judge(model, tokenizer, proof_rows)
        rounded = judge(quantization_aware.quantized(model, args.kind), tokenizer, proof_rows)
        y, groups = proof_rows.y, proof_rows.groups
        before, after = (metrics.evaluate(scores, y, CREDITMIX.labels, groups=groups) for scores in (exact, rounded))
        change = metrics.compare(rounded, exact, y, groups)
        row: dict = {"name": model_dir, "same_labels": float((exact.predictions == rounded.predictions).mean())}
        print(f"{model_dir}: {row['same_labels']:.2%} of {len(y):,} labels are the same")
        for name in ("macro_f1", "nll"):
            row[name] = {"float32": before[name], args.kind: after[name], "change": change[name]}
            was, now, by = before[name]["value"], after[name]["value"], change[name]
            interval = f"{by['value']:+.4f}, {by['low']:+.4f} to {by['high']:+.4f}"
            print(f"  {name:8} {was:.4f}, {args.kind} {now:.4f} ({interval})")
        rows.append(row)
    settings = {"kind": args.kind, "data": args.data, "n": len(y)}
    print(json.dumps({"bench": "quantization_aware", "settings": settings, "rows": rows}))


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
