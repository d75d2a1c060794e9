"""The job service with other scripts, in a process that can be killed.

python tests/support/job_server.py PORT SETTINGS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import uvicorn

sys.path.insert(0, str(Path(__file__).parents[2]))

from common.jobs.routes import create_app
from common.jobs.service import JobServiceSettings


def main(port: str, settings: str) -> None:
    values = json.loads(settings)
    for name in ("data_dir", "scripts", "runs_dir"):
        values[name] = Path(values[name])
    values["allowed_roots"] = tuple(map(Path, values["allowed_roots"]))
    uvicorn.run(create_app(JobServiceSettings(**values)), port=int(port), access_log=False, log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
