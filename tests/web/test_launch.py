"""Where a server cannot listen."""

from __future__ import annotations

import socket

import pytest

import serve_distill
from common.cli import UserError
from common.web import launch


def test_a_port_that_is_taken_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        sentence = rf"cannot listen on 127.0.0.1, port {port} \(Address already in use\); choose another --port"
        with pytest.raises(UserError, match=sentence):
            serve_distill.main(["--port", port])


@pytest.mark.parametrize("host", ["203.0.113.1", "no such host"])  # of documentation: nobody has it
def test_an_address_of_another_machine_is_one_sentence(host):
    with pytest.raises(UserError, match=f"cannot listen on {host}, port 0"):
        launch.check_free(host, 0)


def test_a_free_port_stays_free():
    launch.check_free("127.0.0.1", 0)
    launch.check_free("localhost", 0)
