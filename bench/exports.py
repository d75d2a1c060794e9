"""Speed of a run and of its exports, each in its own runtime, in turn: greedy tokens and ranked rows a second.

    python bench/exports.py --model_dir runs/creditmix_sft exports/onnx exports/int8 exports/gguf \\
        --data data/creditmix_dev.jsonl
    python bench/exports.py --model_dir runs/receipts exports/onnx exports/q4 --data data/idp_val.jsonl

Rows with a label are ranked, in batches (in llama.cpp one by one); of rows with `input` and `output` there is text
alone. Text is written for one prompt at a time, and for --together prompts at once, up to 64 tokens each, by what
infer_*.py and the server write it with; in ONNX Runtime and onnxruntime-genai as the proof does.
Figures are medians of the rounds, after one that does not count; ratios are to the first model. The last line is JSON.

Each entry has its limit beside it, and `of_limit` is the share that is reached. Of text: one reading, for each step,
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
from typing import TYPE_CHECKING

from harness.interleave import print_table, take_turns

from bench.label_ranking import bare_forward
from common import cli
from common.models.batching import CPU_BATCH_TOKENS
from common.models.source import ModelSource
from common.models.torch_runtime import Runtime, TorchRuntime
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.rankers import ranker_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALONE, TOKENS = 3, 64  # prompts that are answered one by one, and tokens of each answer, at most


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/exports.py")
    parser.add_argument("--model_dir", required=True, nargs="+", help="the run, and what export_model.py made of it")
    parser.add_argument("--data", required=True, help="labelled rows, or rows of input and output")
    parser.add_argument("--rows", type=cli.positive_int, default=512)
    parser.add_argument("--together", type=cli.positive_int, default=16, help="prompts that are answered at once")
    parser.add_argument("--rounds", type=cli.positive_int, default=5)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)

    from common.export import pipeline as export
    from common.export.proof_rows import encode, read_proof_rows

    proof_rows = read_proof_rows(args.data, CREDITMIX, "", max(args.rows, args.together))
    texts = proof_rows.texts[: args.rows]
    turns: dict[str, dict[str, Callable[[], float]]] = {"rows": {}, "tokens": {}, "tokens_together": {}}
    limit_of: dict[tuple[str, str], str] = {}
    forward = ""  # the model whose bare forward pass is the limit
    for model_dir in args.model_dir:
        runtime, tokenizer = export.load(model_dir)
        if proof_rows.task:
            ranker = ranker_of(getattr(runtime, "model", runtime), tokenizer, proof_rows.task)
            turns["rows"][model_dir] = ranking(ranker, texts)
            if isinstance(runtime, TorchRuntime) and not forward:
                forward = "bare forward"
                turns["rows"][forward] = speed(len(texts), merged_forward(model_dir, texts))
        prompts = [row.input_ids[: row.prompt_length] for row in encode(tokenizer, proof_rows)]
        size = weight_bytes(model_dir, runtime)
        for unit, batches in (
            ("tokens", [[prompt] for prompt in prompts[:ALONE]]),
            ("tokens_together", [prompts[: args.together]]),
        ):
            turns[unit][model_dir] = writing(runtime, tokenizer, batches)
            limit_of[unit, model_dir] = f"{size / 1e6:,.1f} MB read"
            tokens = sum(map(len, batches)) * TOKENS
            turns[unit][limit_of[unit, model_dir]] = speed(tokens, reading(size, len(batches) * TOKENS))
    limit_of |= {("rows", model_dir): forward for model_dir in args.model_dir if forward}

    rows = [{"name": model_dir} for model_dir in args.model_dir]
    ratios: dict[str, dict] = {"of_limit": {}}
    for unit, contestants in turns.items():
        if not contestants:
            continue
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


def ranking(ranker, texts: Sequence[str]) -> Callable[[], float]:
    """Rows ranked a second."""
    return speed(len(texts), lambda: ranker.raw_scores(texts))


def writing(
    runtime: Runtime, tokenizer: PreTrainedTokenizerBase, batches: Sequence[Sequence[Sequence[int]]]
) -> Callable[[], float]:
    """Tokens written a second: of greedy answers to batches of prompts, one after the other."""
    from common.generation import generate as generation
    from common.generation.decoding import Decoding
    from common.models import packed_weights
    from common.models.gguf_model import GgufModel

    if not isinstance(runtime, TorchRuntime | GgufModel):
        ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}

        def write(prompts: Sequence[Sequence[int]]) -> int:
            return sum(map(len, runtime.generate(prompts, TOKENS, ends)))
    else:
        model = getattr(runtime, "model", runtime)
        packs = isinstance(runtime, TorchRuntime) and len(batches[0]) > 1

        def write(prompts: Sequence[Sequence[int]]) -> int:
            if packs:  # as the scripts that write text have it; there is no way back, so not before
                packed_weights.allow(model)
            answers = generation.generate(model, tokenizer, prompts, Decoding(TOKENS))
            return sum(len(answer.tokens) for (answer,) in answers)

    def turn() -> float:
        started = time.perf_counter()
        tokens = sum(map(write, batches))
        return tokens / (time.perf_counter() - started)

    return turn


def speed(count: int, run: Callable[[], None]) -> Callable[[], float]:
    def turn() -> float:
        started = time.perf_counter()
        run()
        return count / (time.perf_counter() - started)

    return turn


def weight_bytes(model_dir: str, runtime) -> int:
    """Bytes of a model's weights: in memory for torch, else in its files."""
    from common.export import pipeline as export

    if isinstance(runtime, TorchRuntime):
        return runtime.model.get_memory_footprint()
    return export.weight_bytes(Path(model_dir))


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
