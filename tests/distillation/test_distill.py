"""distill_train.py: live against cached, resumed against unbroken, two processes against one; labels; refusals."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.inputs import CORPUS, GROUPS, LABELS, PROMPTS, write_rows
from support.models import build_base, distance, run_json
from support.processes import join

import distill_train
import sft_train
from common import cli
from common.cli import UserError
from common.distillation.label_objective import LabelDistillation
from common.distillation.objective import Objective, layer_pairs
from common.models import adapters, tokenizers
from common.models import loading as models
from common.models.source import ModelSource
from common.tasks.ranking import torch_ranker as label_ranking
from common.tasks.ranking.task import CREDITMIX
from common.training import batches as completions
from common.training import losses as distill_losses
from common.vram import formulas as peak_memory
from common.vram import preflight as vram

QUICK = ("--learning_rate", 0.01, "--logging_steps", 1, "--max_steps", 6, "--per_device_train_batch_size", 4,
         "--gradient_accumulation_steps", 1, "--lora_dropout", 0)  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer) -> str:
    """Wider and deeper than the student, on the same tokenizer."""
    return build_base(tmp_path_factory.mktemp("models") / "teacher", tokenizer, 0.3, hidden=48, layers=4, seed=5)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> str:
    """Rows whose completions differ in length."""
    rows = [{"input": PROMPTS[i], "output": CORPUS[i][: 3 + 5 * (i % 8)], "group": GROUPS[i]} for i in range(16)]
    return write_rows(tmp_path_factory.mktemp("uneven") / "rows.jsonl", rows)


def flags(student: str, save_dir: Path, *more: object) -> list[str]:
    return ["--student", student, "--save_dir", str(save_dir), *map(str, (*QUICK, *more))]


def distill(student: str, save_dir: Path, *more: object) -> Path:
    distill_train.main(flags(student, save_dir, *more))
    return save_dir


def column(folder: Path, name: str = "loss") -> list[float]:
    with open(folder / "loss.csv", newline="") as handle:
        return [float(row[name]) for row in csv.DictReader(handle) if row[name]]


OF_LOGITS = ("--forward_kl", 1, "--reverse_kl", 0.1, "--jsd", 0.1, "--ce", 0.5, "--teacher_ce", 0.2, "--temperature", 2)
ALL_TERMS = (*OF_LOGITS, "--hidden_mse", 0.1, "--hidden_cosine", 0.1)


def test_a_teacher_that_is_the_student_has_nothing_to_say(base, uneven, tmp_path):
    run = distill(base, tmp_path / "run", "--teacher", base, "--data", uneven, "--max_steps", 1, *ALL_TERMS,
                  "--attention_mse", 1)  # fmt: skip
    for name in ("forward_kl", "reverse_kl", "jsd", "hidden_mse", "hidden_cosine", "attention_mse"):
        assert column(run, name)[0] == pytest.approx(0, abs=1e-6), name
    assert column(run, "ce")[0] > 1


def test_the_terms_are_their_definitions(base, teacher, uneven, tmp_path):
    """The first logged losses against plain full-logit computations on the same rows."""
    run = distill(base, tmp_path / "run", "--teacher", teacher, "--data", uneven, "--max_steps", 1,
                  "--per_device_train_batch_size", 16, *OF_LOGITS, "--attention_mse", 1,
                  "--layer_map", "1:2,2:4")  # fmt: skip
    tokenizer = tokenizers.load_tokenizer(base)
    rows = [json.loads(line) for line in Path(uneven).read_text().splitlines()]
    encoded = [tokenizers.encode_pair(tokenizer, row["input"], row["output"]) for row in rows]
    inputs = completions.collate(encoded, tokenizer.pad_token_id)
    gold = inputs.pop("labels")[:, 1:]
    mask = gold != completions.IGNORE
    sums: dict[str, float] = dict.fromkeys(
        ("forward_kl", "reverse_kl", "jsd", "ce", "teacher_ce", "attention_mse"), 0.0
    )
    outputs = []
    for name in (base, teacher):
        model = models.load_base(ModelSource(name, dtype="float32")).eval()
        model.set_attn_implementation("eager")
        with torch.no_grad():
            outputs.append(model(**inputs, output_attentions=True))
    logits = [output.logits[:, :-1][mask].double() for output in outputs]
    both = len(tokenizer)  # the LM heads are padded beyond
    q, p = (x[:, :both].div(2).softmax(dim=-1) for x in logits)
    m = (p + q) / 2
    sums["forward_kl"] = 4 * (p * (p / q).log()).sum()
    sums["reverse_kl"] = 4 * (q * (q / p).log()).sum()
    sums["jsd"] = 2 * ((p * (p / m).log()).sum() + (q * (q / m).log()).sum())
    sums["ce"] = -logits[0].log_softmax(dim=-1).gather(1, gold[mask][:, None]).sum()
    sums["teacher_ce"] = (
        -logits[0].log_softmax(dim=-1).gather(1, logits[1][:, :both].argmax(dim=-1, keepdim=True)).sum()
    )
    for ours, theirs in ((0, 1), (1, 3)):
        maps = [
            output.attentions[i].mean(dim=1)[:, :-1][mask] for output, i in zip(outputs, (ours, theirs), strict=True)
        ]
        sums["attention_mse"] += (maps[0] - maps[1]).square().sum() / 2
    for name, value in sums.items():
        assert column(run, name)[0] == pytest.approx(float(value) / int(mask.sum()), rel=2e-4), name
    weights = {"forward_kl": 1, "reverse_kl": 0.1, "jsd": 0.1, "ce": 0.5, "teacher_ce": 0.2, "attention_mse": 1}
    assert column(run)[0] == pytest.approx(
        sum(weight * column(run, name)[0] for name, weight in weights.items()), rel=1e-5
    )


@pytest.mark.parametrize("layers", ["uniform", "2:1,1:3,2:3"])
def test_a_cache_of_everything_equals_the_live_teacher(layers, base, teacher, uneven, tmp_path):
    more = ("--teacher", teacher, "--data", uneven, *ALL_TERMS, "--layer_map", layers)
    live = distill(base, tmp_path / "live", *more)
    cached = distill(base, tmp_path / "cached", *more, "--teacher_cache", tmp_path / "cache", "--cache_k", 100_000)
    assert column(cached) == pytest.approx(column(live), abs=1e-3)
    for name in ("forward_kl", "reverse_kl", "jsd", "teacher_ce", "hidden_mse", "hidden_cosine"):
        assert column(cached, name) == pytest.approx(column(live, name), rel=0.01, abs=1e-3), name
    assert column(live)[-1] < column(live)[0]


def test_a_complete_cache_needs_no_teacher(base, teacher, uneven, tmp_path, monkeypatch):
    gone = tmp_path / "teacher"
    shutil.copytree(teacher, gone)
    more = ("--teacher", gone, "--data", uneven, "--teacher_cache", tmp_path / "cache", "--cache_k", 8)
    first = distill(base, tmp_path / "first", *more)
    monkeypatch.setattr(distill_train, "load_teacher", lambda *args: pytest.fail("the teacher was loaded"))
    again = distill(base, tmp_path / "again", *more, "--per_device_train_batch_size", 2,
                    "--gradient_accumulation_steps", 2)  # fmt: skip
    assert distance(first, again) < 1e-5  # accumulation changes nothing
    loss = column(first)
    assert loss[-1] < loss[0]


def test_draws_serve_as_well(base, teacher, uneven, tmp_path):
    more = ("--teacher", teacher, "--data", uneven, "--forward_kl", 1)
    live = distill(base, tmp_path / "live", *more)
    cache = ("--teacher_cache", tmp_path / "cache", "--cache_targets", "sampled", "--cache_k", 3000)
    drawn = distill(base, tmp_path / "drawn", *more, *cache)
    assert column(drawn) == pytest.approx(column(live), abs=0.05)


def test_an_interrupted_cache_goes_on(base, teacher, uneven, tmp_path, monkeypatch):
    from common.distillation import fill_cache as teacher_pass

    monkeypatch.setattr(teacher_pass, "SHARD_TOKENS", 10)
    add, shards = teacher_pass.TeacherCache.add, []

    def stop_at_the_third(self, rows, packed):
        if len(shards) == 2:
            raise KeyboardInterrupt
        shards.append(len(rows))
        add(self, rows, packed)

    more = ("--teacher", teacher, "--data", uneven, "--teacher_cache", tmp_path / "cache", "--max_batch_tokens", 200)
    monkeypatch.setattr(teacher_pass.TeacherCache, "add", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        distill(base, tmp_path / "run", *more)
    assert run_json(tmp_path / "run")["error"] == "interrupted"
    seen = []
    monkeypatch.setattr(
        teacher_pass.TeacherCache, "add", lambda self, rows, packed: (seen.extend(rows), add(self, rows, packed))
    )
    distill(base, tmp_path / "run", *more)
    assert len(seen) == 16 - sum(shards)


@pytest.mark.parametrize("auto_fit", [False, True])
def test_a_teacher_that_does_not_fit_is_said_before_it_is_loaded(
    auto_fit, base, teacher, uneven, tmp_path, monkeypatch
):
    """Its pass has a batch of its own; what training changes is another matter."""
    plan = vram.inference_plan(ModelSource(teacher), max_batch_tokens=1 << 20, generates=True)
    needed = vram.predict(replace(plan, generates=False, logits=peak_memory.CHUNK_LOGITS)).total
    free = iter([1 << 40, needed - 1])  # of the student's training, then of the teacher's pass
    monkeypatch.setattr(vram, "free_bytes", lambda: next(free))
    more = [
        "--teacher",
        teacher,
        "--data",
        uneven,
        "--teacher_cache",
        tmp_path / "cache",
        "--max_batch_tokens",
        1 << 20,
    ]
    if auto_fit:
        run = distill(base, tmp_path / "run", *more, "--auto_fit")
        assert run_json(run)["auto_fit"] == {"max_batch_tokens": 1 << 19}
    else:
        monkeypatch.setattr(distill_train, "load_teacher", lambda *args: pytest.fail("the teacher was loaded"))
        with pytest.raises(UserError, match=f"are free; --max_batch_tokens {1 << 19}"):
            distill(base, tmp_path / "run", *more)


@pytest.mark.parametrize("lora", ["--lora_r=4", "--lora_r=0"])
def test_resumed_equals_unbroken(lora, base, teacher, uneven, tmp_path):
    """With a projection between widths, which is trained too."""
    more = ("--teacher", teacher, "--data", uneven, "--hidden_mse", 1, "--forward_kl", 1, "--save_steps", 3, lora)
    unbroken, resumed = distill(base, tmp_path / "unbroken", *more), tmp_path / "resumed"
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copytree(unbroken / "checkpoints" / "checkpoint-3", resumed / "checkpoints" / "checkpoint-3")
    distill(base, resumed, *more, "--resume")
    name = "model.safetensors" if lora == "--lora_r=0" else "adapter_model.safetensors"
    a, b = (load_file(run / name) for run in (unbroken, resumed))
    assert a.keys() == b.keys()
    assert not any("extra" in key for key in a)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert column(resumed)[-3:] == column(unbroken)[-3:]


def test_full_fine_tuning_trains_every_weight(base, uneven, tmp_path):
    sft_train.main(["--data", uneven, *flags(base, tmp_path / "run", "--lora_r", 0)])
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (base, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert not adapters.is_adapter(tmp_path / "run")
    models.load_for_inference(ModelSource(str(tmp_path / "run")))
    for more, words in ((["--load_in_4bit", "on"], "--load_in_4bit"), (["--init_adapter", "x"], "--init_adapter")):
        with pytest.raises(UserError, match=f"neither in 4 bits nor from an adapter; leave {words} out"):
            sft_train.main(["--data", uneven, *flags(base, tmp_path / "other", "--lora_r", 0, *more)])


def test_the_best_epoch_is_kept(base, uneven, tmp_path):
    """Judged by rows that say the opposite of what is trained: every epoch makes it worse, so the first is the best."""
    other = write_rows(tmp_path / "other.jsonl", [{"input": p, "output": "Bad"} for p in PROMPTS[:8]])
    data = write_rows(tmp_path / "rows.jsonl", [{"input": p, "output": "Good"} for p in PROMPTS[:8]])
    argv = flags(
        base, tmp_path / "run", "--max_steps", -1, "--epochs", 6, "--eval_data", other, "--learning_rate", 0.05
    )
    sft_train.main(["--data", data, *argv])
    held_out = column(tmp_path / "run", "eval_loss")
    best = run_json(tmp_path / "run")["best"]
    assert best["eval_loss"] == min(held_out) < held_out[-1]
    assert best["step"] == 2 * (held_out.index(min(held_out)) + 1)
    model, tokenizer = models.load_for_inference(ModelSource(str(tmp_path / "run"), dtype="float32"))
    rows = [tokenizers.encode_pair(tokenizer, p, "Bad") for p in PROMPTS[:8]]
    loss = [completions.completion_loss(model, completions.collate(rows[i : i + 4], 0))[0].item() for i in (0, 4)]
    assert sum(loss) / 2 == pytest.approx(best["eval_loss"], abs=1e-3)
    assert not (tmp_path / "run" / "best.json").exists()


def test_progress_is_told_as_it_goes(base, teacher, uneven, tmp_path):
    run = distill(base, tmp_path / "run", "--teacher", teacher, "--data", uneven)
    lines = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert {line["max_steps"] for line in lines} == {6}
    assert [line["forward_kl"] for line in lines[1:]] == column(run, "forward_kl")
    assert "loss" not in lines[0]


def test_gradient_checkpointing_and_chunks_change_nothing(base, teacher, uneven, tmp_path, monkeypatch):
    more = ("--teacher", teacher, "--data", uneven, *ALL_TERMS)
    plain = distill(base, tmp_path / "plain", *more)
    checkpointed = distill(base, tmp_path / "checkpointed", *more, "--gradient_checkpointing", "on")
    monkeypatch.setattr(distill_losses, "CHUNK_LOGITS", 3 * 420)
    monkeypatch.setattr(distill_losses.summed_in_chunks, "__kwdefaults__", {"chunk_logits": 3 * 420})
    chunked = distill(base, tmp_path / "chunked", *more)
    assert distance(plain, checkpointed) < 1e-5
    assert distance(plain, chunked) < 1e-5


def test_padded_vocabularies(base, uneven, tokenizer, tmp_path):
    """The teacher's LM head is wider, as Qwen2.5's 7B is beside its 3B; its weights are the student's otherwise."""
    wide = models.load_base(ModelSource(base, dtype="float32"))
    wide.resize_token_embeddings(wide.config.vocab_size + 24, mean_resizing=False)
    wide.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    run = distill(base, tmp_path / "run", "--teacher", tmp_path / "wide", "--data", uneven, "--max_steps", 1)
    assert column(run, "forward_kl")[0] == pytest.approx(0, abs=1e-6)


