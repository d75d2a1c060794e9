"""Decisions about labels of several tokens: this toolkit's ranking beside transformers' own pipeline("decision").

    recipes/ticket_severity.sh ticket_urgency
    python bench/decisions.py
    python bench/decisions.py --model_dir runs/creditmix_sft --data data/creditmix_val.jsonl

Contestants, all on the weights of --model_dir in --dtype, with its own question: `ours` is what /v1/decisions answers,
by the label tree and the calibration that was fitted for the run; `ours_unfitted` the same without it; `ours_other`
what a run answers to a question that is not its own (its options listed in the prompt, prior calibration); `pipeline`
is transformers' pipeline("decision") with its generic prompt, where a letter stands for each option; `pipeline_json`
the same with the run's decision.json (`eval_creditmix.py --decision_json`): the run's own prompt, the first token of
each label and one fitted temperature. Accuracy and ECE are of --per_class rows of each class, with 95 % bootstrap
intervals over groups; speeds are rows a second, with rows that come one by one and --batch at a time, the median of the
rounds, after one that does not count. The contestants take turns. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.interleave import print_table, take_turns

from common import cli
from common.models import loading as models
from common.models.batching import MAX_BATCH_TOKENS
from common.models.source import LoadedModel, ModelSource
from common.tasks.ranking import decision_json, questions
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.loading import task_for
from common.tasks.ranking.rankers import ranker_of

if TYPE_CHECKING:
    import numpy as np

    from common.tasks.ranking.task import LabelTask

Answer = Callable[[Sequence[str]], "np.ndarray"]  # texts to probabilities [rows, labels]


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/decisions.py")
    parser.add_argument("--model_dir", default="runs/ticket_urgency_sft", help="a run of a label task, calibrated")
    parser.add_argument("--task", metavar="FILE.yaml", help="the label set; default: that of the run")
    parser.add_argument("--data", help="labelled rows; default: data/TASK_val.jsonl")
    parser.add_argument("--per_class", type=cli.positive_int, default=256, help="rows of each class that are judged")
    parser.add_argument("--timed_rows", type=cli.positive_int, default=128, help="of them that are timed")
    parser.add_argument("--batch", type=cli.positive_int, default=64, help="rows at a time, beside one")
    parser.add_argument("--rounds", type=cli.positive_int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    models.check_model_dir(args.model_dir)
    task = task_for(args.task, args.model_dir)
    args.data = args.data or f"data/{task.name}_val.jsonl"
    from common.tasks.ranking.evaluate import Draw

    rows, _ = Draw("all", args.per_class).rows(task, task.read(args.data)[0], args.data)
    texts = [row[task.text_field] for row in rows]

    model, tokenizer = models.load_for_inference(ModelSource(args.model_dir, load_in_4bit="off", dtype=args.dtype))
    answers = contestants(args.model_dir, task, model, tokenizer)
    quality = {name: judged(answer, task, rows, texts) for name, answer in answers.items()}
    for name, entry in quality.items():
        figures = (f"{key} {one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" for key, one in entry.items())
        print(f"{name:14}", *figures, f"n {len(rows)}", sep="  ")
    turns = {
        f"{name} x{size}": timed(answer, texts[: args.timed_rows], size)
        for size in dict.fromkeys((1, args.batch))
        for name, answer in answers.items()
        if name not in ("ours_unfitted",)  # which costs what `ours` costs
    }
    table = take_turns(turns, args.rounds, "rows", warm_up=True)
    print_table(table, "rows")
    tokens = [len(tokenizer.encode(label, add_special_tokens=False)) for label in task.labels]
    medians = {name: entry["rows_per_s"] for name, entry in table.items()}
    ratios = {
        f"vs_{name}": round(medians[f"ours x{name.rpartition(' x')[2]}"] / speed, 2)
        for name, speed in medians.items()
        if not name.startswith("ours ")
    }
    settings = {**vars(args), "task": task.name, "label_tokens": tokens, "parameters": model.num_parameters()}
    listed = [{"name": name, **entry} for name, entry in table.items()]
    print(
        json.dumps({"bench": "decisions", "settings": settings, "quality": quality, "rows": listed, "ratios": ratios})
    )


def contestants(model_dir: str, task: LabelTask, model: Any, tokenizer: Any) -> dict[str, Answer]:
    """What answers texts, by name."""
    own = Classifier.on(LoadedModel(model, tokenizer, MAX_BATCH_TOKENS), model_dir, task)
    listed = questions.choice("How would you label this text?", task.labels, [""] * len(task.labels)).task()
    ranker = ranker_of(model, tokenizer, listed)
    other = Classifier(model_dir, listed, ranker, ranker.prior)
    answers = {
        "ours": ranked(own, None),
        "ours_unfitted": ranked(own, own.default_method),
        "ours_other": ranked(other, "prior"),
        "pipeline": decided(task, model, tokenizer, {}),
    }
    path = Path(model_dir) / decision_json.FILE
    if path.is_file():
        answers["pipeline_json"] = decided(task, model, tokenizer, json.loads(path.read_text()))
    else:
        cli.log(
            f"pipeline_json left out: {model_dir} has no {decision_json.FILE}; see eval_creditmix.py --decision_json"
        )
    return answers


def ranked(classifier: Classifier, method: str | None) -> Answer:
    """The label ranker's answers with a calibration; None: as the run has it."""
    calibration = classifier.calibration(method)
    return lambda texts: calibration.apply(classifier.raw_scores(texts)).probabilities


def decided(task: LabelTask, model: Any, tokenizer: Any, settings: dict[str, Any]) -> Answer:
    """pipeline("decision")'s answers, with these settings of its `DecisionConfig`."""
    import numpy as np
    from transformers import DecisionConfig, pipeline

    own = copy.deepcopy(tokenizer)  # it adds tokens of its own
    decide = pipeline("decision", model=model, tokenizer=own, decision_config=DecisionConfig(**settings))
    question = {"type": "choice", "instructions": task.instruction, "criteria": dict.fromkeys(task.labels)}

    def answer(texts: Sequence[str]) -> np.ndarray:
        answers = decide([{"state": text, "questions": {"label": question}} for text in texts])
        return np.array([[one["label"]["probabilities"][label] for label in task.labels] for one in answers])

    return answer


def judged(answer: Answer, task: LabelTask, rows: Sequence[dict], texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Accuracy and ECE with their intervals, of the most probable labels."""
    import numpy as np

    from common.tasks.ranking import metrics
    from common.tasks.ranking.calibration import Scores
    from common.tasks.ranking.evaluate import true_labels

    y, groups = np.array(true_labels(task, rows)), [row["group"] for row in rows]
    figures = metrics.evaluate(Scores.of(answer(texts)), y, task.labels, groups=groups)
    return {name: {key: figures[name][key] for key in ("value", "low", "high")} for name in ("accuracy", "ece")}


def timed(answer: Answer, texts: Sequence[str], size: int) -> Callable[[], float]:
    """A turn of an answer to all texts, `size` at a time: its rows a second."""

    def turn() -> float:
        started = time.perf_counter()
        for start in range(0, len(texts), size):
            answer(texts[start : start + size])
        return len(texts) / (time.perf_counter() - started)

    return turn


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
