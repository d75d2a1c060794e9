# PYTHON_ARGCOMPLETE_OK
"""Distillation from a teacher's own distributions: token by token, its hidden states too, or label by label.

    python distill_train.py --teacher gpt2 --student distilgpt2 --dataset wikitext --subset wikitext-2-raw-v1 \\
        --save_dir runs/distilgpt2 --max_steps 200 --temperature 2.0 --forward_kl 0.7 --teacher_ce 0.3 --hidden_mse 0.05
    python distill_train.py --teacher Qwen/Qwen2.5-7B-Instruct --student Qwen/Qwen2.5-3B-Instruct --data squad.json \\
        --save_dir runs/squad --teacher_cache runs/cache/qwen7b_squad
    python distill_train.py --on_policy --teacher Qwen/Qwen2.5-7B-Instruct --student Qwen/Qwen2.5-3B-Instruct \\
        --init_adapter runs/squad_sft --data squad.json --save_dir runs/squad_on_policy --rounds 4 --epochs 1
    python distill_train.py --labels --student Qwen/Qwen2.5-3B-Instruct --data data/creditmix_labels.jsonl \\
        --save_dir runs/creditmix_labels

--data is rows {"input", "output"} or {"input", "teacher_output"}, SQuAD's JSON, or a text file; --dataset a data set of
the Hub or a folder. With --teacher_cache the teacher runs first, alone, and training reads what it wrote; a cache that
is complete loads no teacher. What a teacher with another vocabulary says is written there in the student's tokens.
Without a cache two ways work: its text (teacher_generate.py, then kd_train.py), or for labels its probabilities
(teacher_generate.py --probabilities, then --labels with rows {"input", "probabilities": {label: p}[, "output"]}), which
any model can give.

With --on_policy the student writes answers to the prompts of a round, the teacher reads them into the cache, the
student trains from it; then comes the next round. Train the student first (sft_train.py or kd_train.py, then
--init_adapter). Leaves rounds.csv and rounds.png, and what each round has done in rounds/.

A loss term counts with the weight given; with none given, forward_kl and ce count half each. With --ce alone this is
plain training, of running text too, and needs no teacher. Two other recipes' names of the terms are accepted, also as
keys of --config: alpha_kl and gamma_kl mean forward_kl, alpha_ce means ce, beta_ce means teacher_ce, beta_mse and
gamma_mse mean hidden_mse, delta_cos means hidden_cosine, epsilon_attn means attention_mse.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common import cli
from common.distillation import dry_run, flags, trainers
from common.distillation import rows as distill_rows
from common.export import model_card
from common.models.flags import parse_args
from common.tasks import recognition
from common.tasks.ranking.loading import task_of_rows
from common.training import run


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="distill_train.py")
    flags.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    settings = flags.settings_of(parse_args(build_parser(), argv))
    task = task_of_rows(settings.task, settings.data)
    if settings.dry_run:
        return dry_run.show(settings, task)
    rows, held_out = distill_rows.read_both(settings, task)
    task_of = (lambda *_: task.record()) if settings.labels else recognition.record_of
    record = run.start(settings, rows, argv, task_of)
    with run.recorded_failure(record):
        from common.distillation.objective import Objective

        objective = Objective(settings.weights, settings.temperature, settings.jsd_beta)
        cli.log(f"loss = {objective}")
        if record:
            record.write(objective=str(objective))
        if settings.on_policy:
            from common.distillation import on_policy

            on_policy.train(settings, record, objective, rows, held_out)
        else:
            trainer, settings = trainers.build(settings, record, objective, task, rows, held_out)
            run.train_and_save(trainer, settings, record)
    model_card.refresh([settings.save_dir])
    return None


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