# Two processes.


def table(folder: Path) -> dict[str, list[float]]:
    """What was logged: the loss, each of its terms, the learning rate."""
    with open(folder / "loss.csv", newline="") as handle:
        names = next(csv.reader(handle))
    return {name: column(folder, name) for name in names}


def equal(two: Path, one: Path) -> None:
    tables = table(two), table(one)
    assert tables[0].keys() == tables[1].keys()
    for name, values in tables[0].items():
        assert values == pytest.approx(tables[1][name], abs=1e-5 if name == "loss" else 2e-5), name  # terms are rounded
    records = run_json(two), run_json(one)
    assert records[0]["effective_batch"] == records[1]["effective_batch"] == 4
    assert records[0]["final_loss"] == pytest.approx(records[1]["final_loss"], abs=1e-5)
    if adapters.is_adapter(one):
        assert distance(two, one) < 1e-5
    else:
        a, b = (load_file(folder / "model.safetensors") for folder in (two, one))
        assert a.keys() == b.keys()
        assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5


@pytest.mark.parametrize(
    "more",
    [
        ("--forward_kl", 1, "--ce", 0.5, "--temperature", 2),
        ("--forward_kl", 1, "--hidden_mse", 1, "--lora_r", 0),
        ("--hidden_mse", 1, "--hidden_cosine", 0.1, "--layer_map", "1:1"),
        ("--attention_mse", 1, "--layer_map", "1:1", "--lora_r", 0),
    ],
    ids=["lora", "all weights and a projection", "an inner layer and a projection", "attention of an inner layer"],
)
def test_two_processes_equal_one(more, base, teacher, uneven, spawn, tmp_path):
    """Beside a live teacher. Some objectives give the later layers no gradient, for which nobody must wait."""
    more = ("--teacher", teacher, "--data", uneven, "--learning_rate", 0.001, *more)
    argv = flags(base, tmp_path / "two", *more, "--per_device_train_batch_size", 2)
    children = spawn.ranks(distill_train.main, argv, tmp_path)
    one = distill(base, tmp_path / "one", *more)
    join(children, tmp_path)
    equal(tmp_path / "two", one)


