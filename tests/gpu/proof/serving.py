"""Step f: the server on the card, from the first start of an image to its end."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gmconv.errors import UnavailableError
from runtime import trt
from runtime.runners import open_runner
from tests.gpu.proof import artefacts
from tests.gpu.proof.rows import NotRunError, Recorder, require
from tests.gpu.proof.steps import Context

MODEL = "digits"


class Server:
    """`python -m runtime.serve` on free ports. A context manager that leaves no process behind."""

    def __init__(self, source: Path, kind: str, cache: Path, flags: tuple[str, ...] = ()) -> None:
        ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--json", "--no-access-log"]
        command = [
            sys.executable,
            "-m",
            "runtime.serve",
            str(source),
            "--model-name",
            MODEL,
            *ports,
            *flags,
        ]
        environment = {**os.environ, "GMCONV_ENGINE": kind, "GMCONV_ENGINE_CACHE": str(cache)}
        self._began = time.monotonic()
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self._events: queue.Queue[str] = queue.Queue()
        self.errors: list[str] = []
        for pipe, take in ((self.process.stdout, self._events.put), (self.process.stderr, self.errors.append)):
            threading.Thread(target=self._drain, args=(pipe, take), daemon=True).start()

    @staticmethod
    def _drain(pipe: Any, take: Any) -> None:
        for line in pipe:
            take(line)

    def start(self, seconds: float) -> float:
        """Wait until it is ready; the seconds that took.

        Raises AssertionError with its last words, NotRunError where the machine lacks what it needs.
        """
        for event in ("listening", "ready"):
            found: dict[str, Any] = {}
            while found.get("event") != event:
                found = self._next(seconds)
            if event == "listening":
                self.http, self.grpc, self.metrics = (found[f"{kind}_port"] for kind in ("http", "grpc", "metrics"))
        return time.monotonic() - self._began

    def _next(self, seconds: float) -> dict[str, Any]:
        end = self._began + seconds
        while time.monotonic() < end:
            try:
                line = self._events.get(timeout=0.2)
            except queue.Empty:
                if self.process.poll() == UnavailableError.exit_code:  # an engine called invalid on this card, say
                    raise NotRunError(self.words) from None
                require(self.process.poll() is None, f"it ended with {self.process.returncode}: {self.words}")
                continue
            with contextlib.suppress(json.JSONDecodeError):
                document: dict[str, Any] = json.loads(line)
                return document
        raise AssertionError(f"not ready after {seconds:.0f} s: {self.words}")

    @property
    def words(self) -> str:
        """The end of its standard error, in one line."""
        return " ".join("".join(self.errors).split())[-300:]

    def get(self, port: int, path: str) -> tuple[int, bytes]:
        """Status and body."""
        return self._request(port, "GET", path)[:2]

    def infer(self, images: NDArray[np.float32]) -> tuple[int, NDArray[np.float32]]:
        """Status and logits, in the protocol's binary form."""
        name = "input"
        raw = images.tobytes()
        tensor = {"name": name, "shape": images.shape, "datatype": "FP32", "parameters": {"binary_data_size": len(raw)}}
        outputs = [{"name": "logits", "parameters": {"binary_data": True}}]
        header = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
        length = {"Inference-Header-Content-Length": str(len(header))}
        status, body, told = self._request(self.http, "POST", f"/v2/models/{MODEL}/infer", header + raw, length)
        if status != 200:
            return status, np.empty(0, np.float32)
        end = int(told["Inference-Header-Content-Length"])
        logits = json.loads(body[:end])["outputs"][0]
        return status, np.frombuffer(body[end:], np.float32).reshape(logits["shape"])

    def _request(
        self, port: int, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers
        finally:
            connection.close()

    def stop(self, seconds: float = 40) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(10)


def run(context: Context, recorder: Recorder) -> None:
    """First start twice, then everything else on the second server."""
    kind = "cpu" if context.rehearse else "rtx" if trt.installed("rtx") else "tensorrt"
    if kind == "tensorrt" and not trt.installed("tensorrt"):
        recorder.add("first start", "missing", "no TensorRT is installed")
        return
    source = artefacts.onnx_file(context)
    about = {} if kind == "cpu" else {"flavor": kind, "precision": "fp32"}
    start = functools.partial(
        Server, kind=kind, cache=context.work / "engine-cache", flags=("--threads", "1") if context.rehearse else ()
    )
    served, cold = source, 0.0
    with recorder.check("first start: builds, compares, serves", **about) as figures:
        recorder.need(10)
        with start(source) as server:
            cold = server.start(recorder.left)
            figures["detail"] = f"ready after {cold:.1f} s"
            answers(server, source)
            require(server.stop() == 0, f"SIGTERM: {server.words}")
    if not cold and not context.rehearse:  # no engine of its own: the rest is proven on one that opens here
        with recorder.check("an engine to serve as it is", **about) as figures:
            served, figures["detail"] = artefacts.engine(context, kind, "fp32")  # type: ignore[arg-type]
    if cold or served != source:
        second(start, served, source, context, recorder, cold)


def second(
    start: Callable[[Path], Server], served: Path, source: Path, context: Context, recorder: Recorder, cold: float
) -> None:
    """The second server and its checks; `cold` is what the first took, 0 if it did not start."""
    with start(served) as server:
        with recorder.check("second start: from the cache") as figures:
            recorder.need(5)
            warm = server.start(recorder.left)
            figures["detail"] = f"ready after {warm:.1f} s"
            slow = cold and not context.rehearse and warm >= cold
            require(not slow, f"{warm:.1f} s, the first took {cold:.1f} s")
        checks = {
            "every batch the batcher makes, against ONNX Runtime on the CPU": lambda: answers(server, source),
            "tritonclient, REST and gRPC": lambda: clients(server, source),
            "SIGHUP under load": lambda: under_load(server, source, context, stop=False),
            "a full card: refused or answered, and well again": lambda: full_card(server, source, context),
            "metrics": lambda: metrics(server),
            "SIGTERM under load": lambda: under_load(server, source, context, stop=True),
        }
        for what, check in checks.items():
            with recorder.check(f"serving: {what}") as figures:
                recorder.need(4)
                figures["detail"] = check()


def shape_of(source: Path) -> tuple[int, ...]:
    """(C, H, W) of the served network."""
    from runtime.manifest import read_manifest

    return tuple(int(size) for size in read_manifest(source).inputs[0].shape[1:])


def images(shape: tuple[int, ...], batch: int) -> NDArray[np.float32]:
    """Noise."""
    return np.random.default_rng(batch).standard_normal((batch, *shape), dtype=np.float32)


def answers(server: Server, source: Path) -> str:
    """Each batch from 1 to 32 that a batcher may pad to, and some between."""
    worst = 0.0
    with open_runner(source) as exact:
        for batch in (1, 2, 3, 4, 8, 13, 16, 32):
            feeds = images(shape_of(source), batch)
            expected = exact.run({exact.inputs[0].name: feeds})["logits"]
            status, found = server.infer(feeds)
            require(status == 200, f"batch {batch}: status {status}; {server.words}")
            error = float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))
            worst = max(worst, error)
            require(error <= 2e-5, f"batch {batch}: RMS {error:.1e}")
    return f"RMS {worst:.1e}"


