"""The memory prediction against what is really allocated, and what the preflight makes of it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from harness import memory
from support.inputs import ROOT

from bench import gpu_8gb
from common import cli
from common.distillation.settings import DEFAULT_WEIGHTS, DistillSettings
from common.models import loading
from common.models.flags import source_of
from common.models.source import ModelSource
from common.training import quantization_aware, run
from common.training.settings import DpoSettings, KdSettings, TrainSettings
from common.vram import __main__ as command
from common.vram import formulas as peak_memory
from common.vram import model_shape as shapes
from common.vram import preflight as vram
from common.vram.formulas import GB, Inference, Packed, Training, predict

QWEN_3B, QWEN_7B = shapes.from_config(shapes.QWEN_3B), shapes.from_config(shapes.QWEN_7B)
CPU = {"four_bit": False, "cuda": False}


def config(hidden=64, intermediate=192, layers=2, heads=4, kv_heads=2, vocabulary=512, **more) -> dict:
    return shapes.QWEN_3B | {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        **more,
    }


WIDE = config(128, 512, layers=4)
ROUNDED = {"lora_r": 0, "rounds": True}
NO_TREES = {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0}


def student_of(plan: Training, settings: dict):
    """A student of random weights as the trainers prepare it, and a step of it that leaves gradients."""
    import torch

    from common.models import adapters

    student = gpu_8gb.random_model(settings, four_bit=plan.four_bit, device="cpu")
    if plan.full:
        student.requires_grad_(True)
        if plan.rounds:
            pytest.importorskip("torchao")
            student = quantization_aware.prepare(student, "int8")
    else:
        student = adapters.add_lora(student, r=plan.lora_r, alpha=32, dropout=plan.lora_dropout, seed=0)
        student.enable_input_require_grads()
    if plan.checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], fused=True)
    return student.train(), optimizer


def batch_of(plan: Training) -> dict:
    """Rows of falling lengths with completions at their ends; `completion_len` is that of all of them together."""
    from common.models import tokenizers
    from common.training import batches

    lengths = [plan.max_len - 3 * row for row in range(plan.rows)]
    answer = plan.completion_len - 3 * (plan.rows - 1)
    return batches.collate([tokenizers.Encoded([1] * length, length - answer) for length in lengths], 0)


def measured(student, optimizer, step) -> int:
    """Bytes at the peak of a step in the middle of a run."""
    step()
    optimizer.step()  # gradients and moments are there from now on
    return memory.held_bytes(student, optimizer) + memory.tracked_peak(step)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("settings", "plan"),
    [
        (config(), {"batch": 2, "max_len": 100, "completion_len": 8}),
        (config(vocabulary=8192), {"batch": 2, "max_len": 100, "completion_len": 40}),
        (WIDE, {"batch": 1, "max_len": 256, "completion_len": 20, "lora_dropout": 0.0}),
        (config(256, 1024, layers=3, heads=8), {"batch": 3, "max_len": 64, "completion_len": 12}),
        (config(128, 256, layers=3, heads=8, head_dim=32), {"max_len": 128, "completion_len": 1, "lora_r": 64}),
        (config(tie_word_embeddings=False), {"max_len": 100, "completion_len": 50, "lora_r": 0}),
        (WIDE, {"batch": 2, "max_len": 256, "completion_len": 40, **ROUNDED}),
        (config(256, 1024, layers=3, heads=8), {"batch": 3, "max_len": 64, "completion_len": 12, **ROUNDED}),
    ],
    ids=["padded", "logits", "no dropout", "grouped heads", "rank and head size", "all weights", "rounded", "larger"],
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_training_peak(settings, plan, checkpointing):
    from common.training import losses

    plan = Training(shapes.from_config(settings), checkpointing=checkpointing, **CPU, **plan)
    student, optimizer = student_of(plan, settings)
    batch = batch_of(plan)
    peak = measured(student, optimizer, lambda: losses.completion_loss(student, batch)[0].backward())
    assert 0.97 <= predict(plan).tensors / peak <= 1.10


@pytest.mark.processes
@pytest.mark.parametrize(
    ("settings", "plan"),
    [
        (WIDE, {"batch": 1, "max_len": 256, "completion_len": 20}),
        (config(vocabulary=8192), {"batch": 3, "max_len": 100, "completion_len": 40}),
        (config(256, 1024, layers=3, heads=8), {"batch": 4, "max_len": 64, "completion_len": 12}),
        (WIDE | NO_TREES, {"batch": 1, "max_len": 256, "completion_len": 20}),
        (config(vocabulary=8192, **NO_TREES), {"batch": 3, "max_len": 100, "completion_len": 40}),
        (config(256, 1024, layers=3, heads=8, **NO_TREES), {"batch": 4, "max_len": 64, "completion_len": 12}),
    ],
    ids=["wide", "logits", "grouped heads", "wide, no tree", "logits, no tree", "grouped heads, no tree"],
)
def test_training_peak_of_a_large_base(settings, plan):
    """Of rows that share nothing; what they share takes less. The last have an attention that reads no trees."""
    import random

    from common.models import lora_training, tokenizers
    from common.training import prefix_tree
    from common.training.completion import completion_rows

    plan = Training(shapes.from_config(settings), checkpointing=False, by_hand=True, **CPU, **plan)
    student, optimizer = student_of(plan, settings)
    lora_training.install(student)
    prefix_tree.install(student.get_base_model())
    rng = random.Random(0)
    ids = [[rng.randrange(settings["vocab_size"]) for _ in range(plan.max_len)] for _ in range(plan.rows)]
    rows = [tokenizers.Encoded(row, plan.max_len - plan.completion_len) for row in ids]
    data = completion_rows(rows, SimpleNamespace(pad_token_id=0), student)
    batch = data.collate(rows)
    assert (prefix_tree.NAME in batch) == plan.as_tree
    peak = measured(student, optimizer, lambda: data.loss(student, batch)[0].backward())
    assert 0.97 <= predict(plan).tensors / peak <= 1.10


@pytest.mark.processes
@pytest.mark.parametrize(("checkpointing", "dropout"), [(False, 0.05), (True, 0.05), (True, 0.0)])
def test_training_peak_in_4_bits_under_autocast(checkpointing, dropout, monkeypatch):
    """As on a card, but for dropout's mask, which a CPU keeps as bfloat16, not as bytes."""
    import peft.tuners.lora.bnb
    import torch

    from common.training import losses

    if checkpointing and dropout and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("on a CPU without bfloat16 in hardware a product of such matrices takes scratch in float32")

    class Torch:
        is_autocast_enabled = staticmethod(lambda: True)  # PEFT asks for CUDA's
        __getattr__ = staticmethod(torch.__getattribute__)

    monkeypatch.setattr(peft.tuners.lora.bnb, "torch", Torch())
    monkeypatch.setattr(peak_memory, "BOOL", 2)
    plan = Training(
        shapes.from_config(WIDE), max_len=256, completion_len=20, lora_dropout=dropout, checkpointing=checkpointing
    )
    student, optimizer = student_of(plan, WIDE)
    batch = batch_of(plan)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses.completion_loss(student, batch)[0]
        loss.backward()

    assert 0.97 <= predict(plan).tensors / measured(student, optimizer, step) <= 1.10


