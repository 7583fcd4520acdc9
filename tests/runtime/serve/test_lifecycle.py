"""Start, drain, reload, failure: what the process does, and with which exit code."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import tritonclient.grpc as tg
import tritonclient.grpc.aio as tga
from tritonclient.grpc import InferInput
from tritonclient.utils import InferenceServerException

from .conftest import Server, classifier, heavy

Start = Callable[..., Server]


def body_for(shape: tuple[int, ...], name: str = "input") -> tuple[bytes, dict[str, str]]:
    data = np.random.default_rng(0).random(shape, np.float32).tobytes()
    header = json.dumps(
        {"inputs": [{"name": name, "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": len(data)}}]}
    ).encode()
    return header + data, {"Inference-Header-Content-Length": str(len(header))}


async def fire(server: Server, path: str, body: bytes, headers: dict[str, str], count: int, after: float) -> Counter:
    """`count` requests at once; SIGTERM `after` seconds after all of them were sent, however long that took."""
    seen: Counter = Counter()
    connector = aiohttp.TCPConnector(limit=count)
    trace, all_sent, left = aiohttp.TraceConfig(), asyncio.Event(), count

    async def sent(*_: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            all_sent.set()

    trace.on_request_chunk_sent.append(sent)
    timeout = aiohttp.ClientTimeout(60)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, trace_configs=[trace]) as session:

        async def one() -> None:
            try:
                async with session.post(f"http://{server.http}{path}", data=body, headers=headers) as answer:
                    await answer.read()
                    seen[answer.status] += 1
            except Exception as error:
                seen[type(error).__name__] += 1

        tasks = [asyncio.create_task(one()) for _ in range(count)]
        await asyncio.wait_for(all_sent.wait(), 50)
        await asyncio.sleep(after)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*tasks)
    return seen


@pytest.mark.parametrize("flags", [(), ("--instances", "2")], ids=["one", "several"])
@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_sigterm_answers_everything_in_flight_and_exits_0(
    start: Start, tmp_path: Path, count: int, flags: tuple[str, ...]
) -> None:
    server = start(heavy(tmp_path / "m.onnx", size=64, layers=24), "--burst-window", "60", *flags)
    body, headers = body_for((1, 64, 64), "x")
    seen = asyncio.run(fire(server, "/v2/models/m/infer", body, headers, count, 0))
    assert seen == {200: count}
    assert server.stop() == 0, server.log


def test_sigterm_resets_no_connection_of_clients_that_never_pause(start: Start, tmp_path: Path) -> None:
    """Each request has a connection of its own, so that some are always in the kernel's backlog: also at the end."""
    server, answered, failed = start(heavy(tmp_path / "m.onnx", size=64, layers=1)), Counter(), []
    tensor = {"name": "x", "shape": [1, 64, 64], "datatype": "FP32", "data": [0.5] * 4096}
    body = json.dumps({"inputs": [tensor]}).encode()  # as text, which keeps the server busier than the clients

    def ask() -> None:
        while True:
            try:
                answered[server.request("POST", "/v2/models/m/infer", body)[0]] += 1
            except ConnectionRefusedError:
                return
            except OSError as error:
                failed.append(error)
                return

    clients = [threading.Thread(target=ask) for _ in range(16)]
    for client in clients:
        client.start()
    time.sleep(0.2)
    assert server.stop() == 0, server.log
    for client in clients:
        client.join(30)
    assert failed == []
    assert set(answered) <= {200, 503}
    assert answered[200]


def test_sigterm_answers_grpc_requests_in_flight(start: Start, tmp_path: Path) -> None:
    server = start(heavy(tmp_path / "m.onnx", size=160))
    tensor = InferInput("x", [1, 160, 160], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 160, 160), "f4"))

    async def run() -> None:
        async with tga.InferenceServerClient(server.grpc) as client:
            tasks = [asyncio.create_task(client.infer("m", [tensor])) for _ in range(60)]
            await asyncio.sleep(0.1)
            server.process.send_signal(signal.SIGTERM)
            assert len(await asyncio.gather(*tasks)) == 60

    asyncio.run(run())
    assert server.stop() == 0, server.log


