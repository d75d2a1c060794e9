"""How good a fine-tuned run is on its validation file: loss and token accuracy with intervals, of labels the accuracy.

    python -m common.jobs.validation --run runs/jobs/jobs/0123/artifacts --data val.jsonl --train_data train.jsonl

Writes validation.json to the run folder. An answer counts as right where each of its tokens, its end too, is the
likeliest after those before it: that is where the model, asked greedily, would have written it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from common import cli, run_record
from common.cli import UserError
from common.data import training_files
from common.data.shapes import DPO, SFT
from common.evaluation.bootstrap import REPLICATES, mean_interval, ratio_interval
from common.files import sha256_file, sha256_text, write_json
from common.jobs.fine_tuning import VALIDATION
from common.models import adapters, tokenizers
from common.models.batching import MAX_BATCH_TOKENS
from common.models.source import ModelSource

MOST_LABELS = 20  # different answers of a file that is taken for one of labels


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="python -m common.jobs.validation")
    parser.add_argument("--run", required=True, help="run folder")
    parser.add_argument("--data", required=True, help="validation rows, as the run's trainer takes them")
    parser.add_argument("--train_data", required=True, help="the run's training rows, for the count of shared ones")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    record = run_record.read(args.run)
    if record is None:
        raise UserError(f"--run {args.run} has no run.json; give the folder of a run")
    trainer, settings = DPO if record["method"] == "dpo" else SFT, record["settings"]
    skips = settings.get("skip_bad_rows", False)
    rows, trained = (training_files.read(path, trainer, skips) for path in (args.data, args.train_data))
    figures = judge(args.run, settings, args.data, rows)
    seen = {prompt_hash(row) for row in trained}
    facts = {
        "data": args.data,
        "data_sha256": sha256_file(args.data),
        "shared": {"rows": sum(prompt_hash(row) in seen for row in rows), "of": len(rows)},
        "chose_the_epoch": bool(record.get("best")),
        "replicates": REPLICATES,
    }
    write_json(Path(args.run) / VALIDATION, facts | figures)
    print(json.dumps(facts | figures))


def prompt_hash(row: dict[str, Any]) -> str:
    """Of what a row asks, whatever its answer."""
    return sha256_text(json.dumps(row.get("input", row.get("prompt")), sort_keys=True))


def judge(run: str, settings: dict[str, Any], path: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{"n", "left_out", "loss", "token_accuracy", ...}, each figure with its interval over rows.

    Args:
        settings: of the run (`run.json`).
        path: of the rows, for messages.
    """
    from common.comparison.perplexity import completion_sums
    from common.models.loading import load_for_inference
    from common.training.batches import encode_rows
    from common.training.dpo import encode_pairs

    model, tokenizer = load_for_inference(ModelSource(run, load_in_4bit=settings["load_in_4bit"]))
    if "chosen" in rows[0]:
        pairs = encode_pairs(tokenizer, path, rows, settings["max_len"], whole=False)
        sides = [
            [tokenizers.Encoded(pair.prompt_ids + answer(pair), len(pair.prompt_ids)) for pair in pairs]
            for answer in (attrgetter("chosen_ids"), attrgetter("rejected_ids"))
        ]
        answers = None
    else:
        asked = [(row["input"], row["output"]) for row in rows]
        encoded = encode_rows(tokenizer, path, asked, settings["max_len"], whole=False)
        sides = [[row for row in encoded if row]]
        answers = [row["output"] for row, kept in zip(rows, encoded, strict=True) if kept]

    def sums() -> list[np.ndarray]:
        return [completion_sums(model, side, tokenizer.pad_token_id, MAX_BATCH_TOKENS) for side in sides]

    found, reference = sums(), None
    if answers is None and adapters.is_adapter(run) and not settings.get("init_adapter"):
        with model.disable_adapter():  # which is what a DPO on a base is held against
            reference = sums()
    return {"n": len(sides[0]), "left_out": len(rows) - len(sides[0]), **figures_of(found, answers, reference)}


def figures_of(
    sums: Sequence[np.ndarray], answers: Sequence[str] | None, reference: Sequence[np.ndarray] | None = None
) -> dict[str, Any]:
    """The figures of [rows, 3] sums (see `perplexity.completion_sums`): of answers, or of chosen and rejected ones.

    `preference_accuracy` is how often the chosen answer is the likelier of the two; `reward_accuracy` how often it has
    gained more on the reference than the other one, which is what DPO trains.

    Args:
        answers: their texts; None of preferences.
        reference: the sums of chosen and rejected answers by the reference of a DPO; None: it is not at hand.
    """
    nll, tokens, right = sums[0].T
    figures: dict[str, Any] = {
        "tokens": int(tokens.sum()),
        "loss": ratio_interval(np.stack([nll, tokens], axis=1)),
        "token_accuracy": ratio_interval(np.stack([right, tokens], axis=1)),
    }
    if answers is None:
        figures["preference_accuracy"] = mean_interval(nll < sums[1][:, 0])
        if reference is not None:
            gains = [before[:, 0] - after[:, 0] for before, after in zip(reference, sums, strict=True)]
            figures["reward_accuracy"] = mean_interval(gains[0] > gains[1])
    elif len(labels := sorted(set(answers))) <= MOST_LABELS and 2 * len(labels) <= len(answers):
        figures |= {"accuracy": mean_interval(right == tokens), "labels": labels}
    return figures


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