@pytest.mark.processes
@pytest.mark.parametrize(("terms", "live"), [(("forward_kl",), True), (("jsd",), True), (("forward_kl", "ce"), False)])
def test_distillation_peak(terms, live):
    import torch

    from common.distillation.objective import (
        DistillationLoss,
        HiddenStateReader,
        LiveTeacher,
        Objective,
        Signals,
        predicted,
    )

    settings = config(vocabulary=8192)
    teacher = gpu_8gb.random_model(config(96, 256, heads=6, vocabulary=8192), four_bit=False, device="cpu").eval()
    shape = shapes.from_config(settings)
    of_teacher = {"teacher": shapes.from_config(teacher.config.to_dict()), "teacher_four_bit": False} if live else {}
    plan = Training(
        shape, method="distill", max_len=96, completion_len=60, terms=terms, checkpointing=False, **CPU, **of_teacher
    )
    student, optimizer = student_of(plan, settings)
    signals = Signals(Objective(dict.fromkeys(terms, 1.0)), (), 8192)
    batch = batch_of(plan)
    n = int(predicted(batch).sum())
    batch["teacher"] = {"ids": torch.zeros(n, 4, dtype=int), "rest": torch.ones(n) / 2, "logprobs": -torch.ones(n, 4)}
    reader = HiddenStateReader(student.get_base_model())
    loss = DistillationLoss(signals, reader, LiveTeacher(HiddenStateReader(teacher), signals) if live else None)
    peak = measured(student, optimizer, lambda: loss(student, batch)[0].backward())
    peak += memory.held_bytes(teacher) if live else 0
    assert 0.97 <= predict(plan).tensors / peak <= 1.10