def test_not_ready_at_once_while_draining(start: Start, tmp_path: Path) -> None:
    server = start(heavy(tmp_path / "m.onnx"), "--max-batch", "1")
    body, headers = body_for((1, 400, 400), "x")
    threads = [
        threading.Thread(target=server.request, args=("POST", "/v2/models/m/infer", body, headers)) for _ in range(24)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    assert server.request("GET", "/v2/health/live")[0] == 200
    status, headers, _ = server.request("GET", "/v2/health/ready")
    assert status == 503
    assert headers["connection"] == "close"
    for thread in threads:
        thread.join()
    assert server.stop() == 0


def test_clients_that_never_stop_do_not_hold_up_the_end(start: Start, tmp_path: Path) -> None:
    """Keep-alive HTTP and a gRPC channel in closed loops: told to go, they lose nothing but new requests."""
    server = start(classifier(tmp_path / "m.onnx"))
    body, headers = body_for((1, 3, 8, 8))
    seen: Counter = Counter()
    stop = threading.Event()

    def over_http() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=20)
        while not stop.is_set():
            try:
                connection.request("POST", "/v2/models/m/infer", body, headers)
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.RemoteDisconnected):  # a new connection, and nobody listens any more
                return
            seen[answer.status] += 1

    def over_grpc() -> None:
        client = tg.InferenceServerClient(server.grpc)
        tensor = InferInput("input", [1, 3, 8, 8], "FP32")
        tensor.set_data_from_numpy(np.ones((1, 3, 8, 8), "f4"))
        while not stop.is_set():
            try:
                client.infer("m", [tensor])
                seen["grpc"] += 1
            except InferenceServerException as error:
                seen[error.status()] += 1
                return

    threads = [threading.Thread(target=work) for work in (over_http, over_http, over_grpc)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    assert time.monotonic() - began < 6
    stop.set()
    for thread in threads:
        thread.join()
    # gRPC refuses what arrives after its GOAWAY; which of the two codes the client sees is a race inside gRPC.
    assert set(seen) - {"StatusCode.UNAVAILABLE", "StatusCode.CANCELLED"} == {200, "grpc"}


def test_idle_server_stops_quickly(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "m.onnx"))
    began = time.monotonic()
    assert server.stop(signal.SIGINT) == 0
    assert time.monotonic() - began < 3


def test_a_program_serves_by_a_call(tmp_path: Path) -> None:
    options = "http_port=0, grpc=False, metrics=False, as_json=True"
    code = f"import runtime, sys; sys.exit(runtime.serve.serve({str(classifier(tmp_path / 'm.onnx'))!r}, {options}))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout
        events = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.terminate()
    assert [event["event"] for event in events] == ["listening", "ready"]
    assert process.returncode == 0


def test_one_protocol_alone_stops_quietly(start: Start, tmp_path: Path) -> None:
    for flags in (("--no-http", "--no-metrics"), ("--no-grpc", "--no-metrics")):
        server = start(classifier(tmp_path / "m.onnx"), *flags)
        assert server.stop() == 0
        assert "Traceback" not in server.log


def test_drain_timeout_answers_the_rest_503(start: Start, tmp_path: Path) -> None:
    server = start(heavy(tmp_path / "m.onnx", size=500, layers=16), "--drain-timeout", "0.5", "--max-batch", "1")
    body, headers = body_for((1, 500, 500), "x")
    seen = asyncio.run(fire(server, "/v2/models/m/infer", body, headers, 40, 0.3))
    assert set(seen) <= {200, 503}
    assert seen[503] > 0
    assert server.stop() == 0
    assert "not finished within" in server.log


