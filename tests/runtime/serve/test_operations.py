"""What an operator sees: tokens, TLS, metrics, the access log, traces, classification."""

from __future__ import annotations

import http.client
import io
import json
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
import tritonclient.grpc as tg
import tritonclient.http as th
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from gmconv.images import load_image
from runtime.serve.auth import Gate
from runtime.serve.errors import Code
from runtime.serve.http.classify import softmax
from runtime.serve.observe.metrics import gpu_metrics

from .conftest import IMAGE, LABELS, Server, classifier, write_model

Start = Callable[..., Server]
TOKEN = "a-token-of-32-characters-or-more"


def test_bearer_token_on_every_route_but_the_probes_and_the_page(start: Start, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    server = start(classifier(tmp_path / "m.onnx"), "--token-file", str(token))
    good = {"Authorization": f"Bearer {TOKEN}"}
    for path in ("/v2/health/live", "/v2/health/ready", "/", "/page.css", "/page.js"):
        assert server.request("GET", path)[0] == 200
    for path in (
        "/v2",
        "/v2/models",
        "/v2/models/m",
        "/v2/models/m/manifest",
        "/openapi.json",
        "/nothing",
        "/v2/logging",
    ):
        status, headers, body = server.request("GET", path)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert TOKEN not in body.decode()
        for wrong in ("", "Bearer", "Bearer x", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xff\xfe"):
            assert server.request("GET", path, headers={"Authorization": wrong})[0] == 401
        assert server.request("GET", path, headers=good)[0] == (404 if path == "/nothing" else 200)
    for path in ("/v2/models/m/infer", "/v2/models/m/classify", "/v2/models/m/versions/1/infer"):
        assert server.request("POST", path, b"{}")[0] == 401
        assert server.request("POST", path, b"{}", good)[0] == 400
    client = tg.InferenceServerClient(server.grpc)
    assert client.is_server_live()
    assert client.is_server_ready()
    with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
        client.get_model_metadata("m")
    with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
        client.get_model_metadata("m", headers={"authorization": "Bearer wrong"})
    assert client.get_model_metadata("m", headers={"authorization": f"Bearer {TOKEN}"}).name == "m"


def test_token_from_the_environment(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "m.onnx"), env={"GMCONV_SERVE_TOKEN": TOKEN})
    assert server.request("GET", "/v2")[0] == 401
    assert server.request("GET", "/v2", headers={"Authorization": f"bearer {TOKEN}"})[0] == 200


def test_gate() -> None:
    assert Gate(None).allows(None)
    gate = Gate("s3cret")
    assert gate.allows(b"Bearer s3cret")
    for wrong in (None, b"", b"s3cret", b"Bearer s3cre", b"Basic s3cret", b"Bearer \xff"):
        assert not gate.allows(wrong)


def certificate(folder: Path) -> list[str]:
    """A new certificate for this machine; the options that name it."""
    folder.mkdir(exist_ok=True)
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        (
            f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout {key} -out {cert} "
            f"-addext subjectAltName=DNS:localhost,IP:127.0.0.1"
        ).split(),
        check=True,
        capture_output=True,
    )
    return ["--tls-cert", str(cert), "--tls-key", str(key)]


