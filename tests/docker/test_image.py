"""The cpu image, built and run for real: small, without a compiler or torch, hardened, and it serves and drains."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gmconv

pytestmark = pytest.mark.docker

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 1_000_000
LARGEST = 420 * MEGABYTE
COMPILERS = ("gcc", "cc", "g++", "c++", "clang", "ld", "as", "nvcc", "make", "rustc", "go")


@dataclass(frozen=True)
class Running:
    """A served model: its container, ports, input and the answer of ONNX Runtime in this process."""

    container: Any
    http: int
    grpc: int
    metrics: int
    batch: np.ndarray
    expected: np.ndarray


@pytest.fixture(scope="module")
def model_dir(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it would be mounted at /models, readable by the image's user."""
    folder = tmp_path_factory.mktemp("models")
    folder.chmod(0o755)
    for parent in list(folder.parents)[:2]:
        parent.chmod(0o755)
    for file in (exported, exported.with_name(exported.name + ".json")):
        (folder / file.name).write_bytes(file.read_bytes())
        (folder / file.name).chmod(0o644)
    return folder


@pytest.fixture(scope="module")
def reference(exported: Path) -> tuple[np.ndarray, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    shape = [d if isinstance(d, int) else 3 for d in session.get_inputs()[0].shape]
    batch = np.random.default_rng(0).random(shape, dtype=np.float32)
    return batch, session.run(None, {"input": batch})[0]


def serving(
    engine: Any, image: str, model_dir: Path, ports: list[int], reference: Any, *more: str
) -> Iterator[Running]:
    http, grpc, metrics = ports
    arguments = ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics, "/models", *more]
    options = [
        "-v", f"{model_dir}:/models:ro", "-e", f"GMCONV_HEALTH_URL=http://127.0.0.1:{http}/v2/health/ready",
    ]  # fmt: skip
    with engine.run(image, *map(str, arguments), options=options) as container:
        container.wait_ready(http)
        yield Running(container, http, grpc, metrics, *reference)


@pytest.fixture(scope="module")
def running(
    engine: Any, cpu_image: str, model_dir: Path, free_ports: Callable[[int], list[int]], reference: Any
) -> Iterator[Running]:
    yield from serving(engine, cpu_image, model_dir, free_ports(3), reference)


def test_the_image_is_at_most_420_mb(engine: Any, cpu_image: str) -> None:
    size = engine.inspect(cpu_image)["Size"]
    print(f"cpu image: {size / MEGABYTE:.0f} MB")
    assert size <= LARGEST


def test_no_compiler_no_torch_no_pip(engine: Any, cpu_image: str) -> None:
    names = " ".join(COMPILERS)
    found = engine.command(cpu_image, "sh", "-c", f"for c in {names} pip pip3; do command -v $c; done; true")
    assert found == ""
    modules = engine.command(
        cpu_image, "python", "-c",
        "import importlib.util as u; print([m for m in ('torch', 'pip', 'onnxruntime') if u.find_spec(m)])",
    )  # fmt: skip
    assert modules == "['onnxruntime']"


def test_no_layer_holds_the_build_secrets(engine: Any, cpu_image: str) -> None:
    assert engine.command(cpu_image, "sh", "-c", "ls /run/secrets /etc/pip.conf 2>/dev/null | head -1; true") == ""


def test_what_the_image_says_of_itself(engine: Any, cpu_image: str) -> None:
    found = engine.inspect(cpu_image)
    config = found["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"][0] == "/opt/venv/bin/python"
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert "ORT_DISABLE_TELEMETRY=1" in config["Env"]
    assert not [variable for variable in config["Env"] if variable.startswith(("NVIDIA_", "CUDA_"))]
    assert "/var/cache/gmconv" in config["Volumes"]
    health = found.get("Healthcheck") or config["Healthcheck"]  # podman lists it beside Config, docker inside
    assert health["Test"] == ["CMD", "/opt/venv/bin/python", "-I", "/opt/healthcheck.py"]
    assert set(config["ExposedPorts"]) == {"8000/tcp", "8001/tcp", "8002/tcp"}


def test_the_sbom_lists_exactly_what_is_locked(engine: Any, cpu_image: str) -> None:
    bom = json.loads(engine.command(cpu_image, "cat", "/opt/venv/sbom.cdx.json"))
    assert bom["bomFormat"] == "CycloneDX"
    assert bom["metadata"]["component"]["name"] == "gmconv-deploy"
    found = {(c["name"].lower().replace("_", "-"), c["version"]) for c in bom["components"]}
    lock = ROOT / "docker" / "requirements-cpu.txt"
    pins = [
        line.split(" ")[0].split("==") for line in lock.read_text().splitlines() if "==" in line and line[0].isalnum()
    ]
    assert found - {("gmconv-deploy", gmconv.__version__)} == {(name, version) for name, version in pins}


