"""Code by llama.cpp as a control of this toolkit's generation: the same GGUF, prompts and judge, pass@1 paired.

    python bench/code_control.py --gguf qwen2.5-coder-0.5b.gguf --data sanitized-mbpp.json --split all \\
        --report_dir runs/mbpp --confirm_run_unsafe_code
    llama-server --model qwen2.5-coder-0.5b.gguf --parallel 16 --ctx-size 16384 --port 8080
    python bench/code_control.py --gguf qwen2.5-coder-0.5b.gguf --data sanitized-mbpp.json --split all --slots 16 \\
        --url http://127.0.0.1:8080 --report_dir runs/mbpp --confirm_run_unsafe_code

llama.cpp (requirements/export.txt; or a llama-server that is running, as one built for this processor) reads the file
as it is, packed; this toolkit reads it as plain weights. Both get the same token ids, take the likeliest token each
time, and stop at the same ones. Answers and verdicts are kept in --report_dir, where
`eval_codegen.py --model_dir GGUF --report_dir ...` with the same settings finds this toolkit's, and leaves them. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import harness  # noqa: F401 (which finds the repository)

from common import cli, run_record
from common.data.resumable import AnswerStore, content_key
from common.files import sha256_file
from common.generation.decoding import Decoding
from common.generation.result import final_answer
from common.models import gguf_import, tokenizers
from common.models.batching import MAX_BATCH_TOKENS
from common.models.source import ModelSource
from common.tasks.codegen import evaluate
from common.tasks.codegen.flags import TOP_P
from common.tasks.codegen.rows import CodeProblem
from common.tasks.codegen.writer import CodeAnswer, style_of


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/code_control.py")
    parser.add_argument("--gguf", required=True, help="the model, which both read")
    parser.add_argument("--data", required=True, help="problems, as eval_codegen.py takes them")
    parser.add_argument("--split", choices=("validation", "dev", "all"), default="validation")
    parser.add_argument("--max_problems", type=cli.positive_int, help="a draw of this many problems")
    parser.add_argument("--max_new_tokens", type=cli.positive_int, default=512)
    parser.add_argument("--slots", type=cli.positive_int, default=8, help="answers that llama.cpp writes at a time")
    parser.add_argument("--threads", type=cli.positive_int, default=2, help="of llama.cpp; not with --url")
    parser.add_argument("--url", help="of a llama-server with --gguf and as many --slots; default: the wheel's")
    parser.add_argument("--max_batch_tokens", type=cli.positive_int, default=MAX_BATCH_TOKENS, help="of this toolkit")
    parser.add_argument("--report_dir", type=cli.folder, required=True, help="answers.jsonl goes here")
    parser.add_argument("--confirm_run_unsafe_code", action="store_true", help="yes, run it, in the sandbox")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    if not args.confirm_run_unsafe_code:
        raise cli.UserError("this runs code that a model wrote, in a sandbox; pass --confirm_run_unsafe_code")
    problems = evaluate.choose_problems(evaluate.Selection(args.data, args.split, args.max_problems))
    store = AnswerStore(Path(args.report_dir, "answers.jsonl"))
    evaluation = evaluate.Evaluation(problems, Decoding(args.max_new_tokens, top_p=TOP_P), [1], store)
    folder = gguf_import.model_folder(args.gguf)
    ours = evaluate.WriterSettings(ModelSource(folder), "auto", args.max_batch_tokens)

    started = time.perf_counter()
    judged = {"llama.cpp": evaluation.judge(control_answers(args, folder, problems, store))}
    seconds = {"llama.cpp": time.perf_counter() - started}
    started = time.perf_counter()
    judged["ours"] = evaluation.judge(evaluation.write_answers(ours, evaluate.DIRECT, ours.load))
    seconds["ours"] = time.perf_counter() - started

    rows = [
        {"name": name, "pass_at_1": evaluation.figures(samples)["pass_at_1"], "seconds": round(seconds[name], 1)}
        for name, samples in judged.items()
    ]
    same = sum(a[0].code == b[0].code for a, b in zip(judged["ours"], judged["llama.cpp"], strict=True))
    difference = evaluation.difference(judged["ours"], judged["llama.cpp"])["pass_at_1"]
    for row in rows:
        at = row["pass_at_1"]
        print(f"{row['name']}: pass@1 {at['value']:.3f} [{at['low']:.3f}, {at['high']:.3f}], {row['seconds']} s")
    print(
        f"ours - llama.cpp {difference['value']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}], "
        f"{same} of {len(problems)} answers are the same"
    )
    about = {"machine": run_record.machine(), "commit": run_record.git_commit(), "gguf_sha256": sha256_file(args.gguf)}
    result = {"rows": rows, "difference": difference, "same_answers": same, "n": len(problems)}
    print(json.dumps({"bench": "code_control", "settings": vars(args), **about, **result}))


def control_answers(
    args: argparse.Namespace, folder: str, problems: Sequence[CodeProblem], store: AnswerStore
) -> list[list[dict]]:
    """llama.cpp's answers, as `CodeAnswer` in JSON, [problem][0]; those in the store are not made again."""
    made_by = ["llama.cpp", sha256_file(args.gguf), args.max_new_tokens]
    keys = [content_key(*made_by, problem.prompt) for problem in problems]
    missing = [(key, problem.prompt) for key, problem in zip(keys, problems, strict=True) if key not in store]
    for key, answer in _written(args, folder, missing):
        store.add([(key, [asdict(answer)])])
    return [store[key] for key in keys]


def _written(
    args: argparse.Namespace, folder: str, tasks: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, CodeAnswer]]:
    if not tasks:
        return
    tokenizer = tokenizers.load_tokenizer(folder)
    style, _ = style_of(folder, tokenizer)
    prompts = [tokenizers.encode_prompt(tokenizer, style.direct(task)) for _, task in tasks]
    context = args.max_new_tokens + max(map(len, prompts))
    server = None if args.url else start_server(args.gguf, args.slots, context, args.threads)
    ask = partial(complete, args.url or server.listening_address, args.max_new_tokens)
    with ThreadPoolExecutor(args.slots) as pool, evaluate.progress_bar(len(tasks), "llama.cpp") as progress:
        texts = pool.map(ask, prompts)
        for (key, task), (text, finished, tokens) in zip(tasks, texts, strict=True):
            code, cut = style.read(task, final_answer(text), finished)
            yield key, CodeAnswer(code, "", finished, tokens, cut)
            progress.update()


def start_server(path: str, slots: int, context: int, threads: int) -> Any:
    """llama.cpp's server in this process.

    Args:
        context: tokens of a prompt and its answer.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise cli.UserError("llama.cpp is missing; pip install -r requirements/export.txt") from error
    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx, parameters.n_parallel = slots * (context + 8), slots
    parameters.warmup, parameters.verbosity = False, -1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(parameters)


def complete(url: str, max_new_tokens: int, prompt: Sequence[int]) -> tuple[str, bool, int]:
    """(text, whether it ended by itself, its tokens) of llama.cpp's server: the likeliest token each time.

    Raises:
        UserError: no server answers.
    """
    body: dict[str, Any] = {"prompt": list(prompt), "n_predict": max_new_tokens, "temperature": 0.0}
    request = urllib.request.Request(
        f"{url.rstrip('/')}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
    except OSError as error:
        raise cli.UserError(f"no llama-server answers at {url}: {cli.reason(error)}") from error
    return answer["content"], answer["stop_type"] == "eos", answer["tokens_predicted"]


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
