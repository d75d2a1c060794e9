"""Distillation from a teacher's own distributions: token by token, its hidden states too, or label by label.

    python distill_train.py --teacher gpt2 --student distilgpt2 --dataset wikitext --subset wikitext-2-raw-v1 \\
        --save_dir runs/distilgpt2 --max_steps 200 --temperature 2.0 --forward_kl 0.7 --teacher_ce 0.3 --hidden_mse 0.05
    python distill_train.py --teacher Qwen/Qwen2.5-7B-Instruct --student Qwen/Qwen2.5-3B-Instruct --data squad.json \\
        --save_dir runs/squad --teacher_cache runs/cache/qwen7b_squad
    python distill_train.py --labels --student Qwen/Qwen2.5-3B-Instruct --data data/creditmix_labels.jsonl \\
        --save_dir runs/creditmix_labels

--data is rows {"input", "output"} or {"input", "teacher_output"}, SQuAD's JSON, or a text file; --dataset a data set of
the Hub or a folder. With --teacher_cache the teacher runs first, alone, and training reads what it wrote; a cache that
is complete loads no teacher. Teacher and student must share a vocabulary. Where they do not, two ways work: its text
(teacher_generate.py, then kd_train.py), or for labels its probabilities (teacher_generate.py --probabilities, then
--labels with rows {"input", "probabilities": {label: p}[, "output"]}), which any model can give.

A loss term counts with the weight given; with none given, forward_kl and ce count half each. With --ce alone this is
plain training, of running text too, and needs no teacher. Two other recipes' names of the terms are accepted, also as
keys of --config: alpha_kl and gamma_kl mean forward_kl, alpha_ce means ce, beta_ce means teacher_ce, beta_mse and
gamma_mse mean hidden_mse, delta_cos means hidden_cosine, epsilon_attn means attention_mse.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common import cli
from common.cli import UserError, log
from common.distillation import rows as distill_rows
from common.models import adapters, tokenizers
from common.models import loading as models
from common.models.source import ModelSource
from common.tasks.ranking import task as tasks
from common.training import batches as completions
from common.training import trainer as training
from common.vram import preflight as vram

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from common.distillation.objective import Objective, Reader, Used
    from common.distillation.teacher_cache import TeacherCache
    from common.run_record import RunRecord
    from common.tasks.ranking.task import LabelTask

DEFAULT_WEIGHTS = {"forward_kl": 0.5, "ce": 0.5}
WEIGHTS = {  # flag: names of it in other recipes, what it weighs
    "forward_kl": (("alpha_kl", "gamma_kl"), "KL(teacher || student)"),
    "reverse_kl": ((), "KL(student || teacher)"),
    "jsd": ((), "generalised Jensen-Shannon divergence"),
    "ce": (("alpha_ce",), "cross-entropy of the data's own tokens"),
    "teacher_ce": (("beta_ce",), "cross-entropy of the teacher's likeliest tokens"),
    "hidden_mse": (("beta_mse", "gamma_mse"), "mean squared difference of hidden states"),
    "hidden_cosine": (("delta_cos",), "1 - cosine of hidden states"),
    "attention_mse": (("epsilon_attn",), "squared difference of attention maps (live teacher only)"),
}
OF_LABELS = ("forward_kl", "reverse_kl", "jsd", "ce", "teacher_ce")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="distill_train.py")
    training.add_flags(parser, learning_rate=2e-4, data_required=False)
    teacher = parser.add_argument_group("teacher")
    teacher.add_argument("--teacher", "--teacher_model", "--teacher_model_name", help="a folder or a Hub id")
    teacher.add_argument("--load_teacher_in_4bit", choices=("auto", "on", "off"), default="auto", help="auto: on CUDA")
    teacher.add_argument("--teacher_cache", metavar="DIR", help="first write here what the teacher says; train from it")
    teacher.add_argument("--cache_targets", choices=("topk", "sampled"), default="topk")
    teacher.add_argument("--cache_k", type=cli.positive_int, default=64, help="tokens kept, or drawn, at each place")
    teacher.add_argument("--max_batch_tokens", type=cli.positive_int, default=8192, help="of the teacher's pass")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", metavar="NAME", help="a data set of the Hub, or a folder, instead of --data")
    data.add_argument("--subset", help="of --dataset")
    data.add_argument("--split", default="train", help="of --dataset")
    data.add_argument("--text_column", default="text", help="of --dataset, where it has no input and output")
    loss = parser.add_argument_group("loss")
    for name, (aliases, words) in WEIGHTS.items():
        loss.add_argument(f"--{name}", *(f"--{alias}" for alias in aliases), type=float, metavar="WEIGHT", help=words)
    loss.add_argument("--temperature", type=float, default=1.0, help="of the divergences")
    loss.add_argument("--jsd_beta", type=cli.fraction, default=0.5, help="the teacher's share of the mixture")
    loss.add_argument("--layer_map", default="last", help="layers compared: last, uniform, or pairs 1:2,3:6")
    labels = parser.add_argument_group("labels")
    labels.add_argument("--labels", action="store_true", help="learn label probabilities, by the label ranker's scores")
    labels.add_argument("--task", metavar="FILE.yaml", help="the label set; default: CreditMix")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    weights = resolve_weights(args)
    check_flags(args, weights)
    vars(args).update(weights)  # run.json and the memory preflight read those that count
    task = tasks.load(args.task)
    rows, held_out = read_rows(args, task)
    record = training.start(args, "distill", rows, argv)
    with training.failing(record):
        from common.distillation.objective import Objective

        objective = Objective(weights, args.temperature, args.jsd_beta)
        log(f"loss = {objective}")
        if record:
            record.write(objective=str(objective))
        tokenizer = tokenizers.load_tokenizer(args.student, trust_remote_code=args.trust_remote_code)
        if args.labels:
            trainer = label_trainer(args, record, objective, tokenizer, task, rows, held_out)
        elif args.teacher:
            trainer = token_trainer(args, record, objective, tokenizer, rows, held_out)
        else:
            trainer = plain_trainer(args, record, tokenizer, rows, held_out)
        training.train_and_save(trainer, args, record)


def resolve_weights(args: argparse.Namespace) -> dict[str, float]:
    """The terms that count, by name."""
    given = {name: getattr(args, name) for name in WEIGHTS if getattr(args, name) is not None}
    if not all(0 <= weight < math.inf for weight in given.values()):
        raise UserError("a loss term's weight must be 0 or above; mend the flag")
    if given and not any(given.values()):
        raise UserError("every loss term has the weight 0; give one of them more, e.g. --forward_kl 1.0")
    weights = {name: weight for name, weight in (given or DEFAULT_WEIGHTS).items() if weight}
    return {"ce": 1.0} if weights.keys() == {"ce"} else weights  # alone, a weight says nothing


def check_flags(args: argparse.Namespace, weights: dict[str, float]) -> None:
    """Refuse what cannot work together, before anything is read. Raises UserError."""
    training.check_flags(args)
    if not 0 < args.temperature < math.inf:
        raise UserError(f"--temperature {args.temperature} must be above 0")
    if (args.data is None) == (args.dataset is None):
        raise UserError("give either --data FILE or --dataset NAME")
    if args.labels:
        if args.teacher or args.teacher_cache or args.dataset:
            raise UserError(
                "with --labels the rows of --data carry the teacher's probabilities: write them with "
                "teacher_generate.py --probabilities, and leave --teacher, --teacher_cache and --dataset out"
            )
        if other := sorted(weights.keys() - set(OF_LABELS)):
            raise UserError(f"--{other[0]} compares what is inside models; with --labels use {', '.join(OF_LABELS)}")
        return
    if args.task:
        raise UserError("--task names a label set; give --labels with it")
    asked = sorted(weights.keys() - {"ce"})
    if asked and not args.teacher:
        raise UserError(f"--teacher is missing; {asked[0]} needs one (with --ce alone, none is needed)")
    if not asked and args.teacher:
        raise UserError("--ce alone asks nothing of the teacher; give another term a weight, or leave --teacher out")
    if args.cache_targets == "sampled" and not args.teacher_cache:
        raise UserError("--cache_targets is of --teacher_cache; give that too, or leave it out")
    if not args.teacher and args.teacher_cache:
        raise UserError("--teacher_cache without --teacher; give both, or leave it out")
    if not args.teacher:
        return
    models.check_model_dir(args.teacher)
    if args.teacher_cache and "attention_mse" in weights:
        raise UserError("--attention_mse needs a live teacher; leave --teacher_cache out, or the weight")
    other = sorted(weights.keys() & {"reverse_kl", "jsd", "teacher_ce"})
    if args.teacher_cache and args.cache_targets == "sampled" and other:
        raise UserError(f"--{other[0]} needs --cache_targets topk; draws serve forward_kl alone")


def read_rows(args: argparse.Namespace, task: LabelTask) -> tuple[list[dict], list[dict]]:
    """Training rows, and those to judge by."""

    def read(path: str, part: str) -> list[dict]:
        if args.labels:
            rows = distill_rows.read_labelled(path, task, args.skip_bad_rows)
            if part == "dev" and not (rows := [row for row in rows if row.get("output")]):
                raise UserError(
                    f"{path} has no row with an output to judge by; add gold labels, or leave --eval_data out"
                )
            return rows
        return distill_rows.read(path, part, args.skip_bad_rows)

    held_out = read(args.eval_data, "dev") if args.eval_data else []
    if args.dataset:
        return distill_rows.read_dataset(
            args.dataset, args.subset, args.split, args.text_column, args.skip_bad_rows
        ), held_out
    return read(args.data, "train"), held_out


def encoded_rows(
    args: argparse.Namespace,
    record: RunRecord | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    held_out: Sequence[dict],
) -> tuple[list[tokenizers.Encoded], list[tokenizers.Encoded]]:
    """Token ids of the rows, which training on fits the memory, and of those to judge by."""

    def encoded(path: str, rows: Sequence[dict]) -> list[tokenizers.Encoded]:
        return distill_rows.encode(tokenizer, path, rows, args.max_len, args.idp_mode)

    train_rows = training.fitting_rows(args, record, "distill", lambda: encoded(args.data or args.dataset, rows))
    return train_rows, encoded(args.eval_data, held_out) if held_out else []


def plain_trainer(
    args: argparse.Namespace,
    record: RunRecord | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    held_out: Sequence[dict],
) -> Any:
    """A trainer on the data's own tokens alone."""
    training.limit_length(args)
    train_rows, eval_rows = encoded_rows(args, record, tokenizer, rows, held_out)
    student = training.prepare_student(args, tokenizer)
    parts = training.completion_parts(train_rows, tokenizer.pad_token_id)
    return training.fitted_trainer(args, student, tokenizer, eval_rows=eval_rows, **parts)