def clients(server: Server, source: Path) -> str:
    """NVIDIA's own clients."""
    feeds = images(shape_of(source), 2)
    _, expected = server.infer(feeds)
    said = []
    for kind, port in (("http", server.http), ("grpc", server.grpc)):
        try:
            client_module: Any = __import__(f"tritonclient.{kind}", fromlist=["x"])
        except ImportError as error:
            said.append(f"{kind}: missing ({error})")
            continue
        client = client_module.InferenceServerClient(f"127.0.0.1:{port}")
        tensor = client_module.InferInput("input", list(feeds.shape), "FP32")
        tensor.set_data_from_numpy(feeds)
        found = client.infer(MODEL, [tensor]).as_numpy("logits")
        client.close()
        require(np.allclose(found, expected, rtol=1e-4, atol=1e-5), f"{kind}: other logits")
        said.append(f"{kind}: ok")
    if all("missing" in text for text in said):
        raise ImportError("; ".join(said))
    return "; ".join(said)


def under_load(server: Server, source: Path, context: Context, *, stop: bool) -> str:
    """Four clients without pause; meanwhile SIGHUP five times, or SIGTERM once. Nothing accepted may be lost."""
    seen: Counter[str] = Counter()
    lock, over = threading.Lock(), threading.Event()
    shape = shape_of(source)

    def client(number: int) -> None:
        feeds = images(shape, 1 + number)
        while not over.is_set():
            try:
                word = str(server.infer(feeds)[0])
            except ConnectionRefusedError:
                word = "refused"
            except OSError as error:
                word = type(error).__name__
            with lock:
                seen[word] += 1
            if word not in ("200", "503"):
                return

    running = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in running:
        thread.start()
    code = None
    try:
        time.sleep(0.3)
        if stop:
            code = server.stop()
        for _ in range(0 if stop else 2 if context.rehearse else 5):
            server.process.send_signal(signal.SIGHUP)
            time.sleep(0.3)
    finally:
        over.set()
        for thread in running:
            thread.join(40)
    said = ", ".join(f"{count} x {word}" for word, count in sorted(seen.items()))
    require(seen["200"] > 0, f"no request was answered: {said}")
    allowed = {"200", "503"} | (
        {"refused", "ConnectionResetError", "RemoteDisconnected", "BadStatusLine"} if stop else set()
    )
    require(set(seen) <= allowed, f"{said}; {server.words}")
    require(code in (None, 0), f"exit {code}; {said}; {server.words}")
    return said


def full_card(server: Server, source: Path, context: Context) -> str:
    """Take the card's memory away from a running server, ask for its largest batch, give the memory back, ask again."""
    feeds = images(shape_of(source), 32)
    with nothing_free(context):
        statuses = [server.infer(feeds)[0] for _ in range(3)]
    require(set(statuses) <= {200, 429, 503}, f"with a full card: {statuses}; {server.words}")
    require(server.process.poll() is None, f"the server ended: {server.words}")
    status, _ = server.infer(feeds)
    require(status == 200, f"with room again: {status}; {server.words}")
    return f"with a full card: {', '.join(map(str, statuses))}"


@contextlib.contextmanager
def nothing_free(context: Context) -> Iterator[None]:
    """Hold all of the card's memory but a few MiB, in plain allocations; nothing in a rehearsal."""
    if context.rehearse:
        yield
        return
    from runtime import cuda

    device = cuda.open_device(0)
    held = []
    with device.current():
        size = 2**33
        while size >= 2**21:
            try:
                held.append(device.allocate(size))
            except cuda.DeviceMemoryError:
                size //= 2
    try:
        if not held:
            raise NotRunError("no memory could be taken")
        yield
    finally:
        with device.current():
            for memory in held:
                memory.free()


def metrics(server: Server) -> str:
    """The Prometheus page answers, with what it says of the GPU."""
    status, body = server.get(server.metrics, "/metrics")
    require(status == 200, f"status {status}")
    names = sorted({line.split("{")[0].split(" ")[0] for line in body.decode().splitlines() if line[:1].isalpha()})
    gpu = [name for name in names if "gpu" in name]
    return f"{len(names)} metrics; of the GPU: {', '.join(gpu) or 'none'}"
