"""An API asked as its own description allows, and otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.documents import pdf
from support.processes import LONGEST


def try_every_operation(url: str, place: Path) -> set[str]:
    """The paths of the API at `url`, each asked a few times by schemathesis and answered as it is described.

    Args:
        place: where hypothesis may leave files.
    """
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, configuration, given, settings
    from hypothesis import strategies as st

    bodies = st.one_of(st.binary(max_size=100), st.sampled_from([pdf(), pdf("Total 12.50"), b"%PDF-1.4"]))
    schemathesis.openapi.media_type("application/pdf", bodies)
    configuration.set_hypothesis_home_dir(place)
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    # FastAPI's lists of allowed methods are incomplete; pydantic takes `false` for 0 and 61.0 for 61; what does not
    # exist is refused although its name is a string
    names = ("allow_header_conformance", "negative_data_rejection", "positive_data_acceptance")
    left_out = [schemathesis.checks.CHECKS.get_one(name) for name in names]
    run = settings(max_examples=4, deadline=None, derandomize=True, database=None,
                   suppress_health_check=list(HealthCheck))  # fmt: skip
    tried = set()
    for result in schema.get_all_operations():
        operation = result.ok()

        def check(case):
            case.call_and_validate(excluded_checks=left_out, timeout=LONGEST)

        run(given(case=operation.as_strategy())(check))()
        tried.add(operation.path)
    return tried
