# PYTHON_ARGCOMPLETE_OK
"""Build the miniature base, offline: Qwen2 architecture, byte-level BPE, pretrained on unlabelled prompts.

    python tiny_student.py --save_dir models/tiny_student
    python tiny_student.py --save_dir models/tiny_student --prompts data/creditmix_sft.jsonl
    python tiny_student.py --save_dir models/tiny_coder --prompts data/codegen_sft.jsonl --texts data/codegen_sft.jsonl
    python tiny_student.py --save_dir models/tiny_reader --prompts data/idp_sft.jsonl --copying --learning_rate 0.01
    python tiny_student.py --save_dir models/tiny_teacher --size medium

Of --prompts (SFT or KD rows) only "input" is read, never the answers, so the base itself stands at chance. Without
--prompts it is made of synthetic ones. A base for CodeGen has to have seen code: of --texts (SFT rows) only "output" is
read, as text by itself that no prompt goes with, its names and numbers exchanged.
A base for IDP has to copy: --copying gives it heads for that, digits in pairs and exercises.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from common import cli, run_record
from common.data import rows as records
from common.files import grant, sha256_file, write_json
from common.tasks.ranking import creditmix
from common.tasks.ranking.creditmix import CREDITMIX

SIZES = {  # hidden size, layers, heads
    "small": (128, 3, 8),
    "medium": (256, 5, 8),
    "large": (384, 8, 12),
}
OTHER_SHARE = 0.25  # made-up prompts of other kinds, for each one that is read
SYNTHETIC_PROMPTS = 12_000
VOCABULARY = 1024
TOKENIZER_PROMPTS = 4000  # more of the same changes no merge
RECORD = "base.json"  # in the folder of a base


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="tiny_student.py")
    parser.add_argument("--save_dir", type=cli.folder, default="models/tiny_student")
    parser.add_argument("--prompts", nargs="+", default=[], help='rows whose "input" is read, unlabelled')
    parser.add_argument("--texts", nargs="+", default=[], help='rows whose "output" is read, without its input')
    parser.add_argument("--copying", action="store_true", help="for tasks that copy from their prompts, as IDP does")
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--steps", type=cli.positive_int, default=800)
    parser.add_argument("--rows_per_step", type=cli.positive_int, default=48)
    parser.add_argument("--learning_rate", type=float, default=0.02, help="Muon's; embeddings and norms take a sixth")
    parser.add_argument("--seed", type=cli.seed, default=0)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    if args.copying and (args.texts or not args.prompts):
        raise cli.UserError("--copying makes exercises of --prompts; give them, and leave --texts out")
    check_place(Path(args.save_dir))
    prompts = [row["input"] for path in args.prompts for row in records.read_rows(path, ("input",))]
    if not prompts:
        rows = creditmix.synthesize(SYNTHETIC_PROMPTS, args.seed)
        prompts = [CREDITMIX.prompt(creditmix.clean_features(row["question"])) for row in rows]

    texts = [row["output"] for path in args.texts for row in records.read_rows(path, ("output",))]

    from common.models import loading as models
    from common.models import tokenizers
    from common.training import copying, miniature

    models.quiet_libraries()

    if args.copying:
        source = copying.CopyExercises(prompts, args.seed)
    else:
        prompts += miniature.other_prompts(max(1, round(OTHER_SHARE * len(prompts))), args.seed)
        source = miniature.SelfSupervision(prompts, args.seed, texts)
    sample = source.rng.sample(source.prompts, min(len(source.prompts), TOKENIZER_PROMPTS))
    sample += [source.texts[prompt] for prompt in sample if prompt in source.texts]
    phrases = copying.tokens(prompts) if args.copying else None
    tokenizer = tokenizers.align(miniature.build_tokenizer(sample, VOCABULARY, phrases))
    hidden, layers, heads = SIZES[args.size]
    heads = hidden // copying.HEAD_SIZE if args.copying else heads
    model = miniature.build_model(tokenizer, hidden=hidden, layers=layers, heads=heads, seed=args.seed)
    if args.copying:
        copying.place_heads(model, args.seed)
    losses = miniature.pretrain(
        model,
        tokenizer,
        source,
        steps=args.steps,
        rows_per_step=args.rows_per_step,
        learning_rate=args.learning_rate,
    )
    save(args, model, tokenizer, losses)


def check_place(folder: Path) -> None:
    """Raises UserError for a folder with something else than what this script has written: it would be replaced."""
    if folder.exists() and not (folder / RECORD).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise cli.UserError(f"{folder} holds no {RECORD}, so it is no base of this script; choose another --save_dir")


def save(args: argparse.Namespace, model, tokenizer, losses: dict[str, float]) -> None:
    """Write the model under a temporary name, then put it in place whole."""
    target = Path(args.save_dir)
    building = target.with_name(f".{target.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    model.save_pretrained(building)
    grant(building)
    tokenizer.save_pretrained(building)
    facts = {
        "settings": vars(args),
        "parameters": model.num_parameters(),
        "losses": losses,
        "prompts": [{"path": path, "sha256": sha256_file(path)} for path in args.prompts] or "synthetic",
        "texts": [{"path": path, "sha256": sha256_file(path)} for path in args.texts],
        "versions": run_record.versions(),
    }
    write_json(building / RECORD, facts)
    shutil.rmtree(target, ignore_errors=True)
    building.rename(target)
    cli.log(f"saved {target}: {model.num_parameters():,} parameters, losses {losses}")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