def test_two_processes_write_a_cache_and_train_from_it(base, teacher, uneven, spawn, tmp_path):
    more = ("--teacher", teacher, "--data", uneven, "--forward_kl", 1, "--ce", 0.5, "--hidden_mse", 1, "--cache_k", 16)
    theirs = ("--teacher_cache", tmp_path / "theirs")
    argv = flags(base, tmp_path / "two", *more, *theirs, "--per_device_train_batch_size", 2)
    children = spawn.ranks(distill_train.main, argv, tmp_path)
    mine = distill(base, tmp_path / "mine", *more, "--teacher_cache", tmp_path / "mine_cache")
    join(children, tmp_path)
    equal(tmp_path / "two", distill(base, tmp_path / "one", *more, *theirs))  # which finds the cache complete
    assert len(list((tmp_path / "theirs").glob("*.rows"))) == 2  # each wrote its share
    assert column(mine) == pytest.approx(column(tmp_path / "two"), abs=1e-3)  # float16, of other batches


def test_two_processes_of_labels_equal_one(base, labelled, spawn, tmp_path):
    more = ("--labels", "--data", labelled, "--forward_kl", 1, "--ce", 0.5, "--learning_rate", 0.001)
    children = spawn.ranks(
        distill_train.main, flags(base, tmp_path / "two", *more, "--per_device_train_batch_size", 2), tmp_path
    )
    one = distill(base, tmp_path / "one", *more)
    join(children, tmp_path)
    equal(tmp_path / "two", one)