@pytest.mark.processes
def test_inference_peak(tokenizer):
    from common.models import adapters
    from common.tasks.ranking.creditmix import CREDITMIX
    from common.tasks.ranking.torch_ranker import TorchRanker

    settings = config(128, 1024, layers=3, vocabulary=1024)
    base = gpu_8gb.random_model(settings, four_bit=False, device="cpu")
    student = adapters.add_lora(base, r=16, alpha=32, dropout=0.0, seed=0).eval()
    adapters.make_inference_adapters(student)
    ranker = TorchRanker(student, tokenizer, CREDITMIX, 2048)
    texts = [f"{row:03}" + "12345678" * 20 for row in range(40)]
    plan = Inference(shapes.from_config(settings), batch_tokens=2048, generates=False, width=4, **CPU)
    peak = memory.held_bytes(student) + memory.tracked_peak(lambda: ranker.raw_scores(texts))
    assert 0.97 <= predict(plan).tensors / peak <= 1.10


@pytest.mark.processes
@pytest.mark.parametrize("labels", [2, 32])
def test_many_labels_take_no_more_than_is_predicted(labels, tokenizer):
    """Each further column of a label has logits over the whole vocabulary; a batch makes so many and no more."""
    from common.tasks.ranking.task import LabelTask
    from common.tasks.ranking.torch_ranker import TorchRanker

    settings = config(128, 640, layers=2, vocabulary=32_768)
    model = gpu_8gb.random_model(settings, four_bit=False, device="cpu").eval()
    task = LabelTask("kinds", tuple(f"Kind {number} of {labels}" for number in range(labels)), "Which?")
    ranker = TorchRanker(model, tokenizer, task, 2048)
    plan = Inference(
        shapes.from_config(settings), batch_tokens=2048, generates=False, adapters=0, **CPU | {"four_bit": False}
    )
    texts = [f"{row:03}" + "12345678" * 4 for row in range(32)]
    peak = memory.held_bytes(model) + memory.tracked_peak(lambda: ranker.raw_scores(texts))
    assert predict(replace(plan, width=4)).tensors >= 0.97 * peak


def test_weights():
    from common.models import adapters

    assert sum(QWEN_3B.parameters().values()) == 3_085_938_688  # as published, 3.09 B
    assert sum(QWEN_7B.parameters().values()) == 7_615_616_512
    assert [shapes.of(name) for name in shapes.KNOWN] == [QWEN_3B, QWEN_3B, QWEN_7B]
    for four_bit, width in ((False, 4), (True, 2)):
        base = gpu_8gb.random_model(WIDE, four_bit=four_bit, device="cpu")
        shape = shapes.from_config(WIDE)
        buffers = sum(buffer.nbytes for buffer in base.buffers())
        expected = peak_memory.weight_bytes(shape, four_bit=four_bit, width=width)
        assert expected == memory.held_bytes(base) - buffers
    student = adapters.add_lora(base, r=8, alpha=8, dropout=0.0, seed=0)
    assert shape.lora_parameters(8) == sum(p.numel() for p in student.parameters() if p.requires_grad)


