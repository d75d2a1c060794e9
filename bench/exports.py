"""Speed of a run and of its exports, in turn: rows scored a second and greedy tokens a second, each in its own runtime.

    python bench/exports.py --model_dir runs/creditmix_sft exports/onnx exports/int8 exports/gguf \\
        --data data/creditmix_dev.jsonl

Rows are scored in batches (llama.cpp's one by one), text is written for one prompt at a time. Figures are medians of
the rounds, after one that does not count; ratios are to the first model. The last line is JSON.

Each entry has its limit beside it, and `of_limit` is the share that is reached. Of text: one reading, for each token,
of as many bytes as the model's weights have, which no runtime can do without (a sum over a buffer, in turn with the
rest). A miniature is far from it: its weights fit the cache, and the calls take the time. Of rows: a bare forward pass
of the first torch model, its adapter merged, over the tokens in which rows differ; a faster runtime than torch and
weights of fewer bits may pass it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.interleave import print_table, take_turns

from bench.label_ranking import bare_forward
from common import cli
from common.models.batching import CPU_BATCH_TOKENS
from common.models.source import ModelSource
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.rankers import ranker_of

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

    from common.export import parity
    from common.export import pipeline as export
    from common.models import tokenizers

    proof_rows = parity.read_proof_rows(args.data, CREDITMIX, "", args.rows)
    turns: dict[str, dict[str, Callable[[], float]]] = {"rows": {}, "tokens": {}}
    limit_of: dict[tuple[str, str], str] = {}
    forward = ""  # the model whose bare forward pass is the limit
    for model_dir in args.model_dir:
        runtime, tokenizer = export.load(model_dir, lambda tokenizer: parity.longest(tokenizer, proof_rows) + TOKENS)
        ranker = ranker_of(getattr(runtime, "model", runtime), tokenizer, CREDITMIX)
        prompts = [tokenizers.encode_prompt(tokenizer, prompt) for prompt in proof_rows.prompts[:PROMPTS]]

        def score(ranker=ranker) -> None:
            ranker.raw_scores(proof_rows.texts)

        def write(runtime=runtime, prompts=prompts) -> None:
            for prompt in prompts:
                runtime.generate([prompt], TOKENS, ())

        turns["rows"][model_dir] = speed(len(proof_rows.texts), score)
        turns["tokens"][model_dir] = speed(len(prompts) * TOKENS, write)
        size = weight_bytes(model_dir, runtime)
        limit_of["tokens", model_dir] = f"{size / 1e6:,.1f} MB read"
        turns["tokens"][limit_of["tokens", model_dir]] = speed(
            len(prompts) * TOKENS, reading(size, len(prompts) * TOKENS)
        )
        if isinstance(runtime, parity.TorchRuntime) and not forward:
            forward = "bare forward"
            turns["rows"][forward] = speed(len(proof_rows.texts), merged_forward(model_dir, proof_rows.texts))
    limit_of |= {("rows", model_dir): forward for model_dir in args.model_dir if forward}

    rows = [{"name": model_dir} for model_dir in args.model_dir]
    ratios: dict[str, dict] = {"of_limit": {}}
    for unit, contestants in turns.items():
        table = take_turns(contestants, args.rounds, unit, warm_up=True)
        print_table(table, unit)
        speeds = {name: entry[f"{unit}_per_s"] for name, entry in table.items()}
        for row in rows:
            row[unit] = table[row["name"]]
            if limit := limit_of.get((unit, row["name"])):
                row[unit] |= {"limit_per_s": speeds[limit], "of_limit": round(speeds[row["name"]] / speeds[limit], 3)}
        ratios[unit] = {name: round(speeds[name] / speeds[args.model_dir[0]], 2) for name in args.model_dir}
        ratios["of_limit"][unit] = {row["name"]: row[unit].get("of_limit") for row in rows}
    print(json.dumps({"bench": "exports", "settings": vars(args), "rows": rows, "ratios": ratios}))


def speed(count: int, run: Callable[[], None]) -> Callable[[], float]:
    def turn() -> float:
        started = time.perf_counter()
        run()
        return count / (time.perf_counter() - started)

    return turn


def weight_bytes(model_dir: str, runtime) -> int:
    """Bytes of a model's weights: in memory for torch, else in its files."""
    from common.export import parity
    from common.export import pipeline as export

    if isinstance(runtime, parity.TorchRuntime):
        return runtime.model.get_memory_footprint()
    return sum(file.stat().st_size for file in Path(model_dir).iterdir() if file.suffix in export.WEIGHTS)


def reading(size: int, times: int) -> Callable[[], None]:
    """Reads `size` bytes so many times, with torch's vectorised sum: less work on a byte is hardly to be had."""
    import torch

    buffer = torch.ones(size // 4, device="cuda" if torch.cuda.is_available() else "cpu")

    def run() -> None:
        for _ in range(times):
            total = buffer.sum()
        total.item()

    return run


def merged_forward(model_dir: str, texts: Sequence[str]) -> Callable[[], None]:
    """The bare forward pass of bench/label_ranking.py, an adapter merged into its base."""
    from common.models import adapters
    from common.models import loading as models

    model, tokenizer = models.load_for_inference(ModelSource(model_dir))
    if adapters.is_adapter(model_dir):
        model = model.merge_and_unload()
    return bare_forward(model, tokenizer, texts, CPU_BATCH_TOKENS)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
