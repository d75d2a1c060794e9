"""The command-line flags of distill_train.py, and the settings that they mean."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from common import cli
from common.cli import UserError
from common.distillation.settings import (
    CACHES,
    DEFAULT_WEIGHTS,
    DIVERGENCES,
    GOES_WITH,
    OF_LOGITS,
    ON_POLICY_WEIGHTS,
    DistillSettings,
)
from common.models import loading
from common.training import flags as training_flags

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


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All of them, those of every trainer too."""
    defaults = DistillSettings
    training_flags.add_flags(parser, defaults, data_required=False)
    teacher = parser.add_argument_group("teacher")
    teacher.add_argument("--teacher", "--teacher_model", "--teacher_model_name", help="a folder or a Hub id")
    teacher.add_argument(
        "--load_teacher_in_4bit",
        choices=("auto", "on", "off"),
        default=defaults.load_teacher_in_4bit,
        help="auto: on CUDA",
    )
    teacher.add_argument(
        "--teacher_cache", type=cli.folder, metavar="DIR", help="first write here what the teacher says; train from it"
    )
    teacher.add_argument("--cache_targets", choices=("topk", "sampled"), default=defaults.cache_targets)
    teacher.add_argument(
        "--cache_k", type=cli.positive_int, default=defaults.cache_k, help="tokens kept, or drawn, at each position"
    )
    teacher.add_argument(
        "--max_batch_tokens",
        type=cli.positive_int,
        default=defaults.max_batch_tokens,
        help="of the teacher's pass, and where the student writes",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", metavar="NAME", help="a data set of the Hub, or a folder, instead of --data")
    data.add_argument("--subset", help="of --dataset")
    data.add_argument("--split", default=defaults.split, help="of --dataset")
    data.add_argument(
        "--text_column", default=defaults.text_column, help="of --dataset, where it has no input and output"
    )
    loss = parser.add_argument_group("loss")
    for name, (aliases, meaning) in WEIGHTS.items():
        loss.add_argument(f"--{name}", *(f"--{alias}" for alias in aliases), type=float, metavar="WEIGHT", help=meaning)
    loss.add_argument("--temperature", type=float, default=defaults.temperature, help="of the divergences")
    loss.add_argument(
        "--jsd_beta", type=cli.fraction, default=defaults.jsd_beta, help="the teacher's share of the mixture"
    )
    loss.add_argument(
        "--layer_map", default=defaults.layer_map, help="layers compared: last, uniform, or pairs 1:2,3:6"
    )
    labels = parser.add_argument_group("labels")
    labels.add_argument("--labels", action="store_true", help="learn label probabilities, by the label ranker's scores")
    add_on_policy_flags(parser)


def add_on_policy_flags(parser: argparse.ArgumentParser) -> None:
    """How many answers the student writes, and how."""
    defaults = DistillSettings
    own = parser.add_argument_group("on-policy")
    own.add_argument("--on_policy", action="store_true", help="learn, in rounds, from answers of the student itself")
    own.add_argument("--rounds", type=cli.positive_int, default=defaults.rounds)
    own.add_argument(
        "--prompts_per_round", type=cli.positive_int, metavar="N", help="default: all rounds go through --data once"
    )
    own.add_argument(
        "--num_samples", type=cli.positive_int, default=defaults.num_samples, help="answers to each prompt"
    )
    own.add_argument("--max_new_tokens", type=cli.positive_int, default=defaults.max_new_tokens, help="of an answer")
    own.add_argument("--sample_temperature", type=float, default=defaults.sample_temperature, help="of the answers")
    own.add_argument(
        "--lmbda",
        type=float,
        default=defaults.lmbda,
        help="share of the prompts that the student answers; the others keep the data's completions",
    )
    own.add_argument("--ignore_collapse", action="store_true", help="go on though the student's answers have collapsed")


def settings_of(args: argparse.Namespace) -> DistillSettings:
    """The settings, with the weights of those terms that count.

    Raises:
        UserError: what cannot work together, before anything is read.
    """
    given = vars(args) | resolve_weights(args)
    if args.on_policy and not args.teacher_cache and not args.dry_run:
        given["teacher_cache"] = str(Path(args.save_dir, CACHES))
    return checked(DistillSettings(**given))


def resolve_weights(args: argparse.Namespace) -> dict[str, float]:
    """The terms that count, by name. Raises UserError for weights that mean nothing."""
    given = {name: getattr(args, name) for name in WEIGHTS if getattr(args, name) is not None}
    if not all(0 <= weight < math.inf for weight in given.values()):
        raise UserError("a loss term's weight must be 0 or above; mend the flag")
    if given and not any(given.values()):
        raise UserError("every loss term has the weight 0; give one of them more, e.g. --forward_kl 1.0")
    default = ON_POLICY_WEIGHTS if args.on_policy else DEFAULT_WEIGHTS
    weights = {name: weight for name, weight in (given or default).items() if weight}
    return {"ce": 1.0} if weights.keys() == {"ce"} else weights  # alone, a weight says nothing


def checked(settings: DistillSettings) -> DistillSettings:
    """The settings as `training_flags.checked`, refused where they cannot work together. Raises UserError."""
    settings = training_flags.checked(settings)
    if not 0 < settings.temperature < math.inf:
        raise UserError(f"--temperature {settings.temperature} must be above 0")
    if (settings.data is None) == (settings.dataset is None):
        raise UserError("give either --data FILE or --dataset NAME")
    idle = settings.idle(settings.as_dict())
    for name, others in GOES_WITH.items():
        if name in idle and getattr(settings, name) != getattr(DistillSettings, name):
            companion = " or ".join(f"--{other}" for other in others)
            raise UserError(f"--{name} goes with {companion}; give that too, or leave it out")
    weights = settings.weights
    if settings.on_policy:
        check_on_policy(settings)
    if settings.labels:
        if settings.teacher or settings.teacher_cache or settings.dataset:
            raise UserError(
                "with --labels the rows of --data carry the teacher's probabilities: write them with "
                "teacher_generate.py --probabilities, and leave --teacher, --teacher_cache and --dataset out"
            )
        if other := sorted(weights.keys() - set(OF_LOGITS)):
            raise UserError(f"--{other[0]} compares what is inside models; with --labels use {', '.join(OF_LOGITS)}")
        return settings
    of_teacher = sorted(weights.keys() - {"ce"})
    if of_teacher and not settings.teacher:
        raise UserError(f"--teacher is missing; {of_teacher[0]} needs one (with --ce alone, none is needed)")
    if not of_teacher and settings.teacher:
        raise UserError("--ce alone asks nothing of the teacher; give another term a weight, or leave --teacher out")
    if not settings.teacher and settings.teacher_cache:
        raise UserError("--teacher_cache without --teacher; give both, or leave it out")
    if not settings.teacher:
        return settings
    loading.check_model_dir(settings.teacher, onnx=False)
    if settings.teacher_cache and "attention_mse" in weights:
        raise UserError("--attention_mse needs a live teacher; leave --teacher_cache out, or the weight")
    if settings.keeps_own and settings.cache_k < 2:
        raise UserError("--cache_k 1 has no room for the likeliest token and the student's own; give 2 or more")
    other = sorted(weights.keys() & {"reverse_kl", "jsd", "teacher_ce"})
    if settings.teacher_cache and settings.cache_targets == "sampled" and other:
        raise UserError(f"--{other[0]} needs --cache_targets topk; draws serve forward_kl alone")
    return settings


def check_on_policy(settings: DistillSettings) -> None:
    """Raises UserError for what has no meaning where the student writes its own training rows."""
    if settings.labels:
        raise UserError("--on_policy is for answers that are written, --labels for those that are ranked; give one")
    if not settings.teacher:
        raise UserError("--teacher is missing; with --on_policy it reads what the student has written")
    learnt = (*DIVERGENCES, "teacher_ce")
    if other := sorted(settings.weights.keys() - set(learnt)):
        why = "would teach the student its own answers" if other[0] == "ce" else "compares what is inside models"
        raise UserError(f"--{other[0]} {why}; with --on_policy use {', '.join(learnt)}, and --lmbda to mix the data in")
    if not 0 <= settings.lmbda <= 1:
        raise UserError(f"--lmbda {settings.lmbda} is not from 0 (the data's completions) to 1 (the student's)")
    if not 0 < settings.sample_temperature < math.inf:
        raise UserError(f"--sample_temperature {settings.sample_temperature} must be above 0")
    if settings.max_new_tokens >= settings.max_len:
        raise UserError(
            f"--max_new_tokens {settings.max_new_tokens} leaves no room for a prompt in --max_len {settings.max_len}; "
            "raise the one or lower the other"
        )