def test_reload_swaps_a_changed_model_and_keeps_the_old_when_the_new_is_bad(start: Start, tmp_path: Path) -> None:
    root = tmp_path / "models"
    classifier(root / "m" / "1" / "model.onnx", seed=1)
    server = start(root)
    body, headers = body_for((1, 3, 8, 8))

    def answer(version: str = "") -> tuple[int, bytes]:
        path = f"/v2/models/m/versions/{version}/infer" if version else "/v2/models/m/infer"
        status, _, content = server.request("POST", path, body, headers)
        return status, content

    def reload_until(text: str) -> None:
        server.process.send_signal(signal.SIGHUP)
        assert server.said(text)

    first = answer()
    classifier(root / "m" / "2" / "model.onnx", seed=2)
    reload_until("m version 2 is in service")
    second = answer()
    assert second[0] == 200
    assert second[1] != first[1]
    assert answer("1") == first
    # A version that does not match its manifest is refused, and the one in service stays.
    artefact = root / "m" / "2" / "model.onnx"
    artefact.write_bytes(artefact.read_bytes()[:-1] + b"\0")
    reload_until("still serving the old one")
    assert server.said("reload ended with errors; models unchanged: m version 1; failed: m version 2")
    assert answer() == second
    # So does one whose file is gone, as long as another of its model fails.
    shutil.rmtree(root / "m" / "1")
    reload_until("m version 1 is gone, still serving it")
    assert answer("1") == first
    # What is gone leaves service once all that is there could be loaded.
    classifier(root / "m" / "2" / "model.onnx", seed=5, batch=1)
    reload_until("m version 1 left service")
    assert answer("1")[0] == 404
    assert server.stop() == 0


def test_what_changes_during_the_first_load_is_in_service_when_that_is_over(start: Start, tmp_path: Path) -> None:
    root = tmp_path / "models"
    for number in range(4):
        classifier(root / f"z{number}.onnx", seed=number)
    server = start(root, wait=False)
    classifier(root / "new.onnx")
    server.process.send_signal(signal.SIGHUP)
    assert server.process.stdout
    assert "new" in json.loads(server.process.stdout.readline())["models"]
    assert "new" in [model["name"] for model in server.json("/v2/models")["models"]]


def test_reloading_under_load_loses_nothing(start: Start, tmp_path: Path) -> None:
    root = tmp_path / "models"
    path = classifier(root / "m.onnx", seed=0)
    server = start(root)
    body, headers = body_for((1, 3, 8, 8))
    seen: Counter = Counter()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            seen[server.request("POST", "/v2/models/m/infer", body, headers)[0]] += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for cycle in range(1, 9):
        classifier(path, seed=cycle)
        server.process.send_signal(signal.SIGHUP)
        assert server.said("is in service", cycle)
    stop.set()
    for thread in threads:
        thread.join()
    assert server.log.count("is in service") == 8
    assert set(seen) == {200}
    assert server.metric("nv_inference_request_success", model="m") == seen[200]


FAILING = """
import sys
from runtime.manifest import TensorSpec
from runtime.runners.base import Runner
from runtime.serve import serve
from runtime.serve.models import version

class Failing(Runner):
    name, device = "failing", "cpu"
    inputs = (TensorSpec("input", "float32", ("b", 4)),)
    outputs = (TensorSpec("y", "float32", ("b", 4)),)
    profiles = ()
    def run(self, feeds):
        if feeds["input"].any():
            raise RuntimeError("the device is lost at /secret/path")
        return {"y": feeds["input"]}
    def bind(self, feeds): return lambda: self.run(feeds)
    def close(self): pass

version.open_runners = lambda source, settings: ([Failing()], None)
sys.exit(serve(sys.argv[1], http_port=0, grpc_port=0, metrics_port=0, as_json=True))
"""


