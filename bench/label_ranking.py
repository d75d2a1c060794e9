"""Label-ranking speed: this toolkit's ranker against the naive scorer, lm-evaluation-harness, vLLM and the limit.

    python bench/label_ranking.py --model models/tiny_student --data data/creditmix_val.jsonl --rows 512
    python bench/label_ranking.py --shape 0.5b --layers 4 --tokenizer QWEN_TOKENIZER_DIR --dtype bfloat16 --rows 48
    python bench/label_ranking.py --model Qwen/Qwen2.5-3B-Instruct --dtype bfloat16 --data data/creditmix_val.jsonl \\
        --vllm_python .venv-gpu-peers/bin/python

Contestants, on the same rows and labels: one full forward pass per row, label and form (`naive`);
lm-evaluation-harness's HF model class on the same token ids (`lm_eval`, where it is installed: pip install -r
requirements/bench.txt); transformers' own pipeline("decision"), with its generic prompt, where labels are single tokens
(`decision`); the ranker (`ours`); the ranker on rows that come one by one, as a server's do, behind the start that is
kept (`single`) and from their first token on (`single_whole`); and a bare forward pass over the tokens in which the
rows differ, unpadded, head at one position (`limit`). Weights are in --dtype, not in 4 bits. They take turns; figures
are rows a second, the median of the rounds, after one that does not count. The last line is JSON.

`vllm` is vLLM's offline engine with its prefix cache, on a plain model (merge an adapter first), where a Python has it:
python -m venv .venv-gpu-peers, then .venv-gpu-peers/bin/pip install -r requirements/bench-gpu.txt, as its pins are not
this toolkit's. It asks for one token at every place where labels part, with the log-probabilities of those that may
come there. Its scores have to be this toolkit's to TOLERANCE, else it is left out. It has not been run against the
real one (see bench/gpu_peers.py).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from harness.interleave import leave_out, print_table, take_turns

from bench.gpu_peers import Peer, python_of
from common import cli
from common.models import adapters
from common.models import loading as models
from common.models.source import ModelSource
from common.tasks.ranking import creditmix
from common.tasks.ranking.creditmix import CREDITMIX

if TYPE_CHECKING:
    import numpy as np

    from common.tasks.ranking.label_tree import LabelTree
    from common.tasks.ranking.ranker import Ranker

SHAPES = {  # hidden, intermediate, layers, heads, key/value heads: Qwen2.5's
    "0.5b": (896, 4864, 24, 14, 2),
    "3b": (2048, 11008, 36, 16, 2),
}
VOCABULARY = 151_936
TOLERANCE = {"float32": 0.01, "bfloat16": 0.1}  # nats by which a peer's scores may differ


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/label_ranking.py")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a model folder, a run folder or a Hub id")
    what.add_argument("--shape", choices=tuple(SHAPES), help="random weights of Qwen2.5's shape; needs --tokenizer")
    parser.add_argument("--tokenizer", help="tokenizer folder for --shape")
    parser.add_argument("--layers", type=cli.positive_int, help="fewer layers than the shape has")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--data", help="labelled rows; default: synthetic ones")
    parser.add_argument("--rows", type=cli.positive_int, default=256)
    parser.add_argument("--naive_rows", type=cli.positive_int, default=16, help="rows the naive scorer is timed on")
    parser.add_argument("--rounds", type=cli.positive_int, default=3)
    parser.add_argument("--max_batch_tokens", type=cli.positive_int, help="of all contestants; default: as the ranker")
    parser.add_argument("--vllm_python", metavar="PYTHON", help="the Python that has vllm; default: this one")
    parser.add_argument("--vllm_memory", type=cli.fraction, default=0.4, help="share of the card that vLLM may take")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    if args.shape and not args.tokenizer:
        raise cli.UserError("--shape needs --tokenizer with the folder of a Qwen2.5 tokenizer")
    if args.data:
        rows, _ = creditmix.read_labelled(args.data)
    else:
        rows = creditmix.synthesize(max(args.rows, 300), seed=0)
    texts = [creditmix.clean_features(row["question"]) for row in rows][: args.rows]

    import numpy as np

    from common.tasks.ranking.torch_ranker import TorchRanker, naive_scores

    model, tokenizer = load(args)
    ranker = TorchRanker(model, tokenizer, CREDITMIX)
    args.max_batch_tokens = ranker.max_batch_tokens = args.max_batch_tokens or ranker.max_batch_tokens
    few = texts[: args.naive_rows]
    contestants: dict[str, tuple[int, Callable[[], object]]] = {
        "naive": (len(few), lambda: naive_scores(model, tokenizer, CREDITMIX, few)),
        "ours": (len(texts), lambda: ranker.raw_scores(texts)),
        "single": (len(few), one_by_one(TorchRanker(model, tokenizer, CREDITMIX), few, kept=True)),
        "single_whole": (len(few), one_by_one(TorchRanker(model, tokenizer, CREDITMIX), few, kept=False)),
        "limit": (len(texts), bare_forward(model, tokenizer, texts, args.max_batch_tokens)),
    }
    if importlib.util.find_spec("lm_eval"):
        contestants["lm_eval"] = (len(texts), harness(args, model, tokenizer, texts))
    if decide := decision_pipeline(model, tokenizer, few):
        contestants["decision"] = (len(few), decide)
    scores = ranker.raw_scores(texts)
    exact, ranked = naive_scores(model, tokenizer, CREDITMIX, few), scores[: len(few)]

    turns = {name: timed(*contestant) for name, contestant in contestants.items()}
    with contextlib.ExitStack() as stack:
        if turn := vllm(args, ranker, texts, scores, stack):
            turns["vllm"] = turn
        table = take_turns(turns, args.rounds, "rows", warm_up=True, peers=("vllm",))
    print_table(table, "rows")
    medians = {name: entry["rows_per_s"] for name, entry in table.items()}
    peers = [peer for peer in ("naive", "lm_eval", "decision", "vllm") if peer in medians]
    ratios = {f"vs_{peer}": round(medians["ours"] / medians[peer], 2) for peer in peers}
    ratios["single_vs_whole"] = round(medians["single"] / medians["single_whole"], 2)
    ratios["of_limit"] = round(medians["ours"] / medians["limit"], 3)
    agreement = {
        "max_difference": float(np.abs(exact - ranked).max()),
        "same_winner": float((exact.argmax(1) == ranked.argmax(1)).mean()),
    }
    settings = {**vars(args), "parameters": model.num_parameters()}
    rows = [{"name": name, **entry} for name, entry in table.items()]
    result = {"bench": "label_ranking", "settings": settings, "rows": rows, "ratios": ratios, "vs_naive": agreement}
    print(json.dumps(result))


def one_by_one(ranker: Ranker, texts: Sequence[str], *, kept: bool) -> Callable[[], object]:
    """Ranks rows that come by themselves, as a server has them; without `kept`, each from its first token on."""
    ranker.one_by_one = kept
    return lambda: [ranker.raw_scores([text]) for text in texts]


def timed(count: int, run: Callable[[], object]) -> Callable[[], float]:
    """A turn of `run`, which scores `count` rows: its rows a second."""

    def turn() -> float:
        started = time.perf_counter()
        run()
        return count / (time.perf_counter() - started)

    return turn


def load(args: argparse.Namespace):
    """(model in eval mode, tokenizer) of --model or --shape."""
    import torch

    from common.models import tokenizers

    if args.model:
        return models.load_for_inference(ModelSource(args.model, load_in_4bit="off", dtype=args.dtype))
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden, intermediate, layers, heads, groups = SHAPES[args.shape]
    tokenizer = tokenizers.load_tokenizer(args.tokenizer)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=args.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).to(getattr(torch, args.dtype)).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def bare_forward(model, tokenizer, texts: Sequence[str], max_batch_tokens: int) -> Callable[[], None]:
    """The limit: rows of equal length together, only the tokens after the shared start, head at the last position.

    It has no prefix to attend to and so computes no useful scores: it only counts what cannot be saved.
    """
    import torch

    from common.models import tokenizers

    prompts = [tokenizers.encode_prompt(tokenizer, CREDITMIX.prompt(text)) for text in texts]
    shared = 0
    while len({tuple(prompt[: shared + 1]) for prompt in prompts}) == 1:
        shared += 1
    by_length: dict[int, list[list[int]]] = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt) - shared, []).append(prompt[shared:])
    batches = []
    for length, rows in by_length.items():
        size = max(1, max_batch_tokens // length)
        batches += [torch.tensor(rows[i : i + size], device=model.device) for i in range(0, len(rows), size)]

    def run() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(input_ids=batch, use_cache=False, logits_to_keep=1)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def harness(args: argparse.Namespace, model, tokenizer, texts: Sequence[str]) -> Callable[[], None]:
    """lm-evaluation-harness on the same token ids: every surface form of every label of every row is a request."""
    from lm_eval.models.huggingface import HFLM

    from common.models import tokenizers
    from common.tasks.ranking.label_tree import label_tokens

    batch = max(1, args.max_batch_tokens // 128)
    peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=str(model.device))
    forms = [form for label in label_tokens(tokenizer, CREDITMIX) for word in label for form in word]
    requests = []
    for text in texts:
        prompt = tokenizers.encode_prompt(tokenizer, CREDITMIX.prompt(text))
        requests += [((text, str(form)), prompt, form) for form in forms]
    return lambda: peer._loglikelihood_tokens(requests, disable_tqdm=True)


def decision_pipeline(model, tokenizer, texts: Sequence[str]) -> Callable[[], object] | None:
    """transformers' decision pipeline, which reads the next-token logits of the labels; None where they do not fit."""
    import copy

    from transformers import DecisionConfig, pipeline

    if any(len(tokenizer.encode(label, add_special_tokens=False)) > 1 for label in CREDITMIX.labels):
        cli.log('pipeline("decision") left out: it needs labels of one token each')
        return None
    config = DecisionConfig(labels={"choice": list(CREDITMIX.labels)})
    own = copy.deepcopy(tokenizer)  # it adds tokens of its own
    decide = pipeline("decision", model=model, tokenizer=own, decision_config=config)
    choice = {label: label for label in CREDITMIX.labels}
    question = {"type": "choice", "instructions": CREDITMIX.instruction, "criteria": choice}
    requests = [{"state": text, "questions": {"label": question}} for text in texts]
    return lambda: decide(requests)


