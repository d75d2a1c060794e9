"""How a server is started: by its script, or by uvicorn, which wants an `app` in a module."""

from __future__ import annotations

import argparse
import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from common import cli
from common.cli import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI


def add_address(parser: argparse.ArgumentParser) -> None:
    """--host, --port and --health."""
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be reached from elsewhere")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--health", action="store_true", help="ask a running server instead; exit code 1: not alive")


def serve(
    parser: argparse.ArgumentParser, create_app: Callable[[], FastAPI], argv: Sequence[str] | None = None
) -> int | None:
    """Do what the flags of `add_address` say: serve an app, or the exit code of --health."""
    args = cli.parse_args(parser, argv)
    if args.health:
        return is_alive(args.port)
    run(create_app(), args.host, args.port)
    return None


def is_alive(port: int) -> int:
    """Exit code of --health, as a container's health check takes it."""
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5):
            return cli.DONE
    except OSError as error:
        cli.log(f"no server answers on port {port} ({error})")
        return cli.FAILED


def check_free(host: str, port: int) -> None:
    """Raise UserError where nothing can listen, as on a port that another server has."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen on {host}, port {port} ({error.strerror}); choose another --port") from error


def run(app: FastAPI, host: str, port: int) -> None:
    """Serve until a signal, without a line in the log for every request, and with patience for slow clients.

    Raises:
        UserError: nothing can listen there.
    """
    import uvicorn

    from common.web.connections import PatientProtocol

    check_free(host, port)
    allow_many_connections()
    uvicorn.run(app, host=host, port=port, access_log=False, http=PatientProtocol)


def allow_many_connections() -> None:
    """Raise this process's number of open files to what its limits allow; 1024 are soon reached."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limits here
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def app_on_demand(module: str, create_app: Callable[[], FastAPI]) -> Callable[[str], Any]:
    """A script's `__getattr__`: its `app` is made when uvicorn asks for it, so that `--help` needs none.

    A setting that cannot be is one sentence and a SystemExit.
    """

    def getattr_(name: str) -> Any:
        if name != "app":
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        try:
            return create_app()
        except UserError as error:
            raise SystemExit(f"error: {error}") from error

    return getattr_
