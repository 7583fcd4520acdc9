"""docker/healthcheck.py: exit 0 for 200 alone, within seconds."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docker" / "healthcheck.py"


class Answers(BaseHTTPRequestHandler):
    """/200 answers 200, /503 answers 503, /slow never."""

    def do_GET(self) -> None:
        if self.path == "/slow":
            time.sleep(8)
            return
        self.send_response(int(self.path[1:]))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.socket.close()


def check(url: str, **variables: str) -> int:
    environment = os.environ | {"GMCONV_HEALTH_URL": url} | variables
    command = [sys.executable, "-I", str(SCRIPT)]
    return subprocess.run(command, env=environment, capture_output=True, timeout=6, check=False).returncode


@pytest.mark.parametrize(("path", "code"), [("/200", 0), ("/204", 1), ("/404", 1), ("/503", 1), ("/slow", 1)])
def test_only_200_in_time_is_healthy(server: str, path: str, code: int) -> None:
    assert check(server + path) == code


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "file:///etc/passwd", "", "nonsense"])
def test_nothing_listening_or_another_scheme_is_unhealthy(url: str) -> None:
    assert check(url) == 1


def test_a_proxy_of_the_environment_is_not_asked(server: str) -> None:
    """Orchestrators set these for the whole container; the check never leaves it."""
    nobody = "http://127.0.0.1:9"
    assert check(server + "/200", http_proxy=nobody, HTTP_PROXY=nobody, all_proxy=nobody) == 0


def test_tls_with_a_certificate_of_another_name_is_healthy(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=models.example",
            "-keyout", key, "-out", certificate,
        ],
        capture_output=True, check=True,
    )  # fmt: skip
    http = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    http.socket = context.wrap_socket(http.socket, server_side=True)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        url = f"https://127.0.0.1:{http.server_port}"
        assert check(f"{url}/200", https_proxy="http://127.0.0.1:9") == 0
        assert check(f"{url}/503") == 1
    finally:
        http.shutdown()
        http.server_close()
