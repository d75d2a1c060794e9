"""Whether the exports of a job can be made, asked before its training where it runs.

python -m common.jobs.export_check int8 gguf-Q8_0
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common import cli
from common.export import packages


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="python -m common.jobs.export_check")
    parser.add_argument("exports", nargs="+", help="what a job lists as its exports")
    parser.add_argument("--no_proof", action="store_true", help="they are not to be compared with the model")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    check(args.exports, proves=not args.no_proof)


def check(exports: Sequence[str], *, proves: bool) -> None:
    """Raises UserError where a package is not installed that one of a request's `exports` needs."""
    for name in exports:
        form, _, quant = name.partition("-")
        try:
            packages.check(form, quant, proves=proves)
        except cli.UserError as error:  # of the exporter's flags, which are a request's fields
            raise cli.UserError(f"exports: {str(error).replace('--', '')}") from error


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
