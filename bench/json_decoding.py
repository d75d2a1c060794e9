"""Constrained decoding speed: this toolkit's JSON grammar against xgrammar and outlines-core, in turn.

    python bench/json_decoding.py --tokenizer QWEN_TOKENIZER_DIR
    python bench/json_decoding.py --tokenizer QWEN_TOKENIZER_DIR --schemas cases.jsonl --limit 50

Every contestant compiles the same schemas and is then led through the same documents, token by token, over random
scores of the model's width. A step is what a decoding step costs beside the model: take the last token in, work out
which ones may come next, write -inf over the rest of one row of scores. `ours` also keeps watch on the token budget.
Peers that are not installed (requirements/bench.txt) are left out with a notice, documents that one of the contestants
does not let through are left out for all. Figures are per token over all rounds, after one that does not count.

`limit` writes -inf over one row of scores of the same width and does nothing else: no mask is laid on with less, as all
but a few columns have to be written. It knows no grammar. `of_limit` is this toolkit's share of its speed. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from harness.interleave import print_table, take_turns

from common import cli
from common.generation import json_schema, json_writer

VOCABULARY = 151_936  # columns of Qwen2.5's logits, to 3B
MONEY = {"type": "number", "minimum": 0}
INVOICE = {
    "type": "object",
    "properties": {
        "invoice_number": {"type": "string"},
        "date": {"type": "string", "format": "date"},
        "vendor": {"type": "string", "maxLength": 200},
        "currency": {"enum": ["USD", "EUR", "GBP", "CHF"]},
        "lines": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"description": {"type": "string"}, "quantity": {"type": "integer"}, "amount": MONEY},
                "required": ["description", "quantity", "amount"],
                "additionalProperties": False,
            },
        },
        "tax": {"anyOf": [MONEY, {"type": "null"}]},
        "total": MONEY,
    },
    "required": ["invoice_number", "date", "vendor", "currency", "lines", "total"],
    "additionalProperties": False,
}
DOCUMENT = {
    "invoice_number": "2025-0117/B",
    "date": "2025-10-01",
    "vendor": "Bäckerei Müller & Söhne GmbH",
    "currency": "EUR",
    "lines": [
        {"description": "Sourdough bread, 1 kg", "quantity": 12, "amount": 59.88},
        {"description": "Delivery (express)", "quantity": 1, "amount": 7.5},
    ],
    "tax": 4.72,
    "total": 72.1,
}
Step = Callable[[int | None], None]  # takes the last token in, masks the row for the next one
Grammar = Callable[[], Step]  # starts a document


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/json_decoding.py")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder; Qwen2.5's for the published figures")
    parser.add_argument("--schemas", help='JSONL of {"schema", "tests": [{"valid", "data"}]}; default: an invoice')
    parser.add_argument("--limit", type=cli.positive_int, help="the first so many schemas")
    parser.add_argument("--columns", type=cli.positive_int, default=VOCABULARY, help="width of the scores")
    parser.add_argument("--rounds", type=cli.positive_int, default=5)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    cases = read_cases(args.schemas, args.limit) if args.schemas else [(INVOICE, DOCUMENT)]

    import torch

    from common.models import tokenizers

    torch.set_num_threads(1)
    tokenizer = tokenizers.load_tokenizer(args.tokenizer)
    scores = torch.randn(1, args.columns)
    contestants = all_contestants(tokenizer, scores)
    documents = []
    started = {name: [] for name in contestants}  # seconds to compile and to the first mask, of every schema
    for schema, value in cases:
        tokens = tokenizer.encode(json_writer.dumps(value, schema), add_special_tokens=False)
        grammars = {name: try_out(compiler, schema, tokens, started[name]) for name, compiler in contestants.items()}
        if refused := [name for name, grammar in grammars.items() if grammar is None]:
            cli.log(f"left out, refused by {', '.join(refused)}: {json.dumps(schema)[:80]}")
        else:
            documents.append((tokens, grammars))
    if not documents:
        raise cli.UserError("no document is let through by all contestants; give other --schemas")

    times: dict[str, list[float]] = {name: [] for name in contestants}

    def timed(name: str) -> Callable[[], float]:
        def turn() -> float:
            steps = []
            for tokens, grammars in documents:
                step = grammars[name]()
                step(None)
                for token in tokens:
                    begun = time.perf_counter()
                    step(token)
                    steps.append(time.perf_counter() - begun)
            times[name] += steps
            return len(steps) / sum(steps)

        return turn

    for name in contestants:  # warm up, and forget it
        timed(name)()
        times[name].clear()
    table = take_turns({name: timed(name) for name in contestants}, args.rounds, "tokens")
    for name, entry in table.items():
        percentiles = statistics.quantiles(times[name], n=100)
        entry["p50_us"], entry["p99_us"] = round(percentiles[49] * 1e6, 1), round(percentiles[98] * 1e6, 1)
        compiling, first = zip(*started[name], strict=True)
        entry["compile_ms"] = round(statistics.median(compiling) * 1e3, 2)
        entry["first_mask_ms"] = round(statistics.median(first) * 1e3, 2)
        entry["schemas"] = len(compiling)
    print_table(table, "tokens")
    speeds = {name: entry["tokens_per_s"] for name, entry in table.items()}
    ratios = {f"vs_{name}": round(speeds["ours"] / speed, 2) for name, speed in speeds.items() if name in PEERS}
    ratios["of_limit"] = round(speeds["ours"] / speeds["limit"], 3)
    of_p50 = {f"vs_{name}": round(table["ours"]["p50_us"] / table[name]["p50_us"], 2) for name in list(table)[1:]}
    rows = [{"name": name, **entry} for name, entry in table.items()]
    result = {"bench": "json_decoding", "settings": vars(args), "documents": len(documents), "rows": rows}
    print(json.dumps({**result, "ratios": ratios, "ratios_of_p50": of_p50}))


def all_contestants(tokenizer, scores) -> dict[str, Callable[[Any], Grammar]]:
    """This toolkit, the limit, and those of `PEERS` that are installed."""
    contestants: dict[str, Callable[[Any], Grammar]] = {"ours": ours(tokenizer, scores), "limit": limit(scores)}
    for name, (package, compiler) in PEERS.items():
        if importlib.util.find_spec(package):
            contestants[name] = compiler(tokenizer, scores)
        else:
            cli.log(f"{package} is not installed and left out; pip install -r requirements/bench.txt")
    return contestants


def read_cases(path: str, limit: int | None) -> list[tuple[Any, Any]]:
    """The schemas that are enforced in full, each with the first of its valid instances."""
    cases = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            case = json.loads(line)
            valid = [test["data"] for test in case["tests"] if test["valid"]]
            try:
                enforced = json_schema.preflight(case["schema"]).enforced
            except cli.UserError:
                continue
            if valid and enforced:
                cases.append((case["schema"], valid[0]))
    return cases[:limit]


def try_out(
    compiler: Callable[[Any], Grammar], schema: Any, tokens: list[int], started: list[tuple[float, float]]
) -> Grammar | None:
    """A contestant's grammar, if it lets the document through; notes the seconds of compiling and of the first mask."""
    try:
        begun = time.perf_counter()
        grammar = compiler(schema)
        compiled = time.perf_counter()
        step = grammar()
        step(None)
        started.append((compiled - begun, time.perf_counter() - compiled))
        for token in tokens:
            step(token)
    except (RuntimeError, ValueError, cli.UserError):
        return None
    return grammar