def test_tls_and_what_sighup_renews(start: Start, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    options = certificate(tmp_path / "tls")
    cert = options[1]
    limits = ["--header-timeout", "1", "--token-file", str(token)]
    server = start(classifier(tmp_path / "m.onnx"), *options, *limits)
    assert server.listening["tls"] is True
    stalled = socket.create_connection(("127.0.0.1", server.http_port), 20)  # never begins its handshake

    def status(secret: str) -> int:
        context = ssl.create_default_context(cafile=cert)
        connection = http.client.HTTPSConnection("127.0.0.1", server.http_port, context=context, timeout=20)
        connection.request("GET", "/v2", headers={"Authorization": f"Bearer {secret}"})
        return connection.getresponse().status

    assert status(TOKEN) == 200
    client = tg.InferenceServerClient(f"localhost:{server.grpc_port}", ssl=True, root_certificates=cert)
    assert client.is_model_ready("m", headers={"authorization": f"Bearer {TOKEN}"})
    triton = th.InferenceServerClient(server.http, ssl=True, ssl_options={"ca_certs": cert}, insecure=True)
    assert triton.is_model_ready("m", headers={"authorization": f"Bearer {TOKEN}"})
    old = ssl.get_server_certificate(("127.0.0.1", server.http_port))
    certificate(tmp_path / "tls")
    token.write_text(TOKEN[::-1])
    server.process.send_signal(signal.SIGHUP)
    end = time.monotonic() + 20
    while ssl.get_server_certificate(("127.0.0.1", server.http_port)) == old:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert (status(TOKEN), status(TOKEN[::-1])) == (401, 200)
    assert server.said("reload done; token and certificate read again; models unchanged: m version 1")
    token.write_text("short")
    server.process.send_signal(signal.SIGHUP)
    assert server.said("the token stays as it was")
    assert server.said("reload ended with errors; certificate read again; models unchanged: m version 1")
    assert status(TOKEN[::-1]) == 200
    assert stalled.recv(1) == b""
    assert server.stop() == 0


def test_metrics_under_tritons_names(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "m.onnx"))
    client = th.InferenceServerClient(server.http)
    x = th.InferInput("input", [3, 3, 8, 8], "FP32")
    x.set_data_from_numpy(np.zeros((3, 3, 8, 8), "f4"))
    for _ in range(4):
        client.infer("m", [x])
    server.request("POST", "/v2/models/m/infer", b"{")
    labels = {"model": "m", "version": "1"}
    for name, value in (
        ("nv_inference_request_success", 4),
        ("nv_inference_count", 12),
        ("nv_inference_exec_count", 4),
        ("nv_inference_pending_request_count", 0),
        ("gmconv_inference_batch_size_sum", 12),
        ("gmconv_inference_latency_us_count", 4),
    ):
        assert server.metric(name, **labels) == value
    assert server.metric("nv_inference_request_failure", reason="OTHER", **labels) == 1
    total = server.metric("nv_inference_request_duration_us", **labels)
    assert 0 < server.metric("nv_inference_compute_infer_duration_us", **labels) < total
    status, headers, text = server.request("GET", "/metrics", port=server.metrics_port)
    assert headers["content-type"].startswith("text/plain")
    families = {f.name: f for f in text_string_to_metric_families(text.decode())}
    assert families["gmconv_inference_latency_us"].type == "histogram"
    assert "nv_inference_count_total" not in text.decode()
    assert "# TYPE nv_inference_count counter" in text.decode()
    assert "process_resident_memory_bytes" in families
    assert server.request("GET", "/other", port=server.metrics_port)[0] == 404
    assert status == 200


def test_access_log_and_request_ids(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "m.onnx"))
    status, headers, _ = server.request("GET", "/v2/models/none", headers={"X-Request-Id": "abc-1"})
    assert headers["x-request-id"] == "abc-1"
    server.request("GET", "/v2/models/" + 9000 * "x")
    bad = server.request("GET", "/v2", headers={"X-Request-Id": "a b"})[1]["x-request-id"]
    assert bad != "a b"
    client = tg.InferenceServerClient(server.grpc)
    x = tg.InferInput("input", [2, 3, 8, 8], "FP32")
    x.set_data_from_numpy(np.zeros((2, 3, 8, 8), "f4"))
    client.infer("m", [x], headers={"x-request-id": "from-grpc"})
    server.request("POST", "/v2/logging", b'{"log_info": false}')
    server.request("GET", "/v2", headers={"X-Request-Id": "unlogged"})
    server.stop()
    lines = {e["request_id"]: e for e in map(json.loads, server.errors) if "request_id" in e}
    assert lines["abc-1"]["status"] == status == 404
    assert lines["abc-1"]["path"] == "/v2/models/none"
    assert lines["abc-1"]["total_us"] > 0
    assert lines["from-grpc"]["rows"] == 2
    assert lines["from-grpc"]["queue_us"] >= 0
    assert "unlogged" not in lines
    assert max(map(len, server.errors)) < 1200