def test_it_runs_as_10001_on_a_read_only_root_without_capabilities(running: Running) -> None:
    assert running.container.exec("id", "-u") == "10001"
    status = running.container.exec("cat", "/proc/1/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    for place in ("/x", "/opt/venv/x", "/models/x"):
        assert "cannot touch" in running.container.exec("sh", "-c", f"touch {place} 2>&1; true")
    running.container.exec("touch", "/var/cache/gmconv/x")


def test_the_health_check_passes_and_fails_where_nothing_listens(engine: Any, running: Running) -> None:
    engine.podman("healthcheck", "run", running.container.name)
    url = "GMCONV_HEALTH_URL=http://127.0.0.1:9/v2/health/ready"
    result = running.container.exec("sh", "-c", f"{url} python -I /opt/healthcheck.py >/dev/null 2>&1; echo $?")
    assert result == "1"


def test_http_and_grpc_answer_what_onnx_runtime_computes(running: Running) -> None:
    import tritonclient.grpc as grpc_client
    import tritonclient.http as http_client

    for module, port in ((http_client, running.http), (grpc_client, running.grpc)):
        with module.InferenceServerClient(f"127.0.0.1:{port}") as client:
            assert client.is_server_ready()
            tensor = module.InferInput("input", running.batch.shape, "FP32")
            tensor.set_data_from_numpy(running.batch)
            answer = client.infer("resnet20", [tensor]).as_numpy("logits")
            np.testing.assert_allclose(answer, running.expected, rtol=1e-5, atol=1e-5)


def test_prometheus_finds_tritons_metrics(running: Running) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{running.metrics}/metrics", timeout=5) as response:
        text = response.read().decode()
    for name in (
        "nv_inference_request_success",
        "nv_inference_queue_duration_us",
        "nv_inference_pending_request_count",
    ):
        assert name in text


def test_sigterm_finishes_what_was_sent_and_exits_0(
    engine: Any, cpu_image: str, model_dir: Path, free_ports: Callable[[int], list[int]], reference: Any
) -> None:
    """64 requests of 32 rows are in flight when SIGTERM reaches PID 1: none is lost, none is wrong, exit 0."""
    import aiohttp
    import tritonclient.http as http_client

    flight = serving(engine, cpu_image, model_dir, free_ports(3), reference)
    running = next(flight)
    rows = np.repeat(running.batch[:1], 32, axis=0)
    tensor = http_client.InferInput("input", rows.shape, "FP32")
    tensor.set_data_from_numpy(rows)
    output = http_client.InferRequestedOutput("logits", binary_data=False)
    body, length = http_client.InferenceServerClient.generate_request_body([tensor], outputs=[output])
    headers = {"Inference-Header-Content-Length": str(length)}
    url = f"http://127.0.0.1:{running.http}/v2/models/resnet20/infer"
    pid = running.container.state()["Pid"]
    late = []

    async def one(session: aiohttp.ClientSession, told: asyncio.Event) -> tuple[int, Any]:
        async with session.post(url, data=body, headers=headers) as response:
            answer = await response.json(content_type=None)
            if response.status == 200:
                late.append(told.is_set())
                told.set()
            return response.status, answer

    async def load() -> list[tuple[int, Any]]:
        told = asyncio.Event()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(120)) as session:
            tasks = [asyncio.create_task(one(session, told)) for _ in range(64)]
            await told.wait()
            os.kill(pid, signal.SIGTERM)
            return await asyncio.gather(*tasks)  # a reset connection raises here

    answers = asyncio.run(load())
    statuses = [status for status, _ in answers]
    # 503 is admission control's answer to what arrives under overload; what was let in must be answered.
    assert set(statuses) <= {200, 503}, [answer for status, answer in answers if status not in (200, 503)][:1]
    assert statuses.count(200) >= 32
    assert sum(late) >= 16, "the requests were over before SIGTERM came: the test proved nothing"
    for status, answer in answers:
        if status == 200:
            data = np.reshape(answer["outputs"][0]["data"], (32, -1))
            np.testing.assert_allclose(data, np.repeat(running.expected[:1], 32, axis=0), rtol=1e-4, atol=1e-4)
    end = time.monotonic() + 40
    while running.container.state()["Running"] and time.monotonic() < end:
        time.sleep(0.1)
    assert running.container.state()["ExitCode"] == 0, running.container.logs()[-2000:]
    flight.close()


def test_a_refused_model_ends_the_container_with_3_and_one_sentence(
    engine: Any, cpu_image: str, tmp_path: Path
) -> None:
    with engine.run(cpu_image, "/models/none.onnx") as container:
        end = time.monotonic() + 30
        while container.state()["Running"] and time.monotonic() < end:
            time.sleep(0.1)
        assert container.state()["ExitCode"] == 3
        assert "none.onnx" in container.logs()
        assert "Traceback" not in container.logs()


def test_python_code_beside_the_models_is_not_run(engine: Any, cpu_image: str, tmp_path: Path) -> None:
    """The working directory is the model volume: what lies there must not stand in for the server's own modules."""
    folder = tmp_path / "models"
    (folder / "runtime").mkdir(parents=True)
    for parent in [folder, *list(folder.parents)[:3]]:
        parent.chmod(0o755)
    for name in ("runtime/__init__.py", "click.py", "json.py"):
        (folder / name).write_text("raise SystemExit(99)\n")
    with engine.run(cpu_image, "/models/none.onnx", options=["-v", f"{folder}:/models:ro"]) as container:
        end = time.monotonic() + 30
        while container.state()["Running"] and time.monotonic() < end:
            time.sleep(0.1)
        assert container.state()["ExitCode"] == 3, container.logs()[-2000:]


def test_the_same_command_stops_at_once_when_told_before_ready(
    engine: Any, cpu_image: str, model_dir: Path, free_ports: Callable[[int], list[int]]
) -> None:
    """`podman stop` must not fall back on SIGKILL (137), however early it comes."""
    ports = [str(p) for p in free_ports(3)]
    arguments = ["--http-port", ports[0], "--grpc-port", ports[1], "--metrics-port", ports[2], "/models"]
    with engine.run(cpu_image, *arguments, options=["-v", f"{model_dir}:/models:ro"]) as container:
        time.sleep(0.5)
        began = time.monotonic()
        subprocess.run(
            ["podman", *engine.store, "--runtime", "runc", "stop", "-t", "15", container.name],
            capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert time.monotonic() - began < 10
        assert container.state()["ExitCode"] in (0, 130)