def ours(tokenizer, scores) -> Callable[[Any], Grammar]:
    from common.generation.json_grammar import JsonGrammar, JsonRow

    JsonGrammar({}, tokenizer, scores.shape[1])  # takes the vocabulary in, once

    def compiler(schema: Any) -> Grammar:
        grammar = JsonGrammar(json_schema.preflight(schema).grammar_schema, tokenizer, scores.shape[1])

        def start() -> Step:
            row = JsonRow(grammar, 4096)

            def step(token: int | None) -> None:
                if token is not None:
                    row.consume(token)
                JsonRow.change_all([row], scores)

            return step

        return start

    return compiler


def limit(scores) -> Callable[[Any], Grammar]:
    def step(token: int | None) -> None:
        scores.fill_(float("-inf"))

    return lambda schema: lambda: step


def xgrammar(tokenizer, scores) -> Callable[[Any], Grammar]:
    import xgrammar

    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=scores.shape[1])
    engine = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    bitmask = xgrammar.allocate_token_bitmask(1, scores.shape[1])

    def compiler(schema: Any) -> Grammar:
        text = json.dumps(schema)
        compiled = engine.compile_json_schema(text, any_whitespace=False, separators=(",", ":"), strict_mode=False)

        def start() -> Step:
            matcher = xgrammar.GrammarMatcher(compiled)

            def step(token: int | None) -> None:
                if token is not None and not matcher.accept_token(token):
                    raise ValueError(f"token {token} is refused")
                matcher.fill_next_token_bitmask(bitmask)
                xgrammar.apply_token_bitmask_inplace(scores, bitmask)

            return step

        return start

    return compiler


def outlines(tokenizer, scores) -> Callable[[Any], Grammar]:
    import outlines_core
    from outlines_core.kernels.torch import allocate_token_bitmask, apply_token_bitmask_inplace
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}  # of byte-level BPE
    words: dict[bytes, list[int]] = {}
    for word, token in tokenizer.get_vocab().items():
        if token not in tokenizer.added_tokens_decoder:
            words.setdefault(bytes(byte_of[character] for character in word), []).append(token)
    vocabulary = outlines_core.Vocabulary(tokenizer.eos_token_id, words)
    bitmask = allocate_token_bitmask(scores.shape[1])
    apply_token_bitmask_inplace(scores, bitmask)  # its torch.compile takes most of a minute, once

    def compiler(schema: Any) -> Grammar:
        pattern = outlines_core.json_schema.build_regex_from_schema(json.dumps(schema), whitespace_pattern="")
        index = outlines_core.Index(pattern, vocabulary)

        def start() -> Step:
            guide = outlines_core.Guide(index)

            def step(token: int | None) -> None:
                if token is not None:
                    guide.advance(token, return_tokens=False)
                guide.write_mask_into(bitmask.data_ptr(), bitmask.numel(), bitmask.element_size())
                apply_token_bitmask_inplace(scores, bitmask)

            return step

        return start

    return compiler


PEERS = {"xgrammar": ("xgrammar", xgrammar), "outlines": ("outlines_core", outlines)}  # name: (package, compiler)

if __name__ == "__main__":
    raise SystemExit(cli.run(main))
