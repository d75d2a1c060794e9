# PYTHON_ARGCOMPLETE_OK
"""Prepare programming problems: run their solutions, split by problem, write the SFT, KD and DPO rows and the held-out.

    python codegen_prepare.py --src sanitized-mbpp.json --outdir data
    python codegen_prepare.py --synthesize 6000 --outdir data

Reads MBPP, HumanEval or own rows {"prompt", "solution", "tests"}, as JSON or JSONL, also gzipped, or makes families of
small functions. Writes into --outdir: codegen_sft.jsonl and codegen_kd.jsonl (of each training problem the code, the
plan, and the code of the plan), codegen_dpo.jsonl (rejected: the solution with one change that its tests fail),
codegen_train.jsonl (the training problems with their tests, for teacher_generate.py), codegen_dev.jsonl and
codegen_val.jsonl (other problems, with tests) and codegen_manifest.json (counts, checksums).
Solutions that fail their own tests are left out and named. The given solutions and their mutants run in the sandbox
and only there; code that a model wrote is not run here, so no consent is asked.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from common import cli
from common.cli import UserError
from common.data import rows as records
from common.data import splits, task_record
from common.files import json_text, jsonl_text, sha256_file, sha256_text, write_together
from common.sandbox import grading
from common.tasks.codegen import mutation as code_mutation
from common.tasks.codegen import prompt as codegen
from common.tasks.codegen import rows as code_problems
from common.tasks.codegen import synthesis as code_synthesis
from common.tasks.codegen.rows import CodeProblem

OUTPUT_FILES = [f"codegen_{what}.jsonl" for what in ("sft", "kd", "dpo", "train", "dev", "val")]
ROUNDS = 8  # mutants of a problem that are run at most, until one fails


def build_parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    parser = cli.parser(__doc__, prog="codegen_prepare.py")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--src", help="problems: MBPP, HumanEval, or rows with prompt, solution and tests")
    source.add_argument("--synthesize", type=cli.positive_int, metavar="N", help="make N problems instead")
    parser.add_argument("--outdir", type=cli.folder, default="data", help="folder to write into (default: data)")
    parser.add_argument("--seed", type=cli.seed, default=42, help="of the mutants, the order and --synthesize")
    parser.add_argument("--allow_no_sandbox", action="store_true", help="where no sandbox works, run without one")
    parser.add_argument("--skip_bad_rows", action="store_true", help="name and count bad rows and go on without them")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write the data files and print what is in them."""
    args = cli.parse_args(build_parser(), argv)
    outdir = Path(args.outdir)
    records.check_outdir(outdir, args.src, OUTPUT_FILES)
    failing: list[dict[str, str]] = []  # what a made-up solution returns is what its tests expect
    if args.synthesize:
        problems = code_problems.problems_of(code_synthesis.synthesize(args.synthesize, args.seed))
        name = f"--synthesize {args.synthesize} --seed {args.seed}"
        digest = sha256_text(jsonl_text(problem.row() for problem in problems))
    else:
        problems = code_problems.read(args.src, args.skip_bad_rows)
        name, digest = Path(args.src).name, sha256_file(args.src)
        problems, failing = run_solutions(problems, args.allow_no_sandbox)
    parts: dict[str, list[CodeProblem]] = {part: [] for part in splits.PARTS}
    for problem in problems:
        parts[splits.part_of(problem.group)].append(problem)
    empty = [part for part in ("train", "validation") if not parts[part]]
    if empty:
        raise UserError(f"{name} has no problem for the {empty[0]} part ({len(problems)} in all); give more problems")
    sft, kd, dpo, untold = training_rows(parts["train"], args)
    texts = dict(
        zip(
            OUTPUT_FILES,
            (
                jsonl_text(rows)
                for rows in (sft, kd, dpo, *([problem.row() for problem in parts[part]] for part in splits.PARTS))
            ),
            strict=True,
        )
    )
    manifest = {
        "task": "codegen",
        task_record.MANIFEST_KEY: task_record.of_prompts(task_record.CODEGEN, "codegen", [row["input"] for row in sft]),
        "source": {"name": name, "sha256": digest},
        "synthetic": bool(args.synthesize),
        "seed": args.seed,
        "problems": len(problems) + len(failing),
        "left_out": failing,
        "without_failing_mutant": untold,
        "shares": {
            "train": round(1 - splits.DEV_SHARE - splits.VALIDATION_SHARE, 4),
            "dev": splits.DEV_SHARE,
            "validation": splits.VALIDATION_SHARE,
        },
        "parts": {
            part: {"groups": len({problem.group for problem in members}), "problems": len(members)}
            for part, members in parts.items()
        },
        "teacher": {"name": "gold solutions"},
        "files": {file: {"rows": text.count("\n"), "sha256": sha256_text(text)} for file, text in texts.items()},
    }
    write_together(outdir, texts | {"codegen_manifest.json": json_text(manifest)})
    print_summary(manifest, outdir)