def test_resumed_on_an_inner_layer(base, teacher, uneven, spawn, tmp_path):
    """The later layers stay out of training when a checkpoint is loaded, too."""
    more = ("--teacher", teacher, "--data", uneven, "--hidden_mse", 1, "--layer_map", "1:1", "--save_steps", 3)
    one, two = distill(base, tmp_path / "one", *more), tmp_path / "two"
    (two / "checkpoints").mkdir(parents=True)
    shutil.copytree(one / "checkpoints" / "checkpoint-3", two / "checkpoints" / "checkpoint-3")
    argv = flags(base, two, *more, "--resume", "--per_device_train_batch_size", 2)
    join(spawn.ranks(distill_train.main, argv, tmp_path), tmp_path)
    equal(two, one)


def test_without_a_teacher_it_is_plain_training(base, uneven, tmp_path):
    run = distill(base, tmp_path / "run", "--ce", 1, "--data", uneven)
    sft_train.main(["--data", uneven, *flags(base, tmp_path / "sft")])
    assert distance(run, tmp_path / "sft") == 0


def test_text_and_squad_and_teacher_text_are_read(base, teacher, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(CORPUS[:3]))
    run = distill(base, tmp_path / "text", "--teacher", teacher, "--data", text, "--max_len", 32, "--eval_data", text,
                  "--max_steps", 2)  # fmt: skip
    assert run_json(run)["data"]["rows"] == 1
    assert column(run, "eval_loss")
    answers = [{"text": "lamps", "answer_start": 11}]
    questions = [{"id": str(i), "question": f"What does Acme make, {i}?", "answers": answers} for i in range(4)]
    paragraph = {"context": "Acme makes lamps.", "qas": questions}
    articles = [{"title": f"article {i}", "paragraphs": [paragraph]} for i in range(12)]
    (tmp_path / "squad.json").write_text(json.dumps({"version": "1.1", "data": articles}))
    distill(base, tmp_path / "squad", "--teacher", teacher, "--data", tmp_path / "squad.json", "--max_steps", 1)
    rows = write_rows(tmp_path / "kd.jsonl", [{"input": p, "teacher_output": "Good", "text": "?"} for p in PROMPTS[:4]])
    run = distill(base, tmp_path / "kd", "--teacher", teacher, "--data", rows, "--max_steps", 1)
    assert run_json(run)["settings"]["forward_kl"] == 0.5  # what counted, also by default
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [{"text": line} for line in CORPUS[:4]])
    distill(base, tmp_path / "dataset_run", "--teacher", teacher, "--dataset", folder, "--max_steps", 1)
    with pytest.raises(UserError, match=r"has the columns text; name that of the text by --text_column"):
        distill(base, tmp_path / "other", "--teacher", teacher, "--dataset", folder, "--text_column", "body")


