"""Speed of a run and of its exports, in turn: rows scored a second and greedy tokens a second, each in its own runtime.

    python bench/exports.py --model_dir runs/creditmix_sft exports/onnx exports/int8 exports/gguf \\
        --data data/creditmix_dev.jsonl

Rows are scored in batches (llama.cpp's one by one), text is written for one prompt at a time. Figures are medians of
the rounds; ratios are to the first model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bench is run by its path

from bench.turns import print_table, take_turns
from common import cli
from common.tasks import CREDITMIX

PROMPTS, TOKENS = 3, 64  # of the text that is timed


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/exports.py")
    parser.add_argument("--model_dir", required=True, nargs="+", help="the run, and folders that export_model.py made")
    parser.add_argument("--data", required=True, help="labelled rows")
    parser.add_argument("--rows", type=cli.positive_int, default=512)
    parser.add_argument("--rounds", type=cli.positive_int, default=5)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)

    from common import export, parity, tokenizers

    material = parity.read_material(args.data, CREDITMIX, "", args.rows)
    tables, score, write = {}, {}, {}
    for model_dir in args.model_dir:
        runtime, tokenizer = export.load(model_dir, lambda tokenizer: parity.longest(tokenizer, material) + TOKENS)
        ranker = runtime.ranker(tokenizer, CREDITMIX)
        prompts = [tokenizers.encode_prompt(tokenizer, prompt) for prompt in material.prompts[:PROMPTS]]
        ranker.raw_scores(material.texts[:8])

        def rows_per_s(ranker=ranker) -> float:
            started = time.perf_counter()
            ranker.raw_scores(material.texts)
            return len(material.texts) / (time.perf_counter() - started)

        def tokens_per_s(runtime=runtime, prompts=prompts) -> float:
            started = time.perf_counter()
            for prompt in prompts:
                runtime.generate([prompt], TOKENS, ())
            return len(prompts) * TOKENS / (time.perf_counter() - started)

        score[model_dir], write[model_dir] = rows_per_s, tokens_per_s
    for unit, contestants in (("rows", score), ("tokens", write)):
        tables[unit] = take_turns(contestants, args.rounds, unit)
        print_table(tables[unit], unit)
    ratios = {
        unit: {
            name: round(entry[f"{unit}_per_s"] / table[args.model_dir[0]][f"{unit}_per_s"], 2)
            for name, entry in table.items()
        }
        for unit, table in tables.items()
    }
    rows = [{"name": name, **{unit: table[name] for unit, table in tables.items()}} for name in args.model_dir]
    print(json.dumps({"bench": "exports", "settings": vars(args), "rows": rows, "ratios": ratios}))


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
