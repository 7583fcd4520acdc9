"""Bounds of the REST side on raw sockets, and requests nobody should send."""

from __future__ import annotations

import gzip
import json
import os
import select
import shutil
import socket
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..conftest import Server, classifier, heavy

Start = Callable[..., Server]
INFER = "/v2/models/tiny/infer"
X = np.random.default_rng(0).random((1, 3, 8, 8), np.float32)


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "input", "shape": [1, 3, 8, 8], "datatype": "FP32", "data": X.ravel().tolist(), **changes}


def post(server: Server, document: Any, headers: dict[str, str] | None = None, tail: bytes = b"") -> tuple[int, Any]:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    if tail or (headers and "Inference-Header-Content-Length" in headers):
        headers = {"Inference-Header-Content-Length": str(len(text)), **(headers or {})}
    status, got, body = server.request("POST", INFER, text + tail, headers)
    assert got["content-type"] in ("application/json", "application/octet-stream")
    return status, json.loads(body) if got["content-type"] == "application/json" else body


def raw(server: Server, data: bytes, read: bool = True, port: int = 0) -> bytes:
    """Send bytes on a new connection, read until it closes."""
    with socket.create_connection(("127.0.0.1", port or server.http_port), timeout=20) as connection:
        answer = b""
        try:
            connection.sendall(data)
            while read and (piece := connection.recv(65536)):
                answer += piece
        except ConnectionError:
            pass
        return answer


