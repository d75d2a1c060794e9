"""What is said of a prompt that takes long to be read."""

from __future__ import annotations

import itertools

import pytest
from support.families import build_architecture

from common.generation import reading_time
from common.generation.decoding import Decoding
from common.generation.generate import generate
from common.models import loading
from common.models.source import ModelSource


@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock comes so many seconds after the one before."""

    def every(seconds: float) -> None:
        monkeypatch.setattr(reading_time, "perf_counter", itertools.count(step=seconds).__next__)

    return every


def write(model, tokenizer, *lengths: int) -> None:
    generate(model, tokenizer, [list(range(5, 5 + length)) for length in lengths], Decoding(1))


def hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_long_wait_is_said_once(tiny_base, tokenizer, clock, capsys):
    model = loading.load_base(ModelSource(tiny_base)).eval()
    layers = model.config.num_hidden_layers
    before = hooks(model)
    clock(40.0)
    write(model, tokenizer, 130, 140, 12)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"to read a prompt of 140 tokens takes about {reading_time.duration(40 * layers)} here"]
    assert hooks(model) == before
    write(model, tokenizer, 127)
    clock(1.0)
    write(model, tokenizer, 140)
    assert capsys.readouterr().err == ""


@pytest.mark.processes
@pytest.mark.parametrize("name", ["gpt2", "gemma3 with images", "qwen3.5"])
def test_layers_of_several_kinds_count_as_many_as_there_are(name, tokenizer, clock, capsys, tmp_path):
    """Whatever a model calls its layers, and not those of its images."""
    model = loading.load_base(ModelSource(build_architecture(name, tmp_path, tokenizer), dtype="float32")).eval()
    clock(30.0)
    write(model, tokenizer, 130)
    took = 30 * model.config.get_text_config().num_hidden_layers
    assert f"takes about {reading_time.duration(took)} here" in capsys.readouterr().err