def test_shapes_from_a_folder_and_of_others(tiny_base, tmp_path):
    shape = shapes.of(tiny_base)
    assert (shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.tied) == (32, 2, 4, 2, True)
    for text in (
        '{"model_type": "gpt2", "n_embd": 768}',
        '{"num_experts": 8, "hidden_size": 1, "intermediate_size": 1}',
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(shapes.UnknownShape, match="cannot be predicted"):
            shapes.of(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(shapes.UnknownShape, match="is not a model's config"):
        shapes.of(str(tmp_path))


def test_the_8_gb_promise():
    """A card of 8 GB less 0.7 for the desktop; the numbers are predictions."""
    sft = Training(QWEN_3B, max_len=2048)
    assert predict(sft).total < 7.3 * GB
    assert predict(replace(sft, method="dpo", max_len=1024)).total < 7.3 * GB
    assert predict(replace(sft, checkpointing=False)).total > 7.3 * GB
    live = replace(sft, method="distill", teacher=QWEN_7B, max_len=512)
    assert vram.fit(live, int(7.3 * GB)) == replace(live, teacher=None)
    serving = Inference(QWEN_3B, adapters=4)
    assert predict(serving).total < 4 * GB
    assert vram.fit(serving, int(3.5 * GB)) == replace(serving, batch_tokens=4096)
    assert vram.advise(serving, vram.SERVER, int(3.5 * GB)) == {"MAX_BATCH_TOKENS": 4096}
    assert vram.words({"MAX_BATCH_TOKENS": 4096, "max_len": 512}) == "MAX_BATCH_TOKENS=4096, --max_len 512"


def test_predictions_grow_with_what_they_are_of():
    plan = Training(QWEN_3B, completion_len=64)
    more = [
        {"max_len": 2048},
        {"batch": 2},
        {"completion_len": 1024},
        {"lora_r": 64},
        {"four_bit": False},
        {"checkpointing": False},
        {"lora_r": 0},
        {"method": "distill", "terms": ("attention_mse",)},
        {"method": "distill", "teacher": QWEN_7B},
    ]
    for change in more:
        assert predict(replace(plan, **change)).total > predict(plan).total, change


def test_fit_takes_the_least_harm():
    plan = Training(QWEN_3B, max_len=1024, batch=8, checkpointing=False, completion_len=32)
    full = predict(plan).total
    assert vram.fit(plan, full) == plan
    assert vram.fit(plan, full - 1) == replace(plan, batch=4)
    # Even a single row is too much without checkpointing; with it the batch can be whole again, or half.
    assert vram.fit(plan, predict(replace(plan, batch=1)).total - 1) == replace(plan, checkpointing=True)
    assert vram.fit(plan, int(6 * GB)) == replace(plan, checkpointing=True, batch=4)
    shorter = vram.fit(plan, int(3.3 * GB))
    assert (shorter.batch, shorter.checkpointing) == (1, True) and 128 <= shorter.max_len < 1024
    assert predict(replace(shorter, max_len=shorter.max_len + 64)).total > 3.3 * GB
    assert vram.fit(plan, GB) is None


def settings_of(base: str, **changes) -> TrainSettings:
    return TrainSettings(student=base, data="-", save_dir="runs/x", **changes)


def test_preflight_stops_or_says_what_to_change(tiny_base, capsys, monkeypatch):
    settings = settings_of(tiny_base, max_len=256, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    plan = settings.plan()
    flags = settings.memory_flags(plan.batch)
    assert (plan.batch, plan.max_len, plan.four_bit, plan.checkpointing) == (8, 256, False, False)
    assert vram.preflight(plan, flags) == {}
    assert "predicted peak" in capsys.readouterr().err

    free = predict(replace(plan, batch=2)).total
    with pytest.raises(cli.UserError, match="--per_device_train_batch_size 2, --gradient_accumulation_steps 8"):
        vram.preflight(plan, flags, free=free)
    changes = vram.preflight(plan, flags, auto_fit=True, free=free)
    assert changes == {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
    assert predict(replace(settings, **changes).plan()).total <= free
    monkeypatch.setenv("WORLD_SIZE", "2")  # each process for itself could choose other flags
    with pytest.raises(cli.UserError, match="--per_device_train_batch_size 1"):
        vram.preflight(plan, flags, auto_fit=True, free=predict(replace(plan, batch=1)).total)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(cli.UserError, match=r"no settings need less than .* take a smaller model"):
        vram.preflight(plan, flags, free=1000)
    with pytest.raises(vram.NothingFits, match=r"; take --lora_r 16, or a smaller student$") as raised:
        vram.preflight(replace(plan, lora_r=0), flags, free=1000)
    assert raised.value.changes == {"lora_r": 16}
    assert raised.value.sentence(str).endswith("; take {'lora_r': 16}, or a smaller student")


def test_every_setting_of_a_training_has_its_flag(tiny_base):
    settings = DistillSettings(student=tiny_base, save_dir="runs/x", teacher=tiny_base, forward_kl=1.0)
    plan = settings.plan()
    flags = settings.memory_flags(plan.batch)
    for change, expected in (
        ({"batch": 1}, {"per_device_train_batch_size": 1}),
        ({"checkpointing": True}, {"gradient_checkpointing": "on"}),
        ({"teacher": None}, {"teacher_cache": "runs/x/teacher_cache"}),
        ({"four_bit": True}, {"load_in_4bit": "on"}),
        ({"max_len": 128}, {"max_len": 128}),
        ({}, {}),
    ):
        assert vram.changed_flags(plan, replace(plan, **change), flags) == expected


def test_plan_of_a_run_without_a_batch_and_of_an_adapter(tiny_base, tmp_path, monkeypatch):
    assert settings_of(tiny_base, max_len=1024).plan().batch == 16
    assert settings_of(tiny_base, max_len=10_000).plan(longest=900, completion_len=7).max_len == 900
    card = settings_of(tiny_base).plan(cuda=True)
    assert (card.batch, card.four_bit, card.checkpointing, card.cuda) == (1, True, True, True)
    common = {"student": tiny_base, "save_dir": "runs/x", "data": "-"}
    live = DistillSettings(**common, teacher=tiny_base, forward_kl=1.0).plan()
    assert live.teacher == live.student and live.terms == ("forward_kl",)
    assert DistillSettings(**common, layer_map="uniform", hidden_mse=1.0).plan().states
    assert DistillSettings(**common, teacher=tiny_base, teacher_cache="x").plan().teacher is None
    assert DistillSettings(**common, labels=True).plan().method == "sft"
    plan = vram.inference_plan(ModelSource(tiny_base), max_batch_tokens=512)
    assert (plan.adapters, plan.width, plan.offload) == (0, 4, False)
    (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{tiny_base}"}}')
    monkeypatch.setenv("OFFLOAD_FOLDER", str(tmp_path))
    plan = vram.inference_plan(ModelSource(str(tmp_path)))
    assert (plan.model, plan.adapters, plan.offload) == (shapes.of(tiny_base), 1, True)
    ranking = vram.inference_plan(ModelSource(tiny_base), generates=False)
    assert (ranking.adapters, ranking.batch_tokens) == (0, 2048)  # a CPU's


def test_what_the_scripts_call(tiny_base, tmp_path, capsys):
    import infer_creditmix

    settings = settings_of(tiny_base)
    assert run.within_memory(settings, None, longest=200, completion_len=5) == settings
    assert "adapter, gradients, AdamW" in capsys.readouterr().err
    args = cli.parse_args(infer_creditmix.build_parser(), ["--model_dir", tiny_base])
    source = source_of(args, tiny_base)
    assert vram.fit_inference(source, 8192, auto_fit=False) == (source, 8192)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("memory: 0.63 GB predicted at the peak of ") and line.endswith(" GB free")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    settings = settings_of(str(tmp_path))
    assert run.within_memory(settings, None, longest=200, completion_len=5) == settings
    unknown = source_of(args, str(tmp_path))
    assert vram.fit_inference(unknown, 512, auto_fit=False) == (unknown, 512)
    assert capsys.readouterr().err.count("the memory of gpt2 cannot be predicted") == 2


def test_inference_preflight_offloads_last(monkeypatch):
    monkeypatch.delenv("OFFLOAD_FOLDER", raising=False)
    plan = Inference(QWEN_7B, batch_tokens=4096)
    changes = vram.preflight(plan, vram.INFERENCE, auto_fit=True, free=int(5 * GB))
    assert set(changes) == {"OFFLOAD_FOLDER"}
    assert vram.os.environ.pop("OFFLOAD_FOLDER") == vram.OFFLOAD_FOLDER


def test_free_memory_and_wsl(tmp_path, monkeypatch):
    free = vram.free_bytes()
    assert 0 < free < 1 << 50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert 0.4 * free < vram.free_bytes() < 0.6 * free
    assert not vram.is_wsl()
    version = "Linux version 5.15.153.1-microsoft-standard-WSL2 (root@x) #1 SMP"
    monkeypatch.setattr(vram.Path, "read_text", lambda self: version)
    assert vram.is_wsl()


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "peft"):
    sys.modules[name] = None
from common.vram.__main__ import main
main(sys.argv[1:])
"""


def test_command_answers_without_weights_torch_or_network():
    words = ["--student", "Qwen/Qwen2.5-3B-Instruct", "--max_len", "1024", "--card_gb", "4"]
    told = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert told.stderr == ""
    lines = told.stdout.splitlines()
    total = predict(Training(QWEN_3B)).total
    assert f"predicted peak {total / GB:13.2f} GB".split() == lines[-2].split()
    assert lines[-1].startswith("too much for a card of 4 GB; it would fit with --max_len ")


@pytest.mark.parametrize("cuda", [True, False], ids=["cuda", "cpu"])
@pytest.mark.parametrize("kind", [TrainSettings, KdSettings, DpoSettings, DistillSettings, "with a teacher"])
def test_command_predicts_what_the_trainers_take(kind, cuda, capsys):
    """Of the settings that are not given each trainer's own."""
    more, words = {}, []
    if kind == "with a teacher":
        kind, more = DistillSettings, {"teacher": "Qwen/Qwen2.5-7B-Instruct"}
        words = ["--teacher", more["teacher"]]
    if kind is DistillSettings:
        more |= DEFAULT_WEIGHTS
    settings = kind(student="Qwen/Qwen2.5-3B-Instruct", save_dir="runs/x", **more)
    device = "cuda" if cuda else "cpu"
    command.main(["--student", settings.student, "--method", settings.method, "--device", device, *words])
    assert capsys.readouterr().out.strip() == predict(settings.plan(cuda=cuda)).table().strip()


def test_inference_on_a_cpu_is_not_in_4_bits(capsys):
    command.main(["--student", "Qwen/Qwen2.5-3B-Instruct", "--method", "infer", "--device", "cpu"])
    width = 2 if loading.has_bfloat16() else 4
    plan = Inference(QWEN_3B, width=width, **CPU)
    assert capsys.readouterr().out.strip() == predict(plan).table().strip()


def test_a_gguf_takes_its_file_and_the_keys_and_values_of_what_is_read():
    """In 16 bits, once for texts and once for a row; fewer tokens are all that saves."""
    plan = Packed(QWEN_3B, 2_000_000_000, 8192)
    parts, a_token = predict(plan).parts, 2 * 2 * 2 * 128 * 36
    assert parts["the GGUF"] == 2_000_000_000 and parts["key/value cache"] == 2 * 8192 * a_token
    assert predict(replace(plan, writes=False)).parts["key/value cache"] == 8192 * a_token
    fitted = vram.fit(plan, predict(plan).total - 1)
    assert fitted == replace(plan, batch_tokens=4096)
    assert vram.changed_flags(plan, fitted, vram.SERVER_PACKED) == {"MAX_BATCH_TOKENS": 4096}
    assert vram.fit(plan, 2_000_000_000) is None