# Labels.


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> str:
    rows = []
    for i in range(16):
        p = [0.7, 0.2, 0.1]
        probabilities = dict(zip(LABELS, p[i % 3 :] + p[: i % 3], strict=True))
        rows.append({"input": PROMPTS[i], "probabilities": probabilities, "output": LABELS[i % 3], "group": GROUPS[i]})
    del rows[0]["output"], rows[1]["probabilities"]
    return write_rows(tmp_path_factory.mktemp("labelled") / "rows.jsonl", rows)


def test_label_scores_in_training_are_the_rankers(base):
    model, tokenizer = models.load_for_inference(ModelSource(base, dtype="float32"))
    texts = [prompt.removeprefix(CREDITMIX.prompt("")) for prompt in PROMPTS[:5]]
    expected = label_ranking.LabelRanker(model, tokenizer, CREDITMIX).raw_scores(texts)
    loss = LabelDistillation(Objective({"forward_kl": 1.0, "ce": 1.0}, temperature=2.0), tokenizer, CREDITMIX)
    p = torch.tensor([0.6, 0.3, 0.1])
    facts = {"probabilities": dict(zip(LABELS, p.tolist(), strict=True)), "output": "Bad"}
    rows = [{"input": CREDITMIX.prompt(text), **facts} for text in texts]
    batch = loss.collate(loss.encode("rows", rows, 1024))
    with torch.no_grad():
        total, terms = loss(model, batch)
    q = torch.tensor(expected).div(2).log_softmax(dim=-1)
    soft = (p.log() / 2).softmax(dim=-1)
    assert float(terms["forward_kl"]) == pytest.approx(
        float(4 * (soft * (soft.log() - q)).sum(dim=-1).mean()), abs=1e-4
    )
    answers = [tokenizers.encode_pair(tokenizer, row["input"], "Bad") for row in rows]
    single = [completions.completion_loss(model, completions.collate([row], 0))[0].item() for row in answers]
    assert float(terms["ce"]) == pytest.approx(sum(single) / len(single), abs=1e-4)
    assert float(total) == pytest.approx(float(terms["forward_kl"] + terms["ce"]), abs=1e-6)


