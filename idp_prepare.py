# PYTHON_ARGCOMPLETE_OK
"""Prepare IDP data: documents and their fields to SFT, KD and DPO rows and held-out documents.

    python idp_prepare.py --src receipts.jsonl --schema data/idp_schema.json --outdir data
    python idp_prepare.py --src scans/ --schema data/idp_schema.json --outdir data
    python idp_prepare.py --synthesize 3000 --outdir data

Reads rows {"document", "fields"} (JSONL or a JSON list), or a folder of texts, PDFs and images with the fields of each
in name.json beside it; or makes invoices up. Scans are read by text recognition, see --ocr. Writes into --outdir:
idp_sft.jsonl, idp_kd.jsonl and idp_dpo.jsonl (training documents), idp_dev.jsonl and idp_val.jsonl (other documents,
with their fields and, where they are known, the boxes of their words) and idp_manifest.json (counts, checksums); with
--synthesize and no --schema also idp_schema.json, the schema of its invoices. The split is by the document's text, case
and punctuation aside. The same input and seed give the same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common import cli
from common.cli import UserError
from common.data import rows as records
from common.data import splits, task_record
from common.files import json_text, jsonl_text, read_json, sha256_text, write_together
from common.generation import json_schema
from common.tasks.idp import documents, reading
from common.tasks.idp import flags as idp_flags
from common.tasks.idp import prompt as idp_prompt
from common.tasks.idp import rows as idp_rows
from common.tasks.idp import synthesis as idp_synthesis
from common.tasks.idp.training_rows import TrainingRowBuilder

SCHEMA_FILE = "idp_schema.json"
OUTPUT_FILES = [f"idp_{what}.jsonl" for what in ("sft", "kd", "dpo", "dev", "val")]


def build_parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    parser = cli.parser(__doc__, prog="idp_prepare.py")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--src", help="JSONL or JSON list of documents with fields, or a folder of them")
    source.add_argument("--synthesize", type=cli.positive_int, metavar="N", help="make N invoices up instead")
    parser.add_argument("--schema", help="JSON Schema of the fields; --synthesize has one of its own")
    parser.add_argument("--outdir", type=cli.folder, default="data", help="folder to write into (default: data)")
    parser.add_argument("--seed", type=cli.seed, default=42, help="of the mistakes, the order and --synthesize")
    idp_flags.add_ocr_flag(parser)
    idp_flags.add_form_flag(parser, default="written", meaning="written")
    parser.add_argument("--skip_bad_rows", action="store_true", help="name and count bad rows and go on without them")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write the data files and print what is in them."""
    args = cli.parse_args(build_parser(), argv)
    outdir = Path(args.outdir)
    if args.src and not args.schema:
        raise UserError("--src needs --schema with the JSON Schema of its fields")
    records.check_outdir(outdir, args.src, OUTPUT_FILES)
    schema = _schema_of(args, outdir)
    texts = {} if args.schema else {SCHEMA_FILE: json_text(schema)}
    name = Path(args.src).name if args.src else f"--synthesize {args.synthesize} --seed {args.seed}"
    recognise, kept = idp_flags.recognise(args, args.src), reading.kept_beside(outdir / "idp")
    rows = (
        idp_rows.read(args.src, schema, args.skip_bad_rows, recognise, kept)
        if args.src
        else _synthetic_rows(args, schema)
    )

    parts: dict[str, list[dict]] = {part: [] for part in splits.PARTS}
    for row in rows:
        parts[splits.part_of(row["group"])].append(row)
    if not parts["train"] or not parts["validation"]:
        raise UserError(f"{name} has {len(rows)} documents, too few for a held-out part; give more of them")
    training = TrainingRowBuilder(schema, args.typed_fields, args.seed)
    sft, kd, dpo = training.of(parts["train"])
    for file, members in zip(OUTPUT_FILES, (sft, kd, dpo, parts["dev"], parts["validation"]), strict=True):
        texts[file] = jsonl_text(members)
    manifest = {
        "task": "idp",
        task_record.MANIFEST_KEY: task_record.of_prompts(
            task_record.IDP,
            "idp",
            [row["input"] for row in sft],
            instruction=idp_prompt.INSTRUCTION,
            schema=schema,
            typed_fields=args.typed_fields,
        ),
        "source": {"name": name, "sha256": sha256_text(jsonl_text(rows))},
        "synthetic": args.src is None,
        "seed": args.seed,
        "typed_fields": args.typed_fields,
        "as_written": training.counts,
        "instruction": idp_prompt.INSTRUCTION,
        "schema": {
            "name": Path(args.schema or SCHEMA_FILE).name,
            "sha256": sha256_text(json_text(schema)),
        },
        "group_key": "document",
        "shares": {
            "train": round(1 - splits.DEV_SHARE - splits.VALIDATION_SHARE, 4),
            "dev": splits.DEV_SHARE,
            "validation": splits.VALIDATION_SHARE,
        },
        "parts": {
            part: {"groups": len(splits.groups_of(members)), "rows": len(members)} for part, members in parts.items()
        },
        "teacher": {"name": "gold fields"},
        "files": {file: {"sha256": sha256_text(text)} for file, text in texts.items()},
    }
    write_together(outdir, texts | {"idp_manifest.json": json_text(manifest)})
    if args.src and Path(args.src).is_dir():
        kept.unlink(missing_ok=True)
    _print_summary(manifest, outdir)


def _schema_of(args: argparse.Namespace, outdir: Path) -> json_schema.Schema:
    """--schema's, else that of the invoices that are made up."""
    if not args.schema:
        _keep_other_schema(outdir / SCHEMA_FILE, idp_synthesis.SCHEMA)
        return idp_synthesis.SCHEMA
    schema = json_schema.load(args.schema)
    json_schema.preflight(schema, best_effort=True)  # stops at a schema that no fields can satisfy
    return schema


def _synthetic_rows(args: argparse.Namespace, schema: json_schema.Schema) -> list[dict]:
    rows = idp_synthesis.synthesize(args.synthesize, args.seed)
    for row in rows:
        wrong = json_schema.errors(row["fields"], schema)
        if wrong:
            raise UserError(f"--schema {args.schema} is not one of the invoices that --synthesize makes: {wrong[0]}; "
                            "leave it out")  # fmt: skip
        row["group"] = documents.group_of(row["document"])
    return rows


def _keep_other_schema(path: Path, schema: json_schema.Schema) -> None:
    """Refuse to write the synthetic invoices' schema over another one."""
    if path.exists() and read_json(path) != schema:
        raise UserError(f"{path} is there and is another schema; choose another --outdir, or move the file away")


def _print_summary(manifest: dict, outdir: Path) -> None:
    print(f"{manifest['source']['name']}{' (SYNTHETIC)' if manifest['synthetic'] else ''}")
    print(f"{'part':<12}{'documents':>10}{'unlike':>10}")
    for part, counts in manifest["parts"].items():
        print(f"{part:<12}{counts['rows']:>10,}{counts['groups']:>10,}")
    if manifest["as_written"]["not_in_document"]:
        print(
            "{not_in_document:,} of {fields:,} dates and numbers are not in their document".format(
                **manifest["as_written"]
            )
        )
    for file in (*manifest["files"], "idp_manifest.json"):
        print(outdir / file)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