def vllm(
    args: argparse.Namespace, ranker: Ranker, texts: Sequence[str], scores: np.ndarray, stack: contextlib.ExitStack
) -> Callable[[], float] | None:
    """A turn of vLLM, started on `stack`; None where it cannot take part or does not find the ranker's scores."""
    from common.models import tokenizers

    python = python_of("vllm", args.vllm_python)
    if python is None or not args.model or adapters.is_adapter(args.model):
        cli.log("vllm left out: " + ("it needs a plain model" if python else "it is not installed; see --help"))
        return None
    tree = ranker.tree
    nodes = [{"path": [], "next": []} for _ in tree.parents]
    for number in range(1, len(nodes)):
        nodes[number]["path"] = nodes[tree.parents[number]]["path"] + [tree.tokens[number]]
    pairs = sorted({pair for words in tree.forms for forms in words for form in forms for pair in form})
    for node, token in pairs:
        nodes[node]["next"].append(token)
    settings = {
        "model": args.model,
        "dtype": args.dtype,
        "gpu_memory_utilization": args.vllm_memory,
        "prompts": [tokenizers.encode_prompt(ranker.tokenizer, CREDITMIX.prompt(text)) for text in texts],
        "nodes": nodes,
    }
    try:
        peer = stack.enter_context(Peer(python, "vllm", settings))
        difference = float(abs(tree_scores(tree, nodes, peer.turn()["logprobs"]) - scores).max())
        if not difference <= TOLERANCE[args.dtype]:
            raise ValueError(f"its scores differ by up to {difference:.3g} nats, more than {TOLERANCE[args.dtype]:g}")
    except Exception as error:
        leave_out("vllm", error)
        return None
    cli.log(f"vllm's scores differ from ours by at most {difference:.3g} nats")
    return lambda: len(texts) / peer.turn()["seconds"]


def tree_scores(tree: LabelTree, nodes: Sequence[dict], logprobs: Sequence) -> np.ndarray:
    """Raw scores [rows, labels] of log-probabilities [row][node][next token]."""
    import numpy as np

    logprobs_of = {
        (number, token): np.array([row[number][index] for row in logprobs])
        for number, node in enumerate(nodes)
        for index, token in enumerate(node["next"])
    }
    aggregate = np.max if CREDITMIX.aggregate == "max" else np.mean
    scores = []
    for words in tree.forms:
        of_words = [
            np.max([np.mean([logprobs_of[pair] for pair in form], axis=0) for form in forms], axis=0) for forms in words
        ]
        scores.append(aggregate(of_words, axis=0))
    return np.stack(scores, axis=1)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