def test_labels_learn_the_teachers_distribution(base, labelled, tmp_path):
    more = ("--labels", "--data", labelled, "--max_steps", 40)
    run = distill(base, tmp_path / "run", *more)
    kl = column(run, "forward_kl")
    assert sum(kl[-4:]) < sum(kl[:4]) / 3
    parts = distill(base, tmp_path / "parts", *more, "--per_device_train_batch_size", 2,
                    "--gradient_accumulation_steps", 2)  # fmt: skip
    assert column(parts)[:3] == pytest.approx(column(run)[:3], abs=1e-4)


def test_judging_needs_gold(base, labelled, tmp_path):
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"input": PROMPTS[0], "probabilities": dict(zip(LABELS, (1, 0, 0), strict=True))}]
    )
    with pytest.raises(UserError, match="no row with an output to judge by"):
        distill(base, tmp_path / "run", "--labels", "--data", labelled, "--eval_data", rows)
    assert not (tmp_path / "run").exists()
    run = distill(base, tmp_path / "run", "--labels", "--data", rows, "--reverse_kl", 1)
    assert all(0 <= value < 100 for value in column(run))  # a label that the teacher rules out is no infinity


def test_every_row_says_something(base, labelled, tmp_path):
    good = {"input": PROMPTS[0], "output": "Good"}
    for row, words in (
        ({"input": PROMPTS[0]}, "neither probabilities nor an output"),
        ({**good, "probabilities": {"Good": 1.0}}, "must have the labels Good, Standard, Bad"),
        ({**good, "probabilities": dict.fromkeys(LABELS, 0.5)}, "add up to 1.5, not to 1"),
        ({**good, "probabilities": dict.fromkeys(LABELS, "x")}, "numbers from 0 to 1"),
        ({"input": PROMPTS[0], "output": "Fine"}, "'Fine' is none of the labels"),
    ):
        data = write_rows(tmp_path / "rows.jsonl", [good, row])
        with pytest.raises(UserError, match=f"rows.jsonl, line 2: .*{words}"):
            distill(base, tmp_path / "run", "--labels", "--data", data)
    assert not (tmp_path / "run").exists()