def test_an_engine_failure_is_500_with_an_id_then_the_process_ends(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    process = subprocess.Popen(
        [sys.executable, "-c", FAILING, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    port = json.loads(process.stdout.readline())["http_port"]
    process.stdout.readline()
    server = Server.__new__(Server)
    server.http_port = port
    body, headers = body_for((1, 4))
    status, got, content = server.request("POST", "/v2/models/m/infer", body, {**headers, "X-Request-Id": "lost-1"})
    assert status == 500
    assert got["x-request-id"] == "lost-1"
    assert json.loads(content) == {"error": "the engine failed (request id lost-1)"}
    assert process.wait(20) == 6
    process.communicate()


LOADING = """
import sys, time
from runtime.serve import serve
from runtime.serve.models import version

version.open_runners = lambda source, settings: time.sleep(60)
sys.exit(serve(sys.argv[1], http_port=0, grpc=False, metrics=False, drain_timeout=0.2, as_json=True))
"""


def test_a_load_that_takes_long_is_503_and_does_not_hold_up_the_end(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOADING, str(classifier(tmp_path / "m.onnx"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        server = Server.__new__(Server)
        server.http_port = json.loads(process.stdout.readline())["http_port"]
        assert server.request("GET", "/v2/health/live")[0] == 200
        status, headers, _ = server.request("GET", "/v2/models/m")
        assert (status, headers["retry-after"]) == (503, "1")
        process.terminate()
        began = time.monotonic()
        assert process.wait(20) == 0
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("stdout", ["full", "closed"])
def test_nobody_has_to_read_where_it_listens(stdout: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ports = ["--no-grpc", "--no-metrics", "--http-port", str(port)]
    command = [sys.executable, "-m", "runtime.serve", str(classifier(tmp_path / "m.onnx")), *ports]
    redirect = ">&-" if stdout == "closed" else ">/dev/full"
    with subprocess.Popen(["sh", "-c", f'exec "$@" {redirect}', "sh", *command], stderr=subprocess.PIPE) as process:
        server = Server.__new__(Server)
        server.http_port = port
        while process.poll() is None:
            with contextlib.suppress(OSError):
                if server.request("GET", "/v2/health/ready")[0] == 200:
                    break
            time.sleep(0.05)
        process.terminate()
        assert process.wait(20) == 0
        assert process.stderr
        assert b"Traceback" not in process.stderr.read()


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "runtime.serve", *args], capture_output=True, text=True, timeout=60)


def test_refusals_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = classifier(tmp_path / "good.onnx")
    bare = tmp_path / "bare.onnx"
    shutil.copy(good, bare)
    tampered = classifier(tmp_path / "tampered.onnx")
    tampered.write_bytes(tampered.read_bytes() + b"\0")
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").write_text("abc")
    for arguments, text in (
        ([str(tmp_path / "none.onnx")], "no such file"),
        ([str(bare)], "manifest"),
        ([str(tampered)], "sha256"),
        ([str(tmp_path / "empty")], "holds no"),
        ([str(good), "--model-name", "a/b"], "must match"),
        ([str(good), "--token-file", str(tmp_path / "short")], "at least 16"),
        ([str(good), "--device", "gpu0"], "device 'gpu0' is unknown"),
        ([str(good)], "GMCONV_SERVE_TOKEN: the token must have at least 16"),
    ):
        if arguments == [str(good)]:
            monkeypatch.setenv("GMCONV_SERVE_TOKEN", "")
        done = run(*arguments)
        assert done.returncode == 3, (arguments, done.stderr)
        assert text in done.stderr
        assert "Traceback" not in done.stderr
        assert not done.stdout


def test_half_a_pair_of_tls_files_is_a_usage_error(tmp_path: Path) -> None:
    good = classifier(tmp_path / "good.onnx")
    done = run(str(good), "--tls-cert", str(good))
    assert done.returncode == 2
    assert "go together" in done.stderr


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run(str(classifier(tmp_path / "m.onnx")), "--http-port", str(taken.getsockname()[1]))
    assert done.returncode == 6
    assert "--http-port" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("host", ["256.1.1.1", "192.0.2.1", "::2"])
def test_a_host_that_is_not_this_machine_is_named(host: str, tmp_path: Path) -> None:
    done = run(str(classifier(tmp_path / "m.onnx")), "--host", host, "--http-port", "0")
    assert done.returncode == 6
    assert done.stderr.endswith("choose with --host\n")


def test_no_torch_and_a_quick_help() -> None:
    code = (
        "import sys, runtime.serve.server, runtime.serve.grpc.methods, runtime.runners.onnxruntime, onnxruntime;"
        "sys.exit(any(m.split('.')[0] in ('torch', 'onnx', 'export') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU time: what the wall clock adds on a busy machine says nothing about the command.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
