# PYTHON_ARGCOMPLETE_OK
"""Distillation as a service: submit jobs over HTTP, watch them, download the student; on one machine or on Kubernetes.

    uvicorn serve_distill:app --host 0.0.0.0 --port 8000
    python serve_distill.py --port 8000 --keep_days 30      # the same, without uvicorn's line for every request

The page is at /, the API's description at /docs. Settings come from the environment: DATA_DIR (runs/jobs), BACKEND
(local, or kubernetes), MAX_RUNNING (1, or one a GPU), MAX_QUEUE (1000 jobs), ALLOWED_ROOTS
(runs:data:models:DATA_DIR:RUNS_DIR; local models and data are read from these folders alone), KEEP_DAYS and DATA_QUOTA
(bytes; ended jobs are deleted after so many days, or when all together have more), API_PREFIX, API_KEY, ALLOWED_HOSTS
(names by which it is asked for without a key), MAX_BODY_BYTES (256 KiB), MAX_FILE_BYTES (512 MiB) and FILES_QUOTA (20
GiB) of files that are sent, RUNS_DIR (runs) and FINE_TUNING_MODELS of OpenAI's jobs; for Kubernetes also JOB_TEMPLATE
(k8s/distill-job.yaml), NAMESPACE, IMAGE and GPU_MEMORY (bytes of the cluster's cards).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from common import cli
from common.web import launch


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="serve_distill.py")
    launch.add_address(parser)
    parser.add_argument("--keep_days", type=float, help="delete a job so long after its end; default: KEEP_DAYS")
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    args = cli.parse_args(build_parser(), argv)
    if args.health:
        return launch.is_alive(args.port)
    if args.keep_days is not None and args.keep_days <= 0:
        raise cli.UserError(f"--keep_days {args.keep_days} must be above 0")

    from common.jobs.routes import create_app
    from common.jobs.service import JobServiceSettings

    settings = JobServiceSettings.from_environment()
    if args.keep_days is not None:
        settings = dataclasses.replace(settings, keep_days=args.keep_days)
    launch.run(create_app(settings), args.host, args.port)
    return None


def create_app():
    from common.jobs.routes import create_app

    return create_app()


__getattr__ = launch.app_on_demand(__name__, create_app)

if __name__ == "__main__":
    raise SystemExit(cli.run(main))
