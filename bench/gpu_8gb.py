"""The 8 GB promise, measured: peak memory and speed of every use of a 3B model on a card capped at 8 GB.

    python bench/gpu_8gb.py
    python bench/gpu_8gb.py --card_gb 6 --lengths 512 1024

On a CUDA machine it builds Qwen2.5-3B's exact shape with random weights, layer by layer, in NF4; caps the process at
the card less the desktop and what the driver takes; and runs SFT, KD, DPO and cached distillation at each length, label
ranking, constrained JSON and four adapters on one base. Without a GPU the same code runs a miniature in float32, its
memory counted allocation by allocation, and the card's figures are predicted, "not measured". The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from harness.memory import held_bytes, tracked_peak

from common import cli
from common.models.batching import LOGITS_AT_ONCE
from common.vram import model_shape as shapes
from common.vram import preflight as vram
from common.vram.formulas import BFLOAT16, FLOAT32, GB, Inference, Plan, Training, predict, runtime_bytes

if TYPE_CHECKING:
    from common.training.trainer import TrainingRows

SERVING_GB = 4.0  # that four adapters are to be served within
ADAPTERS = 4
ANSWER_SHARE = 4  # a quarter of a row is completion, at least one label
CACHED = 64  # outcomes a token in the teacher's cache
MINIATURE = shapes.QWEN_3B | {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
ITEM = {"type": "object", "properties": {"name": {"type": "string"}, "price": {"type": "number"}}}
SCHEMA = {"type": "object", "properties": {"items": {"type": "array", "items": ITEM}}, "required": ["items"]}
LEAST_ROWS = 8  # as many as DPO's reference pass reads at once
NEW_TOKENS, PROMPT_TOKENS = 64, 192  # of a document that is written
SCORED = 256  # positions at most that logits are made for, with rows of that length and three labels
TEXT_DIGITS = 200  # of a text whose labels are ranked; a digit is a token


@dataclass
class Row:
    """One use at one length: bytes of tensors predicted and at their peak, tokens a second; None is not measured."""

    name: str
    tokens: int
    predicted: int
    measured: int | None = None
    tokens_per_s: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return self.predicted / self.measured if self.measured else None


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/gpu_8gb.py")
    parser.add_argument(
        "--card_gb", type=float, default=8.0, help=f"size of the card; {vram.DESKTOP} are the desktop's"
    )
    parser.add_argument("--lengths", type=cli.positive_int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--steps", type=cli.positive_int, default=4, help="optimizer steps a row; the first warms up")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    if args.steps < 2:
        raise cli.UserError("--steps must be above 1: the first one warms up")

    import torch

    cuda = torch.cuda.is_available()
    room = int((args.card_gb - vram.DESKTOP) * GB)
    settings = {**vars(args), "device": torch.cuda.get_device_name() if cuda else "CPU"}
    tables: dict[str, list[Row]] = {}
    if cuda:
        cap(room)
        tables["card"] = measure(shapes.QWEN_3B, args.lengths, args.steps, room)
    else:
        tables["miniature"] = measure(MINIATURE, args.lengths, args.steps, room)
        shape = shapes.from_config(shapes.QWEN_3B)
        tables["card"] = [row_of(name, plan) for name, plan in plans(shape, args.lengths, room, cuda=True)]
    for name, rows in tables.items():
        print_rows({"miniature": "a miniature on this CPU", "card": "Qwen2.5-3B on the card"}[name], rows)
    report = {name: [{**vars(row), "ratio": row.ratio} for row in rows] for name, rows in tables.items()}
    runtime = driver_bytes() if cuda else None
    print(json.dumps({"bench": "gpu_8gb", "settings": settings, "runtime_bytes": runtime, **report}))


def cap(room: int) -> None:
    """No more of the card than `room` bytes for this process, what the driver takes for it included."""
    import torch

    share = (room - runtime_bytes(cuda=True)) / torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))


def driver_bytes() -> int:
    """What the card has lost beside torch's own blocks: this process's context, where nobody else is on the card."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def plans(shape: shapes.ModelShape, lengths: Sequence[int], room: int, cuda: bool) -> Iterator[tuple[str, Plan]]:
    """What is run, by name. On a CPU all is float32 without checkpointing, as the trainers do it there."""
    for length in lengths:
        plan = Training(
            shape,
            max_len=length,
            completion_len=length // ANSWER_SHARE,
            four_bit=cuda,
            checkpointing=cuda,
            cuda=cuda,
        )
        yield "sft", replace(plan, completion_len=1)
        yield "kd", plan
        yield "dpo", replace(plan, method="dpo", lora_dropout=0.0)
        yield "distill, cached", replace(plan, method="distill")
    serving = Inference(
        shape,
        logits=min(LOGITS_AT_ONCE, SCORED * shape.vocabulary),
        adapters=ADAPTERS,
        four_bit=cuda,
        width=BFLOAT16 if cuda else FLOAT32,
        cuda=cuda,
    )
    serving = vram.fit(serving, min(room, int(SERVING_GB * GB))) or serving
    yield "label ranking", replace(serving, adapters=1, generates=False)
    yield "constrained JSON", replace(serving, adapters=1, batch_tokens=serving.batch_tokens // 4)
    yield f"serving {ADAPTERS} adapters", serving


def row_of(name: str, plan: Plan) -> Row:
    tokens = plan.max_len if isinstance(plan, Training) else plan.batch_tokens
    return Row(name, tokens, predict(plan).tensors)


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """A table; a measured row has the ratio of predicted to measured."""
    print(f"\n{title}\n{'':22} {'tokens':>6} {'predicted':>13} {'measured':>13} {'ratio':>6} {'tokens/s':>9}")
    for row in rows:
        measured = f"{row.measured / 1e6:10,.1f} MB" if row.measured else "not measured"
        ratio = f"{row.ratio:6.3f}" if row.ratio else ""
        speed = f"{row.tokens_per_s:9,.0f}" if row.tokens_per_s else ""
        print(
            f"{row.name:22} {row.tokens:6} {row.predicted / 1e6:10,.1f} MB {measured:>13} {ratio:>6} {speed:>9}",
            row.note,
        )
    print()


# What is measured


def measure(config: dict[str, Any], lengths: Sequence[int], steps: int, room: int) -> list[Row]:
    """A row for each of `plans`, run on the card if there is one, else on the CPU."""
    import torch

    from common.models import loading as models
    from common.models import tokenizers
    from common.training import miniature

    models.quiet_libraries()
    cuda = torch.cuda.is_available()
    tokenizer = tokenizers.align(miniature.build_tokenizer(["Total: 0123456789"] * 8, 400))
    base = random_model(config, four_bit=cuda, device="cuda" if cuda else "cpu")
    rows = []
    for name, plan in plans(shapes.from_config(config), lengths, room, cuda):
        row = row_of(name, plan)
        student = with_adapters(base, plan)
        if isinstance(plan, Training):
            work = trained(name, plan, student, tokenizer, steps)
        else:
            work = asked(name, plan, student, tokenizer)
        try:
            row.measured, row.tokens_per_s = peak_of(student, work)
        except torch.OutOfMemoryError:
            row.note = "out of memory"
        rows.append(row)
        cli.log(f"{name}, {row.tokens} tokens: {row.note or f'{row.measured / 1e6:,.1f} MB'}")
        base = student.unload()
        del student, work
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def peak_of(student: Any, work: Callable[[], float]) -> tuple[int, float | None]:
    """(bytes of tensors at the peak of `work`, tokens a second, which it returns; None under the allocator's log)."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        speed = work()
        return torch.cuda.max_memory_allocated(), speed
    return held_bytes(student) + tracked_peak(work), None


def random_model(config: dict[str, Any], *, four_bit: bool, device: str) -> Any:
    """A Qwen2 of random weights, made on `device` a module at a time: bfloat16 and NF4 where `four_bit`, else float32.

    The whole model never exists in 16 bits, and nothing is read or written.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings = Qwen2Config(**{name: value for name, value in config.items() if name != "model_type"}, use_cache=False)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(settings)
    dtype = torch.bfloat16 if four_bit else torch.float32
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head" and four_bit:
            model.set_submodule(name, random_nf4(module, device))
        elif not (name == "lm_head" and settings.tie_word_embeddings):
            for key, parameter in list(module.named_parameters(recurse=False)):
                weight = torch.randn(parameter.shape, dtype=dtype, device=device) * 0.02 + ("norm" in name)
                setattr(module, key, torch.nn.Parameter(weight, requires_grad=False))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(settings).to(device)
    model.is_loaded_in_4bit = four_bit  # PEFT and TRL ask
    return model


def random_nf4(linear: Any, device: str) -> Any:
    """A Linear4bit of random weights in place of `linear`, as `models.load_base` has them."""
    import bitsandbytes
    import torch

    outputs, inputs = linear.weight.shape
    four_bit = bitsandbytes.nn.Linear4bit(
        inputs, outputs, linear.bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16, device=device) * 0.02
    four_bit.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=four_bit).to(
        device
    )
    if linear.bias is not None:
        four_bit.bias = torch.nn.Parameter(torch.zeros(outputs, dtype=torch.bfloat16, device=device), False)
    four_bit.support_avx512bf16_for_cpu = False
    return four_bit


