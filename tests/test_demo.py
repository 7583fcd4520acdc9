"""`tests.demo`: what the end of `make demo` prints and opens is the user's own."""

from __future__ import annotations

import socket

from tests.demo import free_port


def test_the_page_is_served_beside_a_server_that_was_there_before() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        port = free_port(taken)
        assert port != taken
    assert free_port(port) == port
