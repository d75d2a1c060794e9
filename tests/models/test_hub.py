"""Names of the Hub where it cannot be reached: one sentence within seconds, or what is cached."""

from __future__ import annotations

import os
import threading

import httpx2
import pytest
from huggingface_hub import HfApi, constants, errors
from support.processes import LONGEST

from common.cli import UserError
from common.models import hub, loading
from common.vram import model_shape


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A machine that may ask the Hub, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path


def fails(monkeypatch, error: Exception) -> None:
    def ask(self, name, timeout):
        raise error

    monkeypatch.setattr(HfApi, "model_info", ask)


def cache(folder, name: str) -> None:
    """What a download leaves."""
    place = folder / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (place / "snapshots" / ("0" * 40) / "config.json").write_text("{}")


NO_NETWORK = httpx2.ConnectError("[Errno -2] Name or service not known")


def test_a_hub_out_of_reach_is_one_sentence(online, monkeypatch):
    fails(monkeypatch, NO_NETWORK)
    with pytest.raises(UserError, match=r"some/model cannot be had from the Hub: .*ConnectError.*give a model folder"):
        loading.check_model_dir("some/model")


def test_a_hub_that_hangs_is_not_waited_for(online, monkeypatch):
    hung = threading.Event()
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **more: hung.wait(LONGEST))
    assert hub.why_not("some/model", seconds=0.2) == "the Hub did not answer within 0.2 s"
    hung.set()


def test_what_is_cached_is_used_and_nobody_asks_again(online, monkeypatch, capsys):
    fails(monkeypatch, NO_NETWORK)
    cache(online, "cached/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    loading.check_model_dir("cached/model")
    assert "what is cached is used" in capsys.readouterr().err
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_name_that_is_there_is_asked_for_once(online, monkeypatch):
    asked = []
    monkeypatch.setattr(HfApi, "model_info", lambda self, name, timeout: asked.append(name))
    for _ in range(3):
        loading.check_model_dir("there/model")
    assert asked == ["there/model"] and not constants.HF_HUB_OFFLINE


def test_what_the_hub_refuses(online, monkeypatch):
    answer = httpx2.Response(404, request=httpx2.Request("GET", "http://hub"))
    for error, words in (
        (errors.RepositoryNotFoundError("no", response=answer), "none on the Hub"),
        (errors.GatedRepoError("no", response=answer), "HF_TOKEN"),
        (errors.HFValidationError("no"), "no name of the Hub"),
    ):
        fails(monkeypatch, error)
        with pytest.raises(UserError, match=words):
            loading.check_model_dir("refused/model")


def test_a_server_that_looks_for_a_run_asks_nobody(online, monkeypatch):
    fails(monkeypatch, NO_NETWORK)
    loading.check_model_dir("some/model", ask_hub=False)


@pytest.mark.parametrize("of", [loading.whole_config, model_shape.of])
def test_a_config_is_not_asked_for_again_and_again(of, online, monkeypatch):
    """Nothing but the one question reaches the network: transformers would go on asking for half a minute."""
    fails(monkeypatch, NO_NETWORK)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *args, **more: pytest.fail("asked again"))
    with pytest.raises(UserError, match=r"some/model cannot be had from the Hub: .*ConnectError"):
        of("some/model")