def with_adapters(base: Any, plan: Plan) -> Any:
    """The base under a fresh adapter, or as many as are served."""
    from common.models import adapters

    dropout = plan.lora_dropout if isinstance(plan, Training) else 0.0
    student = adapters.add_lora(base, r=plan.lora_r, alpha=2 * plan.lora_r, dropout=dropout, seed=0)
    for number in range(1, plan.adapters if isinstance(plan, Inference) else 1):
        student.add_adapter(f"adapter_{number}", student.peft_config["default"])
    if isinstance(plan, Inference):
        adapters.make_inference_adapters(student)
    return student


def trained(name: str, plan: Training, student: Any, tokenizer: Any, steps: int) -> Callable[[], float]:
    """Work that trains for `steps` steps with the trainer of that name, on rows of random tokens."""
    import torch
    from transformers import PrinterCallback, TrainerCallback

    from common.models.tokenizers import Encoded
    from common.training import dpo
    from common.training.completion import completion_rows
    from common.training.settings import DpoSettings, TrainSettings
    from common.training.trainer import fitted_trainer

    student.enable_input_require_grads()
    ids = torch.randint(0, len(tokenizer), (max(steps, LEAST_ROWS), plan.max_len)).tolist()
    cut = plan.max_len - plan.completion_len if plan.completion_len else 1
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(time.perf_counter())

    def work() -> float:
        with tempfile.TemporaryDirectory() as folder:
            settings = (DpoSettings if name == "dpo" else TrainSettings)(
                student="-",
                save_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=1,
                lora_dropout=plan.lora_dropout,
            )
            if name == "dpo":
                pairs = [dpo.EncodedPair(row[:cut], row[cut:], row[cut:-1]) for row in ids]
                trainer = dpo.build_trainer(settings, student, tokenizer, pairs)
            else:
                data = completion_rows([Encoded(row, cut) for row in ids], tokenizer, student)
                if name == "distill, cached":
                    data = from_cache(plan, student, data)
                trainer = fitted_trainer(settings, student, tokenizer, data)
            trainer.add_callback(Clock)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return plan.tokens / statistics.median(after - before for before, after in pairwise(marks))

    return work


