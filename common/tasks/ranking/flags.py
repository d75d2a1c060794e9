"""The command-line flags of everything that scores labels, and the settings that they mean."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from common import cli
from common.models.flags import add_model_flags
from common.tasks.ranking.settings import ScoringSettings
from common.tasks.ranking.task import LabelTask

if TYPE_CHECKING:
    from common.tasks.ranking.decision import Goal


def add_scoring_flags(parser: argparse.ArgumentParser) -> None:
    """Those of the model, the task and its calibration."""
    add_model_flags(parser)
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--task", metavar="FILE.yaml", help="the label set; default: that of the run, else CreditMix")
    scoring.add_argument(
        "--num_null_prompts",
        type=cli.positive_int,
        help="content-free prompts behind the prior; default: all of the task",
    )
    scoring.add_argument(
        "--calibration",
        choices=("none", "prior", "batch", "fitted"),
        help="default: fitted where the run folder has one, else none of a run for the task, prior of a base",
    )
    scoring.add_argument(
        "--label_bias", nargs="+", default=[], metavar="LABEL=NATS", help="offsets on the scores, e.g. Standard=0.3"
    )


def scoring_settings(args: argparse.Namespace, task: LabelTask) -> ScoringSettings:
    """What the flags of `add_scoring_flags` ask for.

    Raises:
        UserError: --label_bias is not LABEL=NUMBER of a label of the task.
    """
    return ScoringSettings(
        max_batch_tokens=args.max_batch_tokens,
        auto_fit=args.auto_fit,
        num_null_prompts=args.num_null_prompts,
        calibration=args.calibration,
        label_bias=cli.parse_label_bias(args.label_bias, task.labels),
    )


def decision_goal(args: argparse.Namespace, task: LabelTask) -> Goal:
    """What the flags of decisions ask for.

    Raises:
        UserError: flags that do not go together, or costs that are none; see `Goal` and `evaluate.cost_matrix`.
    """
    from common.evaluation.guarantee import GUARANTEE
    from common.tasks.ranking.decision import Goal
    from common.tasks.ranking.evaluate import cost_matrix

    costs = cost_matrix(args.costs, task.labels) if args.costs else None
    return Goal(args.optimize, costs, args.abstain_below, args.target_precision, args.guarantee or GUARANTEE)
