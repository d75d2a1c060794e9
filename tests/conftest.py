"""Tiny models that the tests build themselves: random weights, no network, nothing kept between runs."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are fastest so, and runs are comparable bit by bit

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared"
LABELS = ("Good", "Standard", "Bad")

CORPUS = [
    "Classify the credit mix of this customer as Good, Standard or Bad. Return only the label.\n\n"
    f"Age: {20 + i % 40}, Occupation: {job}, Annual Income: {1000 + 37.5 * i}, Outstanding Debt: {3 * i + 0.25}"
    for i, job in enumerate(["Scientist", "Lawyer", "Engineer", "Writer"] * 20)
]
# Prompts of unlike lengths, two rows a group.
PROMPTS = [CORPUS[i][: 60 + 8 * (i % 9)] for i in range(24)]
GROUPS = [f"{i // 2:016x}" for i in range(24)]


@pytest.fixture(scope="session")
def tokenizer():
    from common import miniature, tokenizers

    return tokenizers.align(miniature.build_tokenizer(CORPUS, vocab_size=420))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory, tokenizer) -> str:
    """A Qwen2-architecture model of random weights and its tokenizer, in a folder."""
    return build_base(tmp_path_factory.mktemp("models") / "tiny", tokenizer)


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer) -> str:
    """As `tiny_base`, with embeddings as large as a trained model's, so that an adapter can learn on it."""
    return build_base(tmp_path_factory.mktemp("models") / "base", tokenizer, embeddings=0.3)


def build_base(folder: Path, tokenizer, embeddings: float = 0.02, **shape: int) -> str:
    from common import miniature

    model = miniature.build_model(tokenizer, **({"hidden": 32, "layers": 2, "heads": 4, "seed": 0} | shape))
    model.get_input_embeddings().weight.data *= embeddings / 0.02
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: Iterable[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> dict[str, str]:
    """The same 24 rows for each trainer, as JSONL paths under "sft", "kd" and "dpo"."""
    folder = tmp_path_factory.mktemp("rows")
    answers = [LABELS[i % 3] for i in range(24)]
    facts = list(zip(PROMPTS, answers, GROUPS, strict=True))
    return {
        "sft": write_rows(folder / "sft.jsonl", [{"input": p, "output": a, "group": g} for p, a, g in facts]),
        "kd": write_rows(folder / "kd.jsonl", [{"input": p, "teacher_output": a, "group": g} for p, a, g in facts]),
        "dpo": write_rows(
            folder / "dpo.jsonl",
            [
                {"prompt": p, "chosen": LABELS[i % 2], "rejected": "Bad", "group": g}
                for i, (p, _, g) in enumerate(facts)
            ],
        ),
    }


def weights(folder: str | Path) -> dict:
    """The adapter's tensors by name."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter_model.safetensors")


def distance(one: str | Path, other: str | Path) -> float:
    """The largest difference between two adapters' weights."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def run_json(folder: str | Path) -> dict:
    return json.loads((Path(folder) / "run.json").read_text())


def join(children: Sequence, folder: Path) -> None:
    """Wait for the two of `spawn.ranks`, which must have done their work."""
    for rank, child in enumerate(children):
        child.join(120)
        assert child.exitcode == 0, (folder / f"rank{rank}.log").read_text()[-3000:]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def _child(main: Callable, argv: Sequence[str], log: str, file_size: int | None, environment: dict[str, str]) -> None:
    import resource

    from common import cli

    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.exit(cli.run(main, argv))


@functools.cache
def fork_server():
    """Where processes are forked from one that has the heavy imports: a start in some milliseconds."""
    context = multiprocessing.get_context("forkserver")
    trainers = ["transformers.trainer", "trl.trainer.dpo_trainer", "transformers.models.qwen2.modeling_qwen2"]
    context.set_forkserver_preload(["torch", "peft", "datasets", "matplotlib.figure", *trainers])
    return context


@pytest.fixture(scope="session")
def spawn():
    """`spawn(main, argv, log)` starts a script's main in a process of its own, forked from one that has the imports.

    With `file_size` no file can grow beyond that many bytes, as on a disk that is full. `ranks(main, argv, folder)`
    starts two that work together, as torchrun does.
    """
    context = fork_server()
    children: list = []

    def start(main: Callable, argv: Sequence[str], log: Path, file_size: int | None = None, **environment: str):
        child = context.Process(target=_child, args=(main, list(argv), str(log), file_size, environment))
        child.start()
        children.append(child)
        return child

    def ranks(main: Callable, argv: Sequence[str], folder: Path, **environment: str) -> list:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
        return [
            start(main, argv, folder / f"rank{rank}.log", RANK=str(rank), LOCAL_RANK=str(rank), **common)
            for rank in range(2)
        ]

    start.ranks = ranks
    yield start
    for child in children:
        if child.is_alive():
            child.kill()
        child.join()