def token_trainer(
    args: argparse.Namespace,
    record: RunRecord | None,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    held_out: Sequence[dict],
) -> Any:
    """A trainer whose student learns the teacher's next-token distributions."""
    from accelerate.utils import send_to_device

    from common.distillation import fill_cache as teacher_pass
    from common.distillation import objective as distillation

    theirs = tokenizers.load_tokenizer(
        adapters.tokenizer_folder(args.teacher), trust_remote_code=args.trust_remote_code
    )
    if reason := tokenizers.same_vocabulary(theirs, tokenizer):
        raise UserError(
            f"{args.teacher} and {args.student} have different vocabularies ({reason}); two ways work: the teacher's "
            "text (teacher_generate.py, then kd_train.py), and label probabilities (teacher_generate.py "
            "--probabilities, then --labels)"
        )
    ours, teachers = (models.load_config(name, args.trust_remote_code) for name in (args.student, args.teacher))
    training.limit_length(args, args.teacher)
    pairs = distillation.layer_pairs(args.layer_map, ours.num_hidden_layers, teachers.num_hidden_layers)
    shared = min(ours.vocab_size, teachers.vocab_size, *(max(t.get_vocab().values()) + 1 for t in (tokenizer, theirs)))

    train_rows, eval_rows = encoded_rows(args, record, tokenizer, rows, held_out)
    used = distillation.Used(objective, pairs, shared)
    cache = written_cache(args, record, used, teachers, tokenizer, train_rows) if args.teacher_cache else None
    student = training.prepare_student(args, tokenizer)
    compared = [layer for layer, _ in pairs] if used.hidden else []
    reader = distillation.Reader(student.get_base_model() if args.lora_r else student, compared)
    teacher = None if cache else distillation.LiveTeacher(load_teacher(args, used), used)
    if used.attentions:
        for model in (reader.model, teacher.reader.model):
            model.set_attn_implementation("eager")
    projections = None
    if used.hidden and ours.hidden_size != teachers.hidden_size:
        projections = distillation.projections(ours.hidden_size, teachers.hidden_size, len(pairs), args.seed)
        student.add_module(training.EXTRA, projections.to(student.device))
    loss = distillation.DistillationLoss(used, reader, teacher, projections)

    def collate(batch: Sequence[tokenizers.Encoded]) -> dict[str, Any]:
        return teacher_pass.collate(batch, tokenizer.pad_token_id, cache)

    if not used.of_logits:
        shortest = min(train_rows, key=lambda row: len(row.input_ids))
        batch = send_to_device(collate([shortest]), student.device)
        training.freeze_unreached(student, lambda: loss(student, batch)[0])
    return training.fitted_trainer(
        args,
        student,
        tokenizer,
        eval_rows=eval_rows,
        rows=train_rows,
        lengths=[len(row.input_ids) for row in train_rows],
        collate=collate,
        loss=loss,
        eval_loss=lambda *batch: (completions.completion_loss(*batch)[0], {}),
    )


