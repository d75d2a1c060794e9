"""Shared code of the distill-slm scripts, in rooms with layers: see common/README.md."""

import sys
from types import TracebackType

if sys.version_info < (3, 11):  # noqa: UP036 (an older one is told so, before it meets what it cannot read)
    raise SystemExit(f"error: Python 3.11 or newer is needed, and this is {sys.version.split()[0]} ({sys.executable})")

_traceback = sys.excepthook


def _name_what_is_missing(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A sentence for a package that this Python lacks, which a script can find out before its `main` runs."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if not issubclass(kind, ModuleNotFoundError) or name in ("", "common"):
        _traceback(kind, error, trace)
        return
    remedy = "source .venv/bin/activate, or pip install -r requirements.txt"
    print(f"error: the package {name} is missing in {sys.executable}; {remedy}", file=sys.stderr)


sys.excepthook = _name_what_is_missing