def hang_up(connection: socket.socket) -> None:
    """Close so that the server learns at once that nobody reads any more (a mere end of writing is no hang-up)."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def alive(server: Server) -> None:
    status, answer = post(server, {"inputs": [tensor()]})
    assert status == 200, answer


def test_json_request_flat_and_nested_without_a_content_type(server: Server) -> None:
    flat = post(server, {"id": "7", "inputs": [tensor()]})
    nested = post(server, {"id": "7", "inputs": [tensor(data=X.tolist())]})
    assert flat == nested
    assert flat[0] == 200
    assert flat[1]["id"] == "7"
    assert flat[1]["outputs"][0]["shape"] == [1, 4]


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"inputs": 3}',
        b'{"inputs": []}',
        b'{"inputs": [{}]}',
        b"[" * 100_000,
        b'{"inputs": ' + b"[" * 50_000,
        b'{"parameters": {"a": ' + b'{"a":' * 20_000,
        b'{"id": ' + b"9" * 10_000 + b', "inputs": []}',
        {"inputs": [tensor(), tensor()]},
        {"inputs": [tensor(name="other")]},
        {"inputs": [tensor(name="x" * 100_000)]},
        {"inputs": [tensor(datatype="FP16")]},
        {"inputs": [tensor(datatype="BYTES", data=["a"])]},
        {"inputs": [tensor(shape=[1, 3, 8])]},
        {"inputs": [tensor(shape=[1, 3, 8, -8])]},
        {"inputs": [tensor(shape=[0, 3, 8, 8], data=[])]},
        {"inputs": [tensor(shape=[2**62, 3, 8, 8])]},
        {"inputs": [tensor(shape=[10**4000, 3, 8, 8])]},
        {"inputs": [tensor(shape=[1] * 100)]},
        {"inputs": [tensor(shape=[1.5, 3, 8, 8])]},
        {"inputs": [tensor(shape="1388")]},
        {"inputs": [tensor(data=[1.0])]},
        {"inputs": [tensor(data=["a"] * 192)]},
        {"inputs": [tensor(data=[[1.0]] * 192)]},
        {"inputs": [tensor(data={"a": 1})]},
        {"inputs": [tensor(data=None)]},
        {"inputs": [tensor(data=[10**400] * 192)]},
        {"inputs": [tensor(data=X.reshape(3, 1, 8, 8).tolist())]},
        {"inputs": [tensor(parameters={"binary_data_size": 4})]},
        {"inputs": [tensor(parameters={"binary_data_size": -1})]},
        {"inputs": [tensor(parameters={"binary_data_size": True})]},
        {"inputs": [tensor(parameters={"binary_data_size": 2**70})]},
        {"inputs": [tensor(parameters={"shared_memory_region": "r"})]},
        {"inputs": [tensor()], "outputs": [{"name": "none"}]},
        {"inputs": [tensor()], "outputs": [{"name": "logits"}] * 2},
        {"inputs": [tensor()], "outputs": [{"name": "logits", "parameters": {"classification": -1}}]},
        {"inputs": [tensor()], "outputs": [{"name": "logits", "parameters": {"binary_data": 1}}]},
        {"inputs": [tensor()], "parameters": {"timeout": -1}},
        {"inputs": [tensor()], "parameters": {"priority": 2**64}},
        {"inputs": [tensor()], "parameters": {"binary_data_output": "yes"}},
        {"inputs": [tensor()], "id": "x" * 257},
    ],
    ids=lambda d: (str(d) if not isinstance(d, bytes) else d.decode("latin-1"))[:40].replace("/", ""),
)
def test_malformed_json_is_a_4xx_in_tritons_form(server: Server, document: Any) -> None:
    status, answer = post(server, document)
    assert status in (400, 413, 501)
    assert set(answer) == {"error"}
    assert len(answer["error"]) < 600
    for leak in ("/root", "/tmp", "/usr", "Traceback", ".py"):
        assert leak not in answer["error"]
    alive(server)


BINARY = {"name": "input", "shape": [1, 3, 8, 8], "datatype": "FP32", "parameters": {"binary_data_size": 768}}


@pytest.mark.parametrize(
    ("tail", "headers", "changes"),
    [
        (X.tobytes()[:-1], {}, {}),
        (X.tobytes() + b"\0", {}, {}),
        (X.tobytes(), {"Inference-Header-Content-Length": "999999"}, {}),
        (X.tobytes(), {"Inference-Header-Content-Length": "-1"}, {}),
        (X.tobytes(), {"Inference-Header-Content-Length": "1e3"}, {}),
        (X.tobytes(), {"Inference-Header-Content-Length": "9" * 40}, {}),
        (X.tobytes(), {"Inference-Header-Content-Length": "7"}, {}),
        (X.tobytes(), {"Inference-Header-Content-Length": "0"}, {}),
        (X.tobytes(), {}, {"shape": [2, 3, 8, 8]}),
        (X.tobytes(), {}, {"parameters": {"binary_data_size": 2**63}}),
        (X.tobytes(), {}, {"data": [1]}),
    ],
)
def test_malformed_binary_is_400(server: Server, tail: bytes, headers: dict[str, str], changes: dict[str, Any]) -> None:
    status, answer = post(server, {"inputs": [{**BINARY, **changes}]}, headers, tail)
    assert status == 400
    assert set(answer) == {"error"}
    alive(server)


def test_raw_body_of_a_single_input(server: Server) -> None:
    headers = {"Inference-Header-Content-Length": "0"}
    x = np.random.default_rng(1).random((3, 3, 8, 8), np.float32)
    status, got, body = server.request("POST", INFER, x.tobytes(), headers)
    assert status == 200
    length = int(got["inference-header-content-length"])
    assert json.loads(body[:length])["outputs"][0]["shape"] == [3, 4]
    assert len(body) == length + 3 * 4 * 4
    assert server.request("POST", INFER, x.tobytes()[:-4], headers)[0] == 400
    assert server.request("POST", "/v2/models/add/infer", x.tobytes(), headers)[0] == 400


def test_header_offset_that_leaves_the_tensor_unaligned(server: Server) -> None:
    answers = set()
    for pad in range(8):
        text = json.dumps({"inputs": [BINARY], "parameters": {"binary_data_output": False}}).encode() + b" " * pad
        answers.add(json.dumps(post(server, text, None, X.tobytes())[1]))
    assert len(answers) == 1


def test_numbers_that_are_none_are_null_in_json(server: Server) -> None:
    x = np.full((1, 3, 8, 8), np.nan, np.float32)
    status, answer = post(server, {"inputs": [BINARY], "outputs": [{"name": "logits"}]}, None, x.tobytes())
    assert status == 200
    assert answer["outputs"][0]["data"] == [None] * 4
    assert np.isnan(np.array(answer["outputs"][0]["data"], np.float32)).all(), "as tritonclient reads them"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v2/models/nobody", 404),
        ("GET", "/v2/models/tiny/versions/9", 404),
        ("GET", "/v2/models/tiny/versions/x/ready", 404),
        ("POST", "/v2/models/nobody/infer", 404),
        ("POST", "/v2/models/tiny/versions/9/infer", 404),
        ("POST", "/v2/models//infer", 404),
        ("POST", "/v2/models/a/b/infer", 404),
        ("GET", INFER, 405),
        ("PUT", INFER, 405),
        ("POST", "/v2", 405),
        ("DELETE", "/v2/models/tiny", 405),
        ("GET", "/v2/models/tiny/classify", 405),
        ("GET", "/v2/models/../../etc/passwd", 404),
        ("GET", "/page.css/../../settings.py", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/v2/models/tiny%00", 404),
        ("GET", "/v2/", 404),
    ],
)
def test_unknown_paths_and_methods(server: Server, method: str, path: str, status: int) -> None:
    got, headers, body = server.request(method, path)
    assert got == status
    assert set(json.loads(body)) == {"error"}
    assert "x-request-id" in headers
    assert ("allow" in headers) == (status == 405)


def test_head_and_options_do_not_break_the_connection(server: Server) -> None:
    for method in ("HEAD", "OPTIONS", "PATCH", "TRACE"):
        assert server.request(method, "/v2/health/live")[0] in (200, 405)
    alive(server)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/9.9\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 400_000, b"431"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 200 + b"\r\n", b"431"),
        (b"POST " + INFER.encode() + b" HTTP/1.1\r\nContent-Length: abc\r\n\r\n", b"400"),
        (b"POST " + INFER.encode() + b" HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"400"),
        (
            b"POST "
            + INFER.encode()
            + b" HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"400",
        ),
        (b"POST " + INFER.encode() + b" HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
    ],
)
def test_bad_http_gets_a_json_error_and_a_closed_connection(server: Server, data: bytes, status: bytes) -> None:
    answer = raw(server, data)
    assert answer.split()[1] == status
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    assert set(json.loads(body)) == {"error"}
    alive(server)


def test_oversized_body_is_refused_before_it_is_read(server: Server) -> None:
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {1 << 40}\r\n\r\n".encode()
    assert raw(server, head).split()[1] == b"413"


def test_oversized_chunked_body(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "tiny.onnx"), "--max-request-mib", "1")
    chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=20) as connection:
        connection.sendall(head + chunk * 20)
        assert connection.recv(4096).split()[1] == b"413"
    alive(server)
    assert server.request("POST", INFER, b"x" * (1 << 20) + b"x")[0] == 413


def test_chunked_body_works(server: Server) -> None:
    body = json.dumps({"inputs": [tensor()]}).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(body[i : i + 50]), body[i : i + 50]) for i in range(0, len(body), 50))
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    assert raw(server, head + chunks + b"0\r\nTrailer: x\r\n\r\n").split()[1] == b"200"


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, lambda b: zlib.compress(b)[2:-4]])
def test_compressed_bodies(server: Server, pack: Callable[[bytes], bytes]) -> None:
    body = json.dumps({"inputs": [tensor()]}).encode()
    encoding = "gzip" if pack is gzip.compress else "deflate"
    assert server.request("POST", INFER, pack(body), {"Content-Encoding": encoding})[0] == 200
    damaged = bytearray(pack(body))
    damaged[len(damaged) // 2] ^= 0xFF
    for bad in (bytes(damaged), pack(body)[:-9], b"", b"\x1f\x8b"):
        assert server.request("POST", INFER, bad, {"Content-Encoding": encoding})[0] == 400
    assert server.request("POST", INFER, pack(body), {"Content-Encoding": "br"})[0] == 415


def test_decompression_bomb(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "tiny.onnx"), "--max-request-mib", "8")
    bomb = gzip.compress(b"\0" * (100 << 20), 5)
    before = resident(server)
    status, _, body = server.request("POST", INFER, bomb, {"Content-Encoding": "gzip"})
    assert status == 413, body
    assert resident(server) - before < 64 << 20
    alive(server)


def resident(server: Server) -> int:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_json_that_decodes_to_more_than_any_request_holds(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "tiny.onnx"))
    before = resident(server)
    for document in (
        b'{"inputs": [' + b'{"name":"","shape":[],"datatype":""},' * 500_000 + b"{}]}",
        b'{"parameters": {' + b",".join(b'"%d":1' % i for i in range(1_000_000)) + b"}}",
        b'{"inputs": [{"name":"input","datatype":"FP32","shape":[' + b"1," * 8_000_000 + b"1]}]}",
        b'{"unknown": [' + b"[]," * 4_000_000 + b"[]]}",
    ):
        status, answer = post(server, document)
        assert status in (400, 413), answer
    # Twice the largest body (16 MB), not the many times that its Python objects would take.
    assert resident(server) - before < 64 << 20
    alive(server)


def test_slow_clients_are_cut_off_and_do_not_hold_up_others(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "tiny.onnx"), "--header-timeout", "0.5", "--body-timeout", "0.5")
    idle = socket.create_connection(("127.0.0.1", server.http_port))
    slow_head = socket.create_connection(("127.0.0.1", server.http_port))
    slow_head.sendall(b"GET / HT")
    slow_body = socket.create_connection(("127.0.0.1", server.http_port))
    slow_body.sendall(f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc".encode())
    alive(server)
    for connection, expected in ((idle, b""), (slow_head, b"408"), (slow_body, b"408")):
        connection.settimeout(5)
        answer = connection.recv(4096)
        assert expected == (answer.split()[1] if answer else b"")
        connection.close()
    assert server.request("GET", "/metrics", port=server.metrics_port)[0] == 200
    assert b"gmconv_serve_inflight_bytes 0.0" in server.request("GET", "/metrics", port=server.metrics_port)[2]


def test_too_many_connections(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "tiny.onnx"), "--max-connections", "5")
    held = [socket.create_connection(("127.0.0.1", server.http_port)) for _ in range(5)]
    time.sleep(0.1)
    answer = raw(server, b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\n")
    assert answer.split()[1] == b"503"
    assert b"retry-after" in answer
    for probe in ("live", "ready"):  # a full server is not a dead one
        assert server.request("GET", f"/v2/health/{probe}")[0] == 200
    assert server.metric("gmconv_serve_refusals", protocol="http", reason="too many connections") == 1
    for connection in held:
        connection.close()
    time.sleep(0.1)
    alive(server)


def test_inflight_bytes_are_bounded(start: Start, tmp_path: Path) -> None:
    """Bytes that came count, those that were only announced do not."""
    server = start(classifier(tmp_path / "tiny.onnx"), "--max-request-mib", "1", "--max-inflight-mib", "1")
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {1 << 20}\r\n".encode()
    for way in (b"", b"Expect: 100-continue\r\n"):
        with socket.create_connection(("127.0.0.1", server.http_port)) as held:
            held.sendall(head + way + b"\r\n" + b"abc")
            time.sleep(0.2)
            alive(server)
            held.sendall(b"x" * (1000 << 10))
            time.sleep(0.2)
            status, headers, _ = server.request("POST", INFER, b"x" * (100 << 10))
            assert status == 503
            assert int(headers["retry-after"]) >= 1
        time.sleep(0.2)
        alive(server)


@pytest.mark.parametrize("endless", [b"a" * 65536, b"x: y\r\n" * 10_000], ids=["one trailer", "many trailers"])
def test_trailers_and_chunk_headers_are_bounded(server: Server, endless: bytes) -> None:
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    for start in (b"0\r\nx: ", b"1;extension="):
        if endless[:1] == b"x" and start[:1] == b"1":
            continue
        began = time.monotonic()
        answer = raw(server, head + start + endless * 200)
        assert not answer or answer.split()[1] in (b"431", b"400")
        assert time.monotonic() - began < 2
    alive(server)


def test_a_request_that_was_answered_early_gets_no_second_answer(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "tiny.onnx"), "--body-timeout", "0.3")
    for length in (100, 1 << 40):
        head = f"POST /v2/models/none/infer HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\nabc".encode()
        answer = raw(server, head)
        assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 413"))
        assert answer.count(b"HTTP/1.1") == 1


def test_idle_connections_keep_no_body(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "tiny.onnx"))
    body = b"x" * (1 << 20)
    message = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    before = resident(server)
    held = []
    for _ in range(100):
        connection = socket.create_connection(("127.0.0.1", server.http_port))
        held.append(connection)
        connection.sendall(message)
        assert connection.recv(65536).split()[1] == b"400"
    assert resident(server) - before < 20 << 20
    for connection in held:
        connection.close()


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit")
def test_a_small_limit_on_open_files_is_said_and_leaves_probes_a_place(start: Start, tmp_path: Path) -> None:
    """Where no descriptor is left nobody is accepted at all, and a server that is alive looks dead."""
    server = start(classifier(tmp_path / "tiny.onnx"), under=("prlimit", "--nofile=256:400"))
    held = [socket.create_connection(("127.0.0.1", server.http_port)) for _ in range(420)]
    assert server.request("GET", "/v2/health/live")[0] == 200
    assert server.request("GET", "/v2/models")[0] == 503
    assert server.said("400 open files are allowed (ulimit -Hn): at most 70 connections per port")
    for connection in held:
        connection.close()


def test_words_that_are_no_numbers_are_refused_by_their_length(start: Start, tmp_path: Path) -> None:
    """1 MB of them took 0.2 s and 60 MB 19 s, with the server standing still: longer than any request to this model."""
    server = start(classifier(tmp_path / "tiny.onnx"))
    before, began = resident(server), time.monotonic()
    for text in (b'{"inputs":[' + b" NaN" * 5_000_000, b'{"inputs":[' + b"-Infinity " * 2_000_000):
        assert post(server, text)[0] == 413
    assert time.monotonic() - began < 2
    assert resident(server) - before < 128 << 20


def test_queue_limits_timeouts_and_cancelled_requests(start: Start, tmp_path: Path) -> None:
    """Behind one long execution: the queue refuses, a timeout expires, a hang-up never reaches the engine."""
    flags = ("--max-batch", "1", "--queue-size", "4", "--queue-timeout", "60")  # on a busy machine a row takes seconds
    server = start(heavy(tmp_path / "m.onnx", size=600, layers=400), *flags)
    x = np.ones((1, 600, 600), np.float32)
    text = {
        "inputs": [
            {"name": "x", "shape": [1, 600, 600], "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
        ]
    }

    def message(**parameters: Any) -> bytes:
        header = json.dumps({**text, "parameters": {"binary_data_output": True, **parameters}}).encode()
        return (
            (
                f"POST /v2/models/m/infer HTTP/1.1\r\nHost: a\r\nInference-Header-Content-Length: {len(header)}\r\n"
                f"Content-Length: {len(header) + x.nbytes}\r\n\r\n"
            ).encode()
            + header
            + x.tobytes()
        )

    def send(**parameters: Any) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", server.http_port), timeout=60)
        connection.sendall(message(**parameters))
        return connection

    first = send()
    time.sleep(0.1)
    expiring = send(timeout=50_000)
    abandoned = send()
    waiting = [send() for _ in range(2)]
    end = time.monotonic() + 2
    while server.metric("nv_inference_pending_request_count", model="m") < 3 and time.monotonic() < end:
        time.sleep(0.01)  # until the bodies have been read: only a request can be abandoned
    hang_up(abandoned)
    time.sleep(0.1)
    more = [send() for _ in range(4)]  # two may take the places that the expired and the abandoned request left
    refused = _readable(more, 2)
    answers = [c.recv(65536) for c in refused]
    assert all(a.split()[1] == b"503" and b"retry-after: " in a for a in answers)
    late = expiring.recv(65536)
    assert late.split()[1] == b"503"
    assert b"time in the queue" in late
    for connection in (first, *waiting):
        assert connection.recv(65536).split()[1] == b"200"
    for connection in (c for c in more if c not in refused):
        assert connection.recv(65536).split()[1] in (b"200", b"503")
    for connection in (first, expiring, *waiting, *more):
        connection.close()
    executed = server.metric("nv_inference_exec_count", model="m")
    answered = server.metric("nv_inference_request_success", model="m")
    assert executed == answered
    assert server.metric("nv_inference_request_failure", model="m", reason="REJECTED") >= 3
    assert server.metric("nv_inference_request_failure", model="m", reason="CANCELED") == 1


def _readable(connections: list[socket.socket], count: int) -> list[socket.socket]:
    """Those with an answer, as soon as there are `count`; they must not have to wait for the engine (0.5 s a row)."""
    end = time.monotonic() + 0.4
    while len(ready := select.select(connections, [], [], 0)[0]) < count and time.monotonic() < end:
        time.sleep(0.01)
    assert len(ready) >= count
    return ready


def test_grpc_message_limit(start: Start, tmp_path: Path) -> None:
    import tritonclient.grpc as tg
    from tritonclient.utils import InferenceServerException

    server = start(classifier(tmp_path / "tiny.onnx"), "--max-request-mib", "1")
    client = tg.InferenceServerClient(server.grpc)
    for shape, algorithm in (((4000, 3, 8, 8), None), ((40_000, 3, 8, 8), "gzip")):
        x = tg.InferInput("input", list(shape), "FP32")
        x.set_data_from_numpy(np.zeros(shape, "f4"))
        with pytest.raises(InferenceServerException, match="RESOURCE_EXHAUSTED"):
            client.infer("tiny", [x], compression_algorithm=algorithm)
    alive(server)


def test_grpc_garbage(server: Server) -> None:
    raw(server, b"\0" * 1000, read=False, port=server.grpc_port)
    raw(server, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + struct.pack(">I", 2**31) * 100, read=False, port=server.grpc_port)
    alive(server)