# Flags.


def parsed(*argv: object):
    base = ["--student", "s", "--save_dir", "x", "--data", "d.jsonl"]
    return cli.parse_args(distill_train.build_parser(), [*base, *map(str, argv)])


def test_weights_of_two_other_recipes_have_one_meaning(tmp_path):
    gemma = parsed("--alpha_ce", 1.0, "--beta_mse", 0.1, "--gamma_kl", 0.5)
    assert distill_train.resolve_weights(gemma) == {"ce": 1.0, "hidden_mse": 0.1, "forward_kl": 0.5}
    gpt2 = parsed("--alpha_kl", 0.7, "--beta_ce", 0.3, "--gamma_mse", 0.05, "--delta_cos", 0.05, "--epsilon_attn", 0)
    expected = {"forward_kl": 0.7, "teacher_ce": 0.3, "hidden_mse": 0.05, "hidden_cosine": 0.05}
    assert distill_train.resolve_weights(gpt2) == expected
    assert distill_train.resolve_weights(parsed()) == {"forward_kl": 0.5, "ce": 0.5}
    (tmp_path / "c.yaml").write_text(
        "teacher_model_name: t\ngamma_kl: 0.5\nper_device_batch_size: 2\ngrad_accum_steps: 8\nlr: 0.1\n"
    )
    args = parsed("--config", tmp_path / "c.yaml")
    found = (args.teacher, args.forward_kl, args.per_device_train_batch_size, args.gradient_accumulation_steps)
    assert (*found, args.learning_rate) == ("t", 0.5, 2, 8, 0.1)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--forward_kl", -1), "weight must be 0 or above"),
        (("--forward_kl", 0), "every loss term has the weight 0"),
        (("--temperature", 0), "--temperature 0.0 must be above 0"),
        ((), "--teacher is missing; forward_kl needs one"),
        (("--ce", 1, "--teacher_cache", "c"), "--teacher_cache without --teacher"),
        (("--teacher", "BASE", "--cache_targets", "sampled"), "--cache_targets is of --teacher_cache"),
        (("--ce", 1, "--teacher", "BASE"), "--ce alone asks nothing of the teacher"),
        (("--teacher", "t", "--dataset", "wikitext"), "either --data FILE or --dataset NAME"),
        (("--teacher", "t", "--task", "f.yaml"), "give --labels with it"),
        (("--labels", "--teacher", "t"), "teacher_generate.py --probabilities"),
        (("--labels", "--hidden_mse", 1), "--hidden_mse compares what is inside models"),
        (("--teacher", "BASE", "--teacher_cache", "c", "--attention_mse", 1), "needs a live teacher"),
        (("--teacher", "BASE", "--teacher_cache", "c", "--cache_targets", "sampled", "--jsd", 1),
         "--jsd needs --cache_targets topk"),
        (("--teacher", "BASE", "--layer_map", "1:9"), "the student has the layers 1 to 2, the teacher 1 to 2"),
        (("--teacher", "BASE", "--layer_map", "first"), "is not last, uniform or pairs"),
        (("--teacher", "./nowhere"), "nowhere does not exist"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(more, words, base, uneven, tmp_path):
    more = [base if word == "BASE" else word for word in more]
    with pytest.raises(UserError, match=words):
        distill(base, tmp_path / "run", "--data", uneven, *more)


def test_another_tokenizer_is_refused_with_the_ways_that_work(base, uneven, tmp_path):
    from common.training import miniature

    other = tokenizers.align(miniature.build_tokenizer([text.upper() for text in CORPUS], vocab_size=400))
    stranger = build_base(tmp_path / "stranger", other)
    with pytest.raises(UserError, match=r"different vocabularies \(.*\); two ways work: .*kd_train.py.*--labels"):
        distill(base, tmp_path / "run", "--data", uneven, "--teacher", stranger)


def test_layer_maps():
    assert layer_pairs("last", 4, 12) == [(4, 12)]
    assert layer_pairs("uniform", 4, 12) == [(1, 3), (2, 6), (3, 9), (4, 12)]
    assert layer_pairs("uniform", 4, 2) == [(1, 1), (2, 1), (3, 2), (4, 2)]  # layer 0 would be the embeddings
    assert layer_pairs("2:5,4:9", 4, 12) == [(2, 5), (4, 9)]


def test_an_adapter_with_dropout_goes_on_learning(base, teacher, uneven, tmp_path):
    """Large weights and much of dropout: two passes through it never agree."""
    more = ("--teacher", teacher, "--data", uneven, "--lora_dropout", 0.5)
    first = distill(base, tmp_path / "first", *more, "--learning_rate", 0.5)
    again = distill(base, tmp_path / "again", *more, "--init_adapter", first)
    assert run_json(again)["state"] == "done"


def test_mixed_precision(base, teacher, uneven, tokenizer):
    """As on CUDA: bfloat16 weights, and a forward pass whose outputs, but not its insides, are turned into float32."""
    from accelerate.utils.operations import convert_outputs_to_fp32

    from common.distillation.objective import DistillationLoss, LiveTeacher, Reader, Used, projections

    rows = [json.loads(line) for line in Path(uneven).read_text().splitlines()]
    batch = completions.collate([tokenizers.encode_pair(tokenizer, row["input"], row["output"]) for row in rows[:4]], 0)
    student = models.load_base(ModelSource(base, dtype="bfloat16"), training=True)
    used = Used(Objective({"forward_kl": 1.0, "ce": 1.0, "hidden_mse": 1.0}), [(1, 1), (2, 2)], len(tokenizer))
    reader = Reader(student, [1, 2])
    student.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(student.forward))
    equal = LiveTeacher(Reader(models.load_base(ModelSource(base, dtype="float32")).eval(), [1, 2]), used)
    loss, terms = DistillationLoss(used, reader, equal)(student, batch)
    loss.backward()
    assert 0 <= terms["forward_kl"] < 0.01  # the teacher is the student, in float32
    assert 0 <= terms["hidden_mse"] < 0.01
    assert terms["ce"] > 1
    wider = LiveTeacher(Reader(models.load_base(ModelSource(teacher, dtype="float32")).eval(), [1, 2]), used)
    loss, terms = DistillationLoss(used, reader, wider, projections(32, 48, 2, seed=0))(student, batch)
    loss.backward()
    assert terms["hidden_mse"] > 0


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_other_architectures_are_read(kind):
    """Gemma 2 caps its logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from common.distillation.objective import Reader

    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    other = {
        "gpt2": {},
        "llama": {"intermediate_size": 64, "num_key_value_heads": 2},
        "gemma2": {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 0.05},
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shape, **other[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    reader = Reader(model)
    ids = torch.arange(20).view(2, 10)
    made = reader.logits(reader.read(model, {"input_ids": ids}).last)
    assert torch.allclose(made, model(input_ids=ids).logits, atol=1e-5)