def test_a_reader_that_stops_reading_the_log_does_not_stop_the_server(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    text = b"GET nonsense\r\n\r\n"  # logged as a warning, not in the access log
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime.serve", str(path), *ports], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout
        server = Server.__new__(Server)
        server.http_port = json.loads(process.stdout.readline())["http_port"]
        process.stdout.readline()
        connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=10)
        for _ in range(1500):  # some 250 kB of lines into a pipe of 64 kB
            connection.request("GET", "/v2/health/live", headers={"X-Request-Id": "x" * 100})
            assert connection.getresponse().read() == b'{"live":true}'
        connection.close()
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", server.http_port), 10) as bad:
                bad.sendall(text)
                assert bad.recv(100).startswith(b"HTTP/1.1 400")
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def test_opentelemetry_spans_continue_the_callers_trace(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk")
    server = start(classifier(tmp_path / "m.onnx"), "--otel", "console")
    trace = "0af7651916cd43dd8448eb211c80319c"
    server.request("GET", "/v2/models/m", headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
    process = server.process
    process.terminate()
    assert process.stdout
    text = process.stdout.read()
    assert process.wait(20) == 0
    assert f'"trace_id": "0x{trace}"' in text
    assert '"name": "GET /v2/models/m"' in text


def encode(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(4).integers(0, 256, (37, 53, 3), np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("path", ["/v2/models/tiny", "/v2/models/tiny/versions/1"])
def test_classify_is_bitwise_the_evaluation_pipeline(
    server: Server, models: Path, photo: Image.Image, kind: str, path: str
) -> None:
    data = encode(photo, kind)
    status, _, body = server.request("POST", f"{path}/classify?k=4", data)
    assert status == 200, body
    answer = json.loads(body)
    version = "1" if "versions" in path else "2"
    session = ort.InferenceSession(models / "tiny" / version / "model.onnx", providers=["CPUExecutionProvider"])
    logits = session.run(None, {"input": load_image(data, IMAGE)[None]})[0][0]
    scores = {c["index"]: c["score"] for c in answer["classes"]}
    assert [np.float32(scores[i]) for i in range(4)] == list(logits)
    assert [c["label"] for c in answer["classes"]] == [LABELS[i] for i in np.argsort(-logits)]
    assert sum(c["probability"] for c in answer["classes"]) == pytest.approx(1)
    times = answer["times_ms"]
    assert times["decode"] + times["queue"] + times["compute"] <= times["total"]


def test_classify_refusals(server: Server, photo: Image.Image) -> None:
    good = encode(photo, "PNG")
    huge = good[:16] + (60_000).to_bytes(4, "big") * 2 + good[24:]
    for path, body, status in (
        ("/v2/models/tiny/classify", b"", 400),
        ("/v2/models/tiny/classify", b"not an image", 400),
        ("/v2/models/tiny/classify", good[: len(good) // 2], 400),
        ("/v2/models/tiny/classify", huge, 400),
        ("/v2/models/tiny/classify", b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400),
        ("/v2/models/tiny/classify?k=0", good, 400),
        ("/v2/models/tiny/classify?k=x", good, 400),
        ("/v2/models/tiny/classify", b"\0" * ((16 << 20) + 1), 413),
        ("/v2/models/add/classify", good, 400),
        ("/v2/models/nobody/classify", good, 404),
    ):
        got, _, answer = server.request("POST", path, body)
        assert got == status, (path, answer)
        assert set(json.loads(answer)) == {"error"}
        assert str(Path.cwd()) not in answer.decode()
        assert "Traceback" not in answer.decode()
    assert server.request("POST", "/v2/models/tiny/classify", good)[0] == 200


def test_only_one_image_and_an_output_of_classes_are_classified(
    start: Start, tmp_path: Path, photo: Image.Image
) -> None:
    flat = [helper.make_node("Flatten", ["input"], ["flat"])]
    for name, batch, sides, nodes in (
        ("mask", "batch", [3, 8, 8], [helper.make_node("Relu", ["input"], ["out"])]),
        ("one", "batch", [1], [*flat, helper.make_node("MatMul", ["flat", "ones"], ["out"])]),
        ("four", 4, [192], [*flat, helper.make_node("Relu", ["flat"], ["out"])]),
    ):
        write_model(
            tmp_path / f"{name}.onnx",
            nodes,
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 8, 8])],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, *sides])],
            [numpy_helper.from_array(np.ones((192, 1), "f4"), "ones")] if name == "one" else (),
            preprocessing=IMAGE,
        )
    server = start(tmp_path)
    listed = {m["name"]: m["takes_no_images"] for m in json.loads(server.request("GET", "/v2/models")[2])["models"]}
    for name, why in (
        ("mask", "gives no class scores (its first output, 'out', is [-1, 3, 8, 8])"),
        ("one", "gives no class scores (its first output, 'out', is [-1, 1])"),
        ("four", "does not take one image at a time (unexpected shape for input 'input': [1, 3, 8, 8], expected [4, "),
    ):
        status, _, answer = server.request("POST", f"/v2/models/{name}/classify", encode(photo, "PNG"))
        error = json.loads(answer)["error"]
        assert status == 400
        assert error.startswith(f"model '{name}' {why}")
        assert error.endswith(f": send tensors to v2/models/{name}/versions/1/infer")
        assert listed[name] == {"1": error}  # what the page shows