def run_solutions(
    problems: Sequence[CodeProblem], allow_unsafe: bool
) -> tuple[list[CodeProblem], list[dict[str, str]]]:
    """(problems whose solution passes its tests, what is wrong with the others).

    Raises:
        UserError: not one solution passes.
    """
    verdicts = grade("solutions", [(problem.solution, problem.graded_by()) for problem in problems], allow_unsafe)
    good = [problem for problem, verdict in zip(problems, verdicts, strict=True) if verdict.passed]
    failing = [
        {"task_id": problem.task_id, "error": verdict.error, "detail": verdict.detail}
        for problem, verdict in zip(problems, verdicts, strict=True)
        if not verdict.passed
    ]
    for entry in failing:
        reason = f"{entry['error']} ({entry['detail']})"
        cli.log(f"problem {entry['task_id']} left out, its solution fails its tests: {reason}")
    if not good:
        raise UserError(f"none of the {len(problems)} solutions passes its own tests; check solutions and tests")
    return good, failing


def training_rows(
    problems: Sequence[CodeProblem], args: argparse.Namespace
) -> tuple[list[dict], list[dict], list[dict], list[str]]:
    """SFT rows, KD rows, DPO rows, and the ids of problems of which no mutant fails."""
    sft, kd, dpo, untold = [], [], [], []
    rejected = failing_mutants(problems, args.seed, args.allow_no_sandbox)
    for problem, mutant in zip(problems, rejected, strict=True):
        group = {"group": problem.group}
        pairs = codegen.training_pairs(problem.prompt, problem.plan, problem.solution)
        sft += [{"input": prompt, "output": answer, **group} for prompt, answer in pairs]
        kd += [{"input": prompt, "teacher_output": answer, **group} for prompt, answer in pairs]
        if mutant is None:
            untold.append(problem.task_id)
            continue
        wrong = codegen.code_answer(mutant)
        answers = codegen.code_answer(problem.solution)
        dpo += [{"prompt": prompt, "chosen": answer, "rejected": wrong, **group} for prompt, answer in pairs
                if answer == answers]  # fmt: skip
    for rows in (sft, kd, dpo):
        random.Random(args.seed).shuffle(rows)
    return sft, kd, dpo, untold


def failing_mutants(problems: Sequence[CodeProblem], seed: int, allow_unsafe: bool) -> list[str | None]:
    """For each problem a changed solution that was run and fails; None where none of those tried does."""
    mutants = [code_mutation.mutants(problem.solution, seed) for problem in problems]
    failing: list[str | None] = [None] * len(problems)
    for attempt in range(ROUNDS):
        tried = [i for i, of_problem in enumerate(mutants) if failing[i] is None and attempt < len(of_problem)]
        pairs = [(mutants[index][attempt], problems[index].graded_by()) for index in tried]
        for index, verdict in zip(tried, grade("mutants", pairs, allow_unsafe), strict=True):
            if not verdict.passed:
                failing[index] = mutants[index][attempt]
    return failing


def grade(what: str, pairs: Sequence[tuple[str, grading.Tests]], allow_unsafe: bool) -> list[grading.Verdict]:
    """Verdicts of the sandbox, with a progress bar."""
    if not pairs:
        return []
    from tqdm import tqdm

    with tqdm(total=len(pairs), desc=f"running {what}", unit=" runs") as progress:
        return grading.grade_many(pairs, progress=lambda verdict: progress.update(), allow_unsafe=allow_unsafe)


def print_summary(manifest: dict, outdir: Path) -> None:
    """What was read, what was left out and why, and the files."""
    synthetic = " (SYNTHETIC)" if manifest["synthetic"] else ""
    left_out, untold = manifest["left_out"], manifest["without_failing_mutant"]
    print(
        f"{manifest['source']['name']}{synthetic}: {manifest['problems']:,} problems, "
        f"{len(left_out):,} left out because their solution fails their tests"
    )
    for error, count in Counter(entry["error"] for entry in left_out).most_common():
        print(f"  {count:>8,}  {error}")
    print(f"{'part':<12}{'groups':>10}{'problems':>10}")
    for part, entry in manifest["parts"].items():
        print(f"{part:<12}{entry['groups']:>10,}{entry['problems']:>10,}")
    if untold:
        print(f"{len(untold):,} training problems have no DPO row: their tests fail none of the mutants tried")
    for file, entry in manifest["files"].items():
        print(f"{outdir / file}: {entry['rows']:,} rows")
    print(outdir / "codegen_manifest.json")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
