"""Fixtures of the cascade's tests."""

from __future__ import annotations

import pytest
from support.processes import fork_server


@pytest.fixture(scope="session")
def imported() -> None:
    """What models' processes import is there, so that no request waits for it."""
    child = fork_server().Process(target=int)
    child.start()
    child.join()
