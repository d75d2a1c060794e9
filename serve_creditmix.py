# PYTHON_ARGCOMPLETE_OK
"""Serve a base model and every adapter under runs/ over HTTP: CreditMix, IDP, CodeGen, and OpenAI's chat API.

    uvicorn serve_creditmix:app --host 0.0.0.0 --port 8000
    python serve_creditmix.py --port 8000        # the same, without uvicorn's line for every request

The page is at /, the API's description at /docs. Settings come from the environment: RUNS_DIR (runs), BASE_MODEL (the
base of the adapters found), ENGINE (torch, or llama_cpp for a GGUF as BASE_MODEL), PRELOAD=1, NUM_NULL_PROMPTS,
LOAD_IN_4BIT (auto), OFFLOAD_FOLDER, AUTO_FIT=1, IDP_SCHEMA (data/idp_schema.json), MAX_BASES (2), MAX_BATCH_TOKENS
(8192), MAX_WAIT_MS (0), MAX_QUEUE (1024 rows), REQUEST_TIMEOUT (120 s), MAX_BODY_BYTES (1 MiB), API_KEY, ALLOWED_HOSTS
(names by which it is asked for without a key), AUDIT_LOG=path, AUDIT_INPUTS=1, AUDIT_MAX_BYTES (64 MiB).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common import cli
from common.web import launch


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="serve_creditmix.py")
    launch.add_address(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    return launch.serve(build_parser(), create_app, argv)


def create_app():
    from common.serving.routes import create_app

    return create_app()


__getattr__ = launch.app_on_demand(__name__, create_app)

if __name__ == "__main__":
    raise SystemExit(cli.run(main))