def from_cache(plan: Training, student: Any, data: TrainingRows) -> TrainingRows:
    """The same rows under forward KL to the few outcomes that a teacher's cache holds, here random ones."""
    import torch

    from common.distillation.objective import DistillationLoss, HiddenStateReader, Objective, Signals
    from common.training.batches import IGNORE

    vocabulary = plan.student.vocabulary

    def with_teacher(batch: Sequence[Any]) -> dict[str, Any]:
        tensors = data.collate(batch)
        n = int((tensors["labels"][:, 1:] != IGNORE).sum())
        logprobs = torch.randn(n, CACHED).log_softmax(-1) - 0.1
        ids = torch.randint(0, vocabulary, (n, CACHED))
        return tensors | {"teacher": {"ids": ids, "rest": 1 - logprobs.exp().sum(-1), "logprobs": logprobs}}

    signals = Signals(Objective({"forward_kl": 1.0}), (), vocabulary)
    loss = DistillationLoss(signals, HiddenStateReader(student.get_base_model()), None)
    return replace(data, collate=with_teacher, loss=loss)


def asked(name: str, plan: Inference, student: Any, tokenizer: Any) -> Callable[[], float]:
    """Work that ranks labels with each adapter in turn, writes JSON documents, or does the one, then the other."""
    import random

    from common.generation.decoding import Decoding
    from common.generation.generate import generate
    from common.generation.json_grammar import JsonGrammar
    from common.tasks.ranking.creditmix import CREDITMIX
    from common.tasks.ranking.torch_ranker import TorchRanker

    student.eval()
    rng = random.Random(0)
    texts = ["".join(rng.choices("0123456789", k=TEXT_DIGITS)) for _ in range(2 * plan.batch_tokens // TEXT_DIGITS)]

    def rank() -> float:
        ranker = TorchRanker(student, tokenizer, CREDITMIX, plan.batch_tokens)
        ranker.max_batch_tokens = plan.batch_tokens  # as many on a CPU, whose memory stands for a card's
        started = time.perf_counter()
        for adapter in student.peft_config:
            student.set_adapter(adapter)
            ranker.prefixes.clear()  # they are of the adapter before
            ranker.raw_scores(texts)
        return len(student.peft_config) * len(texts) * TEXT_DIGITS / (time.perf_counter() - started)

    def write() -> float:
        grammar = JsonGrammar(SCHEMA, tokenizer, plan.model.vocabulary)
        count = plan.batch_tokens // (PROMPT_TOKENS + NEW_TOKENS)
        prompts = [rng.choices(range(10, len(tokenizer)), k=PROMPT_TOKENS) for _ in range(count)]
        started = time.perf_counter()
        answers = generate(
            student,
            tokenizer,
            prompts,
            Decoding(NEW_TOKENS),
            steering=grammar.rows(NEW_TOKENS),
            max_batch_tokens=plan.batch_tokens,
        )
        return sum(len(answer.tokens) for (answer,) in answers) / (time.perf_counter() - started)

    def serve() -> float:
        speed = rank()
        write()
        return speed

    return {"constrained JSON": write, "label ranking": rank}.get(name, serve)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
