"""The inference server's figures, its audit log, its settings, and its memory."""

from __future__ import annotations

import gc
import json
import logging
from collections import Counter

import pytest
from harness.memory import own_bytes
from support.inputs import LABELS
from support.processes import wait_for
from support.served import (
    JSON,
    ROWS,
    chat_turn,
    figure,
    serve,
)

from common.cli import UserError
from common.serving.settings import ServerSettings
from common.tasks.ranking.creditmix import CREDITMIX

pytestmark = pytest.mark.processes

NULLS = len(CREDITMIX.null_inputs)


def test_metrics(served):
    before = served.ask("GET", "/metrics")[1]
    answer = served.post("/infer/kd", {"features": ROWS[0]})
    served.ask("POST", "/infer/kd", {})
    counted = f'predictions_total{{adapter="creditmix_kd",label="{answer["prediction"]}"}}'
    assert figure(served.ask("GET", "/metrics")[1], counted) == figure(before, counted) + 1
    for name in (
        'http_requests_total{route="/infer/{run}",status="200"}',
        'http_requests_total{route="/infer/{run}",status="422"}',
        'inference_seconds_count{adapter="creditmix_kd",task="creditmix"}',
        'top2_margin_count{adapter="creditmix_kd"}',
        'prior_warmup_seconds{name="creditmix_kd"}',
        'adapter_load_seconds{name="creditmix_kd"}',
    ):
        assert figure(served.ask("GET", "/metrics")[1], name) > 0, name
    assert figure(served.ask("GET", "/metrics")[1], "queue_rows") == 0
    assert figure(served.ask("GET", "/metrics")[1], "gpu_memory_bytes") == 0


@pytest.mark.parametrize("inputs", [False, True])
def test_the_audit_log(runs, tmp_path, inputs):
    path = tmp_path / "logs" / "audit.jsonl"
    with serve(runs, audit_log=str(path), audit_inputs=inputs) as served:
        _, answer, headers = served.ask("POST", "/infer/kd", {"features": ROWS[0]})
        served.post("/infer/sft/batch", [{"features": row} for row in ROWS[:2]])
        sha = served.server.registry.find("kd").sha256
        run = json.loads((runs / "creditmix_kd" / "run.json").read_text())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["adapter"] for line in lines] == ["creditmix_kd", "creditmix_sft", "creditmix_sft"]
    line = lines[0]
    assert (line["request_id"], line["adapter_sha256"], line["task"]) == (headers["x-request-id"], sha, "creditmix")
    assert {key: line[key] for key in answer if key != "model_name"} == {
        key: value for key, value in answer.items() if key != "model_name"
    }
    assert line["latency_ms"] > 0
    assert line["base_hash"] == run["base_fingerprint"]
    assert line["time"].endswith("Z")
    assert [line.get("input") for line in lines] == ([ROWS[0], *ROWS[:2]] if inputs else [None] * 3)
    assert path.stat().st_mode & 0o077 == 0


def test_the_audit_log_is_rotated_and_its_faults_fail_no_request(runs, tmp_path, capfd):
    path = tmp_path / "audit.jsonl"
    with serve(runs, audit_log=str(path), audit_max_bytes=2000) as served:
        served.post("/infer/kd/batch", [{"features": row} for row in ROWS])
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["audit.jsonl", *(f"audit.jsonl.{i}" for i in range(1, 6))]
    assert all(file.stat().st_size <= 2000 for file in tmp_path.iterdir())
    with serve(runs, audit_log="/dev/full") as served:
        for row in ROWS[:3]:
            assert served.post("/infer/kd", {"features": row})["prediction"] in LABELS
        assert figure(served.ask("GET", "/metrics")[1], "audit_failures") == 3
    assert "1 lines could not be written" in capfd.readouterr().err


def test_settings(monkeypatch):
    given = {"RUNS_DIR": "r", "BASE_MODEL": "b", "MAX_WAIT_MS": "2.5", "MAX_QUEUE": "9", "AUDIT_INPUTS": "1",
             "PRELOAD": "no", "NUM_NULL_PROMPTS": "2", "REQUEST_TIMEOUT": "7", "LOAD_IN_4BIT": "off",
             "AUTO_FIT": "1"}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    chosen = ServerSettings.from_environment()
    assert (chosen.runs_dir, chosen.base_model, chosen.audit_inputs, chosen.preload) == ("r", "b", True, False)
    assert (chosen.host.max_wait, chosen.host.max_queue, chosen.host.num_null_prompts) == (0.0025, 9, 2)
    assert (chosen.host.load_in_4bit, chosen.host.auto_fit) == ("off", True)
    assert (chosen.request_timeout, chosen.max_bases, chosen.api_key) == (7, 2, None)
    for name, value, sentence in (
        ("MAX_QUEUE", "0", "MAX_QUEUE=0 is not a number of at least 1; set it to one or unset it"),
        ("MAX_QUEUE", "2.5", "MAX_QUEUE=2.5 is not a whole number"),
        ("MAX_WAIT_MS", "soon", "MAX_WAIT_MS=soon is not a number of at least 0"),
        ("REQUEST_TIMEOUT", "nan", "REQUEST_TIMEOUT=nan is not a number"),
        ("LOAD_IN_4BIT", "yes", "LOAD_IN_4BIT=yes is none of auto, on, off; set it to one or unset it"),
        ("NUM_NULL_PROMPTS", "99", f"NUM_NULL_PROMPTS=99 is more than the {NULLS} that there are"),
    ):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=sentence):
            patch.setenv(name, value)
            ServerSettings.from_environment()


def test_the_module_has_the_app(monkeypatch, runs, capsys):
    import serve_creditmix

    monkeypatch.setenv("RUNS_DIR", str(runs))
    assert serve_creditmix.app.title == "distill-slm inference"
    monkeypatch.setenv("MAX_BASES", "none")
    with pytest.raises(SystemExit, match="error: MAX_BASES=none is not a number"):
        serve_creditmix.app  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        serve_creditmix.other  # noqa: B018


def test_memory_is_flat(served, monkeypatch):
    """Mixed traffic leaves nothing behind, in either process, refused and failed requests included.

    bench/reliability.py does the same for hours.
    """
    monkeypatch.setattr(logging.getLogger("uvicorn.access"), "disabled", True)  # pytest keeps its records
    bodies = [("/infer/sft", {"features": ROWS[0]}), ("/infer/kd/batch", [{"features": row} for row in ROWS[:3]]),
              ("/infer/nope", {"features": "a"}), ("/infer/sft", {}), ("/infer/base", b"{"),
              ("/v1/chat/completions", {"model": "dpo", "messages": [chat_turn("user")], "max_tokens": 2})]  # fmt: skip
    connection = served.connect()

    def traffic(rounds: int) -> int:
        for _ in range(rounds):
            for path, body in bodies:
                sent = body if isinstance(body, bytes) else json.dumps(body)
                connection.request("POST", path, sent, JSON)
                connection.getresponse().read()
        wait_for(lambda: not served.uvicorn.server_state.tasks)  # what answered the last one
        gc.collect()
        return Counter(type(thing).__name__ for thing in gc.get_objects())

    traffic(40)
    (process,) = [process for process in served.processes if process.loaded]
    before, held = traffic(20), own_bytes(process.process.pid)
    grown = traffic(60) - before
    assert grown.total() < 150, grown  # 360 requests; a leak of one object each would show
    assert own_bytes(process.process.pid) - held < 3e6
    connection.close()
