"""Fixtures: tiny models that the tests build themselves of random weights, and processes that share their imports."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support.http_server import free_port
from support.inputs import CORPUS, GROUPS, LABELS, PROMPTS, write_rows
from support.models import build_base
from support.pages import ARGUMENTS, BROWSERS
from support.processes import fork_server, run_child

from common.cli import prepare_process

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are fastest so, and runs are comparable bit by bit
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")  # costs exports of small models more than it saves
MODULES_FROZEN = [0]  # how many there were at the last `gc.freeze`

prepare_process()
gc.disable()  # until the tests are collected, which leaves what stays


def is_slow(item) -> bool:
    """Whether a test is of the tiers that `pytest` alone leaves out."""
    return any(map(item.get_closest_marker, ("processes", "exports")))


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """A test that starts a process or a browser by a fixture is of the tier `processes`.

    Each worker begins with its share of the slow files: what is left to be shared out in the end is quick.
    """
    for item in items:
        if not {"spawn", "browser"}.isdisjoint(item.fixturenames):
            item.add_marker("processes")
    found = yield
    slow = {item.path for item in items if is_slow(item)}
    kinds = [[item for item in items if (item.path in slow) is kind] for kind in (True, False)]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))  # xdist gives each as many consecutive tests

    def share(tests: list, worker: int) -> list:
        return tests[len(tests) * worker // workers : len(tests) * (worker + 1) // workers]

    if workers > 1:
        items[:] = [item for worker in range(workers) for tests in kinds for item in share(tests, worker)]
    return found


def pytest_collection_finish(session) -> None:
    MODULES_FROZEN[0] = len(sys.modules)
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session):
    """The process that others are forked from is forked itself before the first test; what it says is captured."""
    slow = list(filter(is_slow, session.items))
    if (slow and "support.served" in sys.modules) or any("spawn" in item.fixturenames for item in slow):
        capture = session.config.pluginmanager.getplugin("capturemanager")
        capture.resume_global_capture()
        fork_server()
        capture.suspend_global_capture()
    return (yield)


def pytest_runtest_setup(item) -> None:
    """What imports leave, millions of objects that stay, is looked through by no collection of garbage from then on.

    Each training collects three times, which takes a second where the libraries are in memory.
    """
    if len(sys.modules) > MODULES_FROZEN[0] + 100:
        MODULES_FROZEN[0] = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    from common.models import tokenizers
    from common.training import miniature

    return tokenizers.align(miniature.build_tokenizer(CORPUS, vocab_size=420))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory, tokenizer) -> str:
    """A Qwen2-architecture model of random weights and its tokenizer, in a folder."""
    return build_base(tmp_path_factory.mktemp("models") / "tiny", tokenizer)


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer) -> str:
    """As `tiny_base`, with embeddings as large as a trained model's, so that an adapter can learn on it."""
    return build_base(tmp_path_factory.mktemp("models") / "base", tokenizer, embeddings=0.3)


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


@pytest.fixture(scope="session")
def spawn():
    """`spawn(main, argv, log)` starts a script's main in a process of its own, forked from one that has the imports.

    With `file_size` no file can grow beyond that many bytes, as on a disk that is full. `ranks(main, argv, folder)`
    starts two that work together, as torchrun does.
    """
    context = fork_server()
    children: list = []

    def start(main: Callable, argv: Sequence[str], log: Path, file_size: int | None = None, **environment: str):
        child = context.Process(target=run_child, args=(main, list(argv), str(log), file_size, environment))
        child.start()
        children.append(child)
        return child

    def ranks(main: Callable, argv: Sequence[str], folder: Path, **environment: str) -> list:
        port = str(free_port())
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


@pytest.fixture
def stub(monkeypatch):
    """A chat API that misbehaves on demand."""
    from support.teacher import Stub

    from common.teachers import chat_endpoint

    monkeypatch.setattr(chat_endpoint, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running = Stub()
    yield running
    running.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield running
        running.close()