def test_what_a_client_did_wrong_does_not_count_as_rejected() -> None:
    rejected = {code.name for code in Code if code.reason == "REJECTED"}
    assert rejected == {"OVERLOADED", "UNAVAILABLE", "EXPIRED"}


def test_an_image_whose_sender_is_gone_is_not_decoded(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "m.onnx"))
    file = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(file, "PNG")  # a quarter of a second to decode, 50 kB
    body = file.getvalue()
    head = f"POST /v2/models/m/classify HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    connections = [socket.create_connection(("127.0.0.1", server.http_port), 10) for _ in range(12)]
    for connection in connections:
        connection.sendall(head + body)
    for connection in connections:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    Image.new("RGB", (8, 8)).save(small := io.BytesIO(), "PNG")
    assert server.request("POST", "/v2/models/m/classify", small.getvalue())[0] == 200
    server.stop()
    entries = [json.loads(line) for line in server.errors if line.startswith("{")]
    assert sum(e["status"] == 499 for e in entries) >= 8  # all but those that were decoded while the others were sent


def test_softmax_of_odd_scores() -> None:
    np.testing.assert_allclose(softmax(np.array([1e308, 0.0])), [1, 0])
    assert softmax(np.array([np.nan, np.nan])).tolist() == [0, 0]
    assert softmax(np.array([np.inf, 1.0])).tolist() == [1, 0]
    np.testing.assert_allclose(softmax(np.zeros(4)), 0.25)


def test_readiness_waits_for_the_models(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "m.onnx"), wait=False)
    statuses = set()
    end = time.monotonic() + 20
    while 200 not in statuses and time.monotonic() < end:
        statuses.add(server.request("GET", "/v2/health/ready")[0])
    assert statuses <= {200, 503}
    assert server.request("GET", "/v2/models/m")[0] == 200


def test_gpu_metrics_where_nvml_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def lost(handle: int) -> None:
        raise NVMLError

    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}" if handle == 0 else lost(handle),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=100, used=25),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=50),
        nvmlDeviceGetPowerUsage=lambda handle: 70_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    samples = {s.name: (s.labels, s.value) for family in gpu_metrics() for s in family.samples}
    assert samples == {
        "nv_gpu_utilization": ({"gpu_uuid": "GPU-0"}, 0.5),
        "nv_gpu_memory_total_bytes": ({"gpu_uuid": "GPU-0"}, 100),
        "nv_gpu_memory_used_bytes": ({"gpu_uuid": "GPU-0"}, 25),
        "nv_gpu_power_usage": ({"gpu_uuid": "GPU-0"}, 70),
    }
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert list(gpu_metrics()) == []
