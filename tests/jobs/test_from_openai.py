"""The script of docs/from-openai.md, as it is printed, on the miniature: `python serve_all.py` is its base_url."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from openai import NotFoundError, OpenAI
from support import served
from support.http_server import free_port
from support.inputs import ROOT
from support.openai_jobs import preferences, until
from support.processes import LONGEST, wait_for

import serve_all
from common.serving import model_process
from common.web import launch

pytestmark = pytest.mark.processes


def started(argv: list[str]) -> int | None:
    """`serve_all.main`, whose models have processes as everywhere."""
    os.environ.pop("API_KEY", None)
    model_process.launch = served.launch
    return serve_all.main(argv)


@pytest.fixture
def url(spawn, base, tmp_path) -> Iterator[str]:
    """Where both servers are, in a process of their own."""
    port = free_port()
    settings = {
        "RUNS_DIR": str(tmp_path / "runs"),
        "DATA_DIR": str(tmp_path / "jobs"),
        "ALLOWED_ROOTS": os.pathsep.join((base, str(tmp_path))),
        "FINE_TUNING_MODELS": f"gpt-*={base}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    server = spawn(started, ["--port", str(port)], tmp_path / "server.log", **settings)
    wait_for(lambda: not server.is_alive() or not launch.is_alive(port))
    assert server.is_alive(), (tmp_path / "server.log").read_text()
    yield f"http://localhost:{port}"
    server.terminate()
    server.join(LONGEST)


def printed_script(url: str) -> str:
    """The script after its change, for a miniature that has to learn in seconds."""
    block = re.search(r"```diff\n(.*?)```", (ROOT / "docs/from-openai.md").read_text(), re.DOTALL)[1]
    lines = [line[1:] for line in block.splitlines() if not line.startswith("-")]
    script = "\n".join(lines).replace("http://localhost:8000", url).replace("time.sleep(10)", "time.sleep(0.2)")
    assert '{"n_epochs": 3}' in script
    return script.replace('{"n_epochs": 3}', '{"n_epochs": 8, "learning_rate_multiplier": 20}')


def write_chats(path: Path, count: int) -> None:
    """Questions of which every third has another answer."""
    rows = []
    for number in range(count):
        question = {"role": "user", "content": f"Age: {20 + number}.0, Occupation: Scientist"}
        rows.append({"messages": [question, {"role": "assistant", "content": "Good" if number % 3 else "Bad"}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_script_changes_its_base_url_alone(url, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    write_chats(Path("train.jsonl"), 48)
    write_chats(Path("val.jsonl"), 12)
    names: dict = {}
    exec(printed_script(url), names)
    job, answer, client = names["job"], names["answer"], names["client"]
    assert isinstance(client, OpenAI)
    assert (job.status, job.error, job.model) == ("succeeded", None, base)
    assert job.fine_tuned_model.startswith("ft-base-tickets-")
    assert answer.model == job.fine_tuned_model
    assert answer.choices[0].message.content in ("Good", "Bad")  # it has learnt which answers there are
    assert job.trained_tokens > 48 * 8
    check_figures(job.validation)
    check_checkpoints(client, job)
    header, *lines = client.files.content(job.result_files[0]).text.splitlines()
    assert header == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert sum(line.split(",")[3] != "" for line in lines) == 8  # an epoch each
    accuracies = [float(cells[2]) for line in lines if (cells := line.split(","))[1]]  # wherever there is a loss
    assert 0 <= accuracies[0] < accuracies[-1] <= 1
    with urlopen(f"{url}/training/") as page:
        assert b"distill-slm jobs" in page.read()
    go_on_with_preferences(client, job, base)


def check_figures(figures: dict) -> None:
    """Of the validation file, whose rows are among those of the training."""
    assert (figures["n"], figures["labels"], figures["shared"]) == (12, ["Bad", "Good"], {"rows": 12, "of": 12})
    for name in ("loss", "token_accuracy", "accuracy"):
        assert figures[name]["low"] <= figures[name]["value"] <= figures[name]["high"]
    assert figures["token_accuracy"]["value"] > 0.5


def check_checkpoints(client: OpenAI, job) -> None:
    """All of them are served, and the model's own has the figures of the whole file."""
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    own = next(point for point in checkpoints if point.fine_tuned_model_checkpoint == job.fine_tuned_model)
    assert own.metrics.full_valid_loss == job.validation["loss"]["value"]
    assert len(checkpoints) > 1
    question = [{"role": "user", "content": "Age: 23.0"}]
    for point in checkpoints:
        client.chat.completions.create(model=point.fine_tuned_model_checkpoint, messages=question, max_tokens=4)
    listed = {model.id for model in client.models.list()}
    assert listed >= {point.fine_tuned_model_checkpoint for point in checkpoints}


def go_on_with_preferences(client: OpenAI, before, base: str) -> None:
    """DPO from the model of a job before, whose adapter is the reference."""
    sent = client.files.create(file=preferences(16), purpose="fine-tune").id
    method = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2, "beta": 0.2}}}
    job = client.fine_tuning.jobs.create(
        model=before.fine_tuned_model, training_file=sent, validation_file=sent, method=method
    )
    done = until(client, job.id)
    assert (done.status, done.error, done.model) == ("succeeded", None, base)
    figures = done.validation["preference_accuracy"]
    assert "reward_accuracy" not in done.validation  # its reference is the adapter that it started from
    assert figures["low"] <= figures["value"] <= figures["high"]
    question = [{"role": "user", "content": "Question 1"}]
    assert client.chat.completions.create(model=done.fine_tuned_model, messages=question, max_tokens=4).choices
    deleted = client.models.delete(done.fine_tuned_model)
    assert (deleted.id, deleted.deleted) == (done.fine_tuned_model, True)
    with pytest.raises(NotFoundError, match="there is no run"):
        client.chat.completions.create(model=done.fine_tuned_model, messages=question, max_tokens=4)
    assert client.fine_tuning.jobs.checkpoints.list(job.id).data == []
    assert client.chat.completions.create(model=before.fine_tuned_model, messages=question, max_tokens=4).choices
