"""One model measured: its size, its prompts, in a process of its own."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.inputs import PROMPTS

from common.cli import UserError
from common.comparison import measure
from common.comparison.measure import MeasuredModel, Measurement
from common.comparison.rows import ROWS
from common.data.resumable import AnswerStore
from common.models import adapters, tokenizers
from common.models import loading as models
from common.models.source import ModelSource


def test_an_adapter_counts_with_its_base(folders, tmp_path):
    base = models.load_base(ModelSource(folders["base"]))
    adapter = str(tmp_path / "run")
    adapters.add_lora(base, r=4, alpha=8, dropout=0.0, seed=0).save_pretrained(adapter)
    model, _ = models.load_for_inference(ModelSource(adapter, base=folders["base"]))
    facts = measure.size_facts(model, adapter, folders["base"])
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert facts["adapter_parameters"] == lora > 0
    assert facts["parameters"] == lora + models.load_for_inference(ModelSource(folders["base"]))[0].num_parameters()
    assert facts["disk_bytes"] == {
        "adapter": os.path.getsize(Path(adapter, "adapter_model.safetensors")),
        "base": os.path.getsize(Path(folders["base"], "model.safetensors")),
    }


def test_prompts_are_cut_to_leave_room_for_the_answer(folders):
    model, tokenizer = models.load_for_inference(ModelSource(folders["student"]))
    rows = [{"input": PROMPTS[3], "output": "Good"}]
    length = len(tokenizers.encode_prompt(tokenizer, PROMPTS[3]))
    measurement = Measurement(ModelSource(folders["student"], load_in_4bit="off"), ROWS, rows, 1, length + 4, 4, 8192)
    store = AnswerStore(None)
    whole = MeasuredModel(measurement, model, tokenizer, store)
    assert (whole.cut(), len(whole.prompt(0, 4))) == (0, length)
    shorter = MeasuredModel(replace(measurement, max_len=length), model, tokenizer, store)
    assert shorter.cut() == 1 and len(shorter.prompt(0, 4)) <= length - 4
    with pytest.raises(UserError, match="leave no room for a prompt and 4 new ones"):
        MeasuredModel(replace(measurement, max_len=6), model, tokenizer, store).prompt(0, 4)


@pytest.mark.processes
def test_a_model_is_measured_in_a_process_of_its_own(folders, tmp_path):
    rows = [{"input": prompt, "output": "Good"} for prompt in PROMPTS[:3]]
    measurement = Measurement(ModelSource(folders["student"], load_in_4bit="off"), ROWS, rows, 1, 256, 2, 8192)
    apart, here = measure.measure_in_own_process(measurement), measure.measure(measurement)
    assert (apart["answers"], apart["nll"], apart["tokens"]) == (here["answers"], here["nll"], here["tokens"])
    memory = apart["facts"]["peak_memory_bytes"]
    assert memory["resident"] >= memory["process"] > 50e6
    broken = shutil.copytree(folders["student"], tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot load .*broken"):
        measure.measure_in_own_process(replace(measurement, source=ModelSource(str(broken))))
