"""The inference server's start and end, and models' processes that die."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.http_server import Client, free_port
from support.inputs import LABELS, ROOT
from support.models import build_base
from support.processes import wait_for
from support.served import (
    NAMES,
    ROWS,
    chat_turn,
    make_run,
    same,
    serve,
    settings,
)

from common.data import task_record
from common.models.source import ModelSource
from common.serving import adapter_host, model_process, routes, server
from common.serving.batch_queue import QueuedRequest
from common.serving.messages import Abandoned, State
from common.serving.model_process import Pending
from common.serving.run_registry import Registry, Version
from common.serving.view import View
from common.serving.work import Classify
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.creditmix import CREDITMIX
from common.web.app import Problem

pytestmark = pytest.mark.processes


def test_a_second_start_computes_no_prior(own):
    for name in NAMES[1:]:  # whose priors are subtracted, as they were trained for another task
        task_record.write(own / f"creditmix_{name}", task_record.of_prompts(task_record.ROWS, "rows", []))
    with serve(own) as served:
        assert served.refused(503, "/readyz", None, "GET").endswith("PRELOAD=1 loads it at the start")
        for name in NAMES:
            served.post(f"/infer/{name}", {"features": ROWS[0]})
        assert served.ask("GET", "/readyz")[1] == {"status": "ready"}
    made_up = dict(zip(LABELS, (-1.0, -2.0, -4.0), strict=True))
    for name in NAMES[1:]:  # what a computed prior would not be
        file = own / f"creditmix_{name}" / "prior.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"prior": made_up}))
    with serve(own, preload=True) as served:
        assert served.ask("GET", "/healthz")[1] == {"status": "alive"}
        wait_for(lambda: served.ask("GET", "/readyz")[0] == 200)
        (process,) = served.processes
        assert list(process.state.views.values()) == [True] * 4
        for name in NAMES[1:]:
            assert served.post(f"/infer/{name}", {"features": ROWS[0]})["prior"] == made_up


def test_a_base_that_comes_later_is_loaded_all_the_same(base, tmp_path, monkeypatch):
    """Nobody sends a request to a pod that is not ready: it has to see by itself that the runs are there now."""
    monkeypatch.setattr(server, "PRELOAD_AGAIN", 0.1)
    place = tmp_path / "later"
    with serve(tmp_path, preload=True, base_model=str(place)) as served:
        wait_for(lambda: "tried again" in served.refused(503, "/readyz", None, "GET"))
        shutil.copytree(base, place)
        wait_for(lambda: served.ask("GET", "/readyz")[0] == 200)


def test_a_base_that_the_hub_does_not_give_is_one_sentence(monkeypatch):
    """The Hub is asked once, before anything reads a config from it."""
    monkeypatch.setattr(adapter_host.vram, "before_serving", lambda *args, **more: pytest.fail("asked again"))
    sent = []
    host = adapter_host.Host("some/model", settings("none").host, 0, SimpleNamespace(send=sent.append))
    host._closing = True
    host.serve()
    (broken,) = sent
    assert broken.reason.startswith("some/model cannot be had from the Hub: this machine is offline")


def test_the_prior_of_a_base_without_a_folder_is_kept_beside_the_runs(tmp_path):
    host = SimpleNamespace(settings=settings(tmp_path).host)
    version = Version("base", "Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct", "0" * 64, ())
    folder = View(host, version, None, None).prior_dir()
    assert folder == tmp_path / ".priors" / "Qwen--Qwen2.5-3B-Instruct"
    assert folder.is_dir()
    assert Registry(str(tmp_path), None).names() == []


def test_fewer_null_prompts(own, base):
    with serve(own, num_null_prompts=2) as served:
        answer = served.post("/infer/base", {"features": ROWS[0]})
    assert answer["prior"] == pytest.approx(mean_of_nulls(base, 2), abs=1e-4)


def mean_of_nulls(base: str, count: int) -> dict[str, float]:
    classifier = Classifier.load(ModelSource(base), CREDITMIX)
    raw = classifier.raw_scores(CREDITMIX.null_inputs[:count]).mean(axis=0)
    return dict(zip(LABELS, map(float, raw), strict=True))


def test_stopping_finishes_what_was_accepted(runs, expected):
    with ThreadPoolExecutor(8) as pool, serve(runs) as served:
        with served.held():
            asked = [pool.submit(served.post, f"/infer/{NAMES[i % 4]}", {"features": ROWS[i]}) for i in range(8)]
            wait_for(lambda: served.waiting() == 8)
            served.uvicorn.should_exit = True
            time.sleep(0.1)
        for number, future in enumerate(asked):
            same(future.result(), expected[NAMES[number % 4]][number])


def test_a_model_whose_process_is_killed_is_started_again(own):
    row = {"features": ROWS[0]}
    with ThreadPoolExecutor(2) as pool, serve(own) as served:
        before = served.post("/infer/sft", row)
        (process,) = served.processes
        os.kill(process.process.pid, signal.SIGSTOP)
        asked = [pool.submit(served.ask, "POST", f"/infer/{name}", row) for name in ("sft", "kd")]
        wait_for(lambda: served.waiting() == 2)
        os.kill(process.process.pid, signal.SIGKILL)
        for future in asked:
            status, answer, headers = future.result()
            assert (status, headers["retry-after"]) == (503, "1")
            assert "ended (SIGKILL, as where memory runs out); the next request" in answer["error"]["message"]
        assert served.ask("GET", "/models")[1]["bases"] == []
        assert served.post("/infer/sft", row) == before


def test_a_model_that_does_not_answer_is_ended_and_started_again(own, monkeypatch):
    """A process that stands still takes the place of one that is busy for ever."""
    row = {"features": ROWS[0]}
    with ThreadPoolExecutor(2) as pool, serve(own) as served:
        before = served.post("/infer/sft", row)
        (process,) = served.processes
        monkeypatch.setattr(served.server, "settings", settings(own, request_timeout=0.5))
        os.kill(process.process.pid, signal.SIGSTOP)
        assert "no answer within 0.5 s" in served.refused(504, "/infer/sft", row)
        monkeypatch.setattr(served.server, "settings", settings(own))
        asked = pool.submit(served.ask, "POST", "/infer/kd", row)
        wait_for(lambda: served.waiting() == 1)
        monkeypatch.setattr(server, "GRACE", 0.5)
        monkeypatch.setattr(served.server, "settings", settings(own, request_timeout=0.5))
        status, answer, headers = asked.result()
        assert (status, headers["retry-after"]) == (503, "1")
        assert answer["error"]["message"].endswith("did not answer and was ended; the next request starts it again")
        monkeypatch.setattr(served.server, "settings", settings(own))
        assert served.post("/infer/sft", row) == before


class Slow(Classify):
    """Many steps, each short, that together take much longer than a process may be silent."""

    def run(self, view, payloads):
        for _ in range(60):
            time.sleep(0.1)
            view.model(torch.tensor([[1]]))
        return super().run(view, payloads)


def test_long_work_that_shows_signs_of_life_is_not_ended(runs, expected, monkeypatch):
    row = {"features": ROWS[0]}
    with ThreadPoolExecutor(1) as pool, serve(runs) as served:
        served.post("/infer/sft", row)
        (process,) = served.processes
        with monkeypatch.context() as patch:
            patch.setattr(routes, "Classify", Slow)
            asked = pool.submit(served.refused, 504, "/infer/sft", row)
            wait_for(served.busy)
        monkeypatch.setattr(server, "GRACE", 3 * adapter_host.BEAT)
        monkeypatch.setattr(served.server, "settings", settings(runs, request_timeout=0.8))
        served.expire()
        assert asked.result() == "no answer within 0.8 s; send less, or raise REQUEST_TIMEOUT"
        wait_for(lambda: not served.busy())  # it has ended its work, by itself or not
        assert not process.closed.done()
        monkeypatch.setattr(served.server, "settings", settings(runs))
        same(served.post("/infer/sft", row), expected["sft"][0])
        assert served.processes == [process]


def test_the_watching_goes_on_whatever_a_round_brings(tmp_path, monkeypatch, capsys):
    watching, rounds = server.Server(settings(tmp_path, request_timeout=0.02)), []

    class Broken:
        async def is_disconnected(self):
            raise RuntimeError("a connection of an unknown kind")

    def running():
        rounds.append(len(rounds))
        if rounds[-1] < 3:
            raise RuntimeError("no list of processes")
        return []

    def waiting(request, deadline: float) -> Pending:
        queued = QueuedRequest(len(watching.waiting), None, None, arrived=time.monotonic() - 1)
        pending = Pending(queued, asyncio.get_running_loop().create_future(), None)
        watching.waiting[pending] = (request, deadline)
        return pending

    async def watch() -> None:
        watcher = asyncio.create_task(watching.watch())
        broken, late = waiting(Broken(), float("inf")), waiting(None, 0.0)
        with pytest.raises(RuntimeError, match="unknown kind"):
            await broken.answer
        with pytest.raises(Problem, match="504"):
            await late.answer
        while len(rounds) < 5:
            await asyncio.sleep(0.001)
        assert not watcher.done()
        watcher.cancel()

    monkeypatch.setattr(watching.models, "running", running)
    asyncio.run(watch())
    assert capsys.readouterr().err.count("; trying again:\n") == 1  # said once


@pytest.fixture
def two_bases(tmp_path, tokenizer) -> Path:
    """run0 and run1, each on a base of its own."""
    for seed in range(2):
        base = build_base(tmp_path / f"base{seed}", tokenizer, seed=seed)
        make_run(tmp_path / "runs" / f"run{seed}", base, seed=1)
    return tmp_path / "runs"


def test_a_base_that_hangs_while_it_has_to_leave_is_ended(two_bases, monkeypatch):
    """It has no answer to give any more, only its place."""
    row = {"features": ROWS[0]}
    with ThreadPoolExecutor(1) as pool, serve(two_bases, max_bases=1) as served:
        served.post("/infer/run0", row)
        (process,) = served.processes
        os.kill(process.process.pid, signal.SIGSTOP)
        try:
            asked = pool.submit(served.ask, "POST", "/infer/run1", row)
            wait_for(lambda: served.waiting() == 1)
            monkeypatch.setattr(server, "GRACE", 0.5)
            monkeypatch.setattr(served.server, "settings", settings(two_bases, request_timeout=0.5))
            wait_for(process.closed.done)
            monkeypatch.undo()  # the other one has its time
            assert asked.result()[0] == 200
        finally:
            process.kill()


def test_the_end_waits_neither_for_a_base_that_loads_and_leaves_nor_for_one_behind_it(two_bases, monkeypatch):
    starts = []

    def launch(end):
        starts.append(subprocess.Popen(["sleep", "600"]))
        return starts[-1]

    monkeypatch.setattr(model_process, "launch", launch)
    with serve(two_bases, max_bases=1, request_timeout=0.5) as served:
        for run in ("run0", "run1"):
            served.refused(504, f"/infer/{run}", {"features": ROWS[0]})
    assert [process.poll() for process in starts] == [-signal.SIGKILL]


def test_dead_processes_harm_neither_the_next_base_nor_the_end(two_bases):
    with serve(two_bases, max_bases=1, base_model=str(two_bases.parent / "base0")) as served:
        for run in ("run0", "run1"):
            served.post(f"/infer/{run}", {"features": ROWS[0]})
            (process,) = served.processes
            os.kill(process.process.pid, signal.SIGKILL)
            wait_for(process.closed.done)
            assert (process.loaded, process.state) == (False, State())
    assert not served.uvicorn.lifespan.shutdown_failed


def test_a_process_that_ends_while_it_loads_is_not_started_for_each_request(runs, monkeypatch):
    starts = []

    def launch(end):
        starts.append(subprocess.Popen(["false"]))
        return starts[-1]

    monkeypatch.setattr(model_process, "launch", launch)
    with serve(runs) as served:
        first = served.refused(503, "/infer/sft", {"features": ROWS[0]})
        assert "ended (code 1); the next request starts it again" in first
        for _ in range(3):
            status, _, headers = served.ask("POST", "/infer/sft", {"features": ROWS[0]})
            assert (status, headers["retry-after"]) == (503, "10")
        assert len(starts) == 1


def is_gone(pid: int) -> bool:
    try:
        return "zombie" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def alive(served) -> bool:
    try:
        return served.ask("GET", "/healthz")[0] == 200
    except OSError:
        return False


def test_a_server_that_is_killed_leaves_no_process(runs):
    """The real start of both processes, and the real end of one."""
    port = free_port()
    words = [sys.executable, str(ROOT / "serve_creditmix.py"), "--port", str(port)]
    environment = os.environ | {"RUNS_DIR": str(runs), "PRELOAD": "1"}
    started = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    try:
        wait_for(lambda: children.read_text().strip())
        (model,) = map(int, children.read_text().split())
        served = Client(port)
        wait_for(lambda: alive(served))  # the model's process is started before the port is opened
        wait_for(lambda: served.ask("GET", "/readyz")[0] == 200)
        for path, body in (
            ("/infer/sft", {"features": ROWS[0]}),
            ("/infer/idp", {"document": "a", "schema": {"type": "null"}, "run": "sft"}),
            ("/infer/codegen", {"prompt": "a", "max_new_tokens": 2, "run": "sft"}),
            ("/v1/chat/completions", {"model": "sft", "messages": [chat_turn("user")], "max_tokens": 2}),
        ):
            served.post(path, body)
        modules = subprocess.run(["grep", "-c", "libtorch_cpu", f"/proc/{started.pid}/maps"], stdout=subprocess.PIPE)
        assert int(modules.stdout) == 0  # the server's own process needs no torch
    finally:
        started.kill()
        started.wait()
    wait_for(lambda: is_gone(model))


def test_a_very_long_document_keeps_nobody_waiting(runs, expected):
    """Not while it is cut into pieces, and not after its own wait has ended."""
    with ThreadPoolExecutor(1) as pool, serve(runs) as served:
        served.post("/infer/sft", {"features": ROWS[0]})
        (process,) = served.processes
        answers = []
        on_answers = process.on_answers
        process.on_answers = lambda message: (answers.extend(message.answers), on_answers(message))
        document = "".join(f"Age: {number}, Annual Income: {number * 37}\n" for number in range(30_000))[:900_000]
        body = {"document": document, "schema": {"type": "object"}, "run": "sft"}
        long = pool.submit(served.ask, "POST", "/infer/idp", body)
        wait_for(served.busy)
        for name in NAMES:
            same(served.post(f"/infer/{name}", {"features": ROWS[0]}), expected[name][0])
        assert not long.done()
        served.server.settings = settings(runs, request_timeout=0.2)
        served.expire()
        assert long.result()[0] == 504
        wait_for(lambda: any(isinstance(answer, Abandoned) for answer in answers))
