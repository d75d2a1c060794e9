"""OpenAI's client of the job service: to an application in this process, or to a server."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from common.jobs.routes import create_app
from common.jobs.store import ENDED
from support.jobs_served import settings


def in_process(data: Path, **changes: Any) -> tuple[OpenAI, Any]:
    """(client, the service); no job is run."""
    web = TestClient(create_app(settings(data, **changes)), base_url="http://localhost")
    return OpenAI(base_url="http://localhost/v1", api_key="none", http_client=web, max_retries=0), web.app.state.service


def of_server(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def until(client: OpenAI, job_id: str, *statuses: str) -> FineTuningJob:
    """The job once it has one of these statuses; ended is enough where none is named."""
    end = time.monotonic() + 600  # beside other tests a training on two cores may take minutes
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in (statuses or ENDED):
        assert time.monotonic() < end, f"waited in vain for {statuses or ENDED}: {job}"
        time.sleep(0.05)
    return job


def chats(rows: int, how: dict[str, Any] | None = None) -> bytes:
    """A file of chats; of one for a stand-in (see `support.jobs_served`) the first row tells it how to behave."""
    lines = []
    for number in range(rows):
        turns = [{"role": "user", "content": f"Question {number}"}, {"role": "assistant", "content": "Yes"}]
        lines.append(json.dumps({"messages": turns, **({"how": how} if how is not None else {})}))
    return ("\n".join(lines) + "\n").encode()


def preferences(rows: int) -> bytes:
    """A file of OpenAI's preferences."""
    lines = []
    for number in range(rows):
        asked = {"messages": [{"role": "user", "content": f"Question {number}"}]}
        sides = {
            name: [{"role": "assistant", "content": name}] for name in ("preferred_output", "non_preferred_output")
        }
        lines.append(json.dumps({"input": asked, **sides}))
    return ("\n".join(lines) + "\n").encode()