def load_teacher(args: argparse.Namespace, used: Used) -> Reader:
    """The teacher, ready to be read."""
    from common.distillation.objective import Reader

    model, _ = models.load_for_inference(
        ModelSource(args.teacher, load_in_4bit=args.load_teacher_in_4bit, trust_remote_code=args.trust_remote_code)
    )
    return Reader(model.requires_grad_(False), [theirs for _, theirs in used.pairs] if used.hidden else [])


def written_cache(
    args: argparse.Namespace,
    record: RunRecord | None,
    used: Used,
    teachers: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tokenizers.Encoded],
) -> TeacherCache:
    """The cache with all of `rows` in it. The teacher is loaded only if some are missing, and is gone afterwards.

    Each of several processes writes its share.
    """
    import torch
    from accelerate import PartialState

    from common.distillation import fill_cache as teacher_pass
    from common.distillation import teacher_cache

    draws = args.cache_targets == "sampled" and used.distributions
    k = (args.cache_k if draws else min(args.cache_k, used.vocabulary)) if used.distributions else 0
    layers = [theirs for _, theirs in used.pairs] if used.hidden else []
    cache = teacher_cache.TeacherCache(
        args.teacher_cache,
        {
            "teacher": adapters.adapter_hash(args.teacher),
            "precision": "NF4" if models.use_4bit(args.load_teacher_in_4bit) else "16 or 32 bits",
            "vocabulary": used.vocabulary,
            "targets": args.cache_targets,
            "k": k,
            "temperature": args.temperature if used.distributions else None,
            "layers": layers,
        },
        teacher_cache.record_type(k, logprobs=not draws, hidden=(len(layers), teachers.hidden_size)),
    )
    state = PartialState(cpu=not torch.cuda.is_available())
    missing = cache.missing(rows)
    if missing:
        log(f"{len(missing):,} of {len(rows):,} rows are not in {args.teacher_cache}; the teacher reads them first")
        changed = vram.before_teacher_pass(args)
        if record and changed:
            record.write(auto_fit=record.facts.get("auto_fit", {}) | changed)
        if "load_teacher_in_4bit" in changed:  # then it is another cache
            return written_cache(args, record, used, teachers, tokenizer, rows)
        try:
            teacher_pass.fill_cache(
                cache,
                load_teacher(args, used),
                missing[state.process_index :: state.num_processes],
                pad_id=tokenizer.pad_token_id,
                targets="sampled" if draws else "topk",
                temperature=args.temperature,
                vocabulary=used.vocabulary,
                layers=layers,
                max_batch_tokens=args.max_batch_tokens,
                seed=args.seed + state.process_index,
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the device ran out of memory while the teacher read; lower --max_batch_tokens {args.max_batch_tokens}"
            ) from error
        gc.collect()
        torch.cuda.empty_cache()
    state.wait_for_everyone()
    cache.refresh()
    if cache.missing(rows):
        raise UserError(f"{args.teacher_cache} lacks rows that other processes wrote; give a folder that all share")
    return cache


def label_trainer(
    args: argparse.Namespace,
    record: RunRecord | None,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    task: LabelTask,
    rows: Sequence[dict],
    held_out: Sequence[dict],
) -> Any:
    """A trainer whose student's label scores learn the teacher's label probabilities."""
    from common.distillation.label_objective import LabelDistillation
    from common.distillation.objective import Objective

    training.limit_length(args)
    loss = LabelDistillation(objective, tokenizer, task)
    train_rows = loss.encode(args.data, rows, args.max_len)
    columns = loss.tree.columns
    if training.check_memory(args, record, "sft", max(len(row.prompt) for row in train_rows) + columns, columns + 1):
        train_rows = loss.encode(args.data, rows, args.max_len)
    student = training.prepare_student(args, tokenizer)
    eval_rows = loss.encode(args.eval_data, held_out, args.max_len) if held_out else []
    return training.fitted_trainer(
        args,
        student,
        tokenizer,
        eval_rows=eval_rows,
        rows=train_rows,
        lengths=[len(row.prompt) for row in train_rows],
        collate=loss.collate,
        loss=loss,
        eval_loss=LabelDistillation(Objective({"ce": 1.0}), tokenizer, task),
    )


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
