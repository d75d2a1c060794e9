# PYTHON_ARGCOMPLETE_OK
"""Serve models and train them behind one port, so that a script for OpenAI's API changes its base_url alone.

    python serve_all.py --port 8000
    FINE_TUNING_MODELS='gpt-*=Qwen/Qwen2.5-3B-Instruct' python serve_all.py    # what stands in for OpenAI's models

It is serve_creditmix.py, and serve_distill.py under API_PREFIX (/training, with the page of its jobs) and under
/v1/files and /v1/fine_tuning, and where a model is deleted. Both take their settings from the environment as they do
alone; MAX_QUEUE and MAX_BODY_BYTES count for both, and RUNS_DIR is where fine-tuned models are put and served from.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from common import cli
from common.web import launch

PREFIX = "/training"


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="serve_all.py")
    launch.add_address(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    return launch.serve(build_parser(), create_app, argv)


def create_app():
    from common.jobs import fine_tuning_routes
    from common.jobs import routes as jobs
    from common.jobs.service import JobServiceSettings
    from common.serving import routes as serving
    from common.serving.settings import ServerSettings
    from common.web.together import together

    serves, trains = ServerSettings.from_environment(), JobServiceSettings.from_environment()
    prefix, runs_dir = trains.api_prefix or PREFIX, Path(os.path.abspath(serves.runs_dir))
    trains = dataclasses.replace(trains, api_prefix=prefix, runs_dir=runs_dir)
    return together(serving.create_app(serves), jobs.create_app(trains), prefix, fine_tuning_routes.OPENAIS)


__getattr__ = launch.app_on_demand(__name__, create_app)

if __name__ == "__main__":
    raise SystemExit(cli.run(main))
