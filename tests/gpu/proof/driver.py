"""Step a: what the project asks of CUDA, with each driver package; then an engine's whole path on a kernel of ours.

Needs no TensorRT: this is what a run proves first.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import cuda
from runtime.benchmark.measure import Artefact, Prepared, measure
from runtime.benchmark.options import Options
from runtime.benchmark.timing import LoopOptions
from runtime.manifest import Manifest, TensorSpec, digest, sidecar
from runtime.records import Build, Device
from runtime.runners.tensorrt import TensorRTRunner
from tests.gpu.proof import standin_engine
from tests.gpu.proof.engine_checks import check_engine
from tests.gpu.proof.rows import Recorder, require
from tests.gpu.proof.steps import Context

INPUTS = (TensorSpec("input", "float32", ("batch", 3, 16, 16)),)
OUTPUTS = (TensorSpec("logits", "float32", ("batch", 3, 16, 16)),)
PROFILES = [(1, 8, 32)]
MIB = 2**20


def run(context: Context, recorder: Recorder) -> None:
    """The primitives once for each driver package, the engine's path with the default one."""
    with contextlib.ExitStack() as stack:
        if context.rehearse:
            from tests.gpu.proof.rehearsal import driver_double

            stack.enter_context(driver_double(context.work))
        for name in ("cuda-bindings", "pycuda"):
            primitives(name, context, recorder)
        whole_path(context, recorder)


def primitives(name: str, context: Context, recorder: Recorder) -> None:
    """Copies, events, graphs, threads, memory of one driver package."""
    opened: list[cuda.Device] = []
    with recorder.check(f"{name}: a device opens") as figures:
        opened.append(cuda.open_device(0, name))  # type: ignore[arg-type]
        figures["detail"] = opened[0].info.name
    if not opened:
        return
    device = opened[0]
    with device.current():
        kernel = None
        with recorder.check(f"{name}: a kernel compiled and loaded"):
            kernel = make_kernel(device, context)
        checks: dict[str, Callable[[], str]] = {
            "16 MiB up and down, page-locked": lambda: copies(device, MIB if context.rehearse else 16 * MIB),
            "two threads, each with its stream": lambda: threads(device),
            "what does not fit is refused, what fits goes on": lambda: too_much(device),
            "everything is given back": lambda: given_back(device),
            "an error while recording leaves the stream usable": lambda: broken_capture(device),
        }
        if kernel is not None:
            checks["a graph of copies and a kernel, replayed with new inputs"] = lambda: graph(device, kernel)
            checks["another thread uses the legacy stream during a capture"] = lambda: legacy(device, kernel)
        for what, check in checks.items():
            with recorder.check(f"{name}: {what}") as figures:
                recorder.need(1)
                figures["detail"] = check()


def make_kernel(device: cuda.Device, context: Context) -> standin_engine.CompiledKernel:
    """The stand-in's kernel in the current context; in a rehearsal, the double of the driver knows it."""
    return standin_engine.CompiledKernel(device.info.compute_capability, b"\x7fELF" if context.rehearse else None)


class Pair:
    """A stream with one input and one output of `count` floats, on both sides. A context manager."""

    def __init__(self, device: cuda.Device, count: int) -> None:
        size = 4 * count
        self.device, self.size, self.shape = device, size, (count,)
        self.stream = device.stream()
        self.locked = [device.page_locked(size) for _ in range(2)]
        self.memory = [device.allocate(size) for _ in range(2)]

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for thing in (*self.memory, *self.locked):
            thing.free()
        self.stream.close()

    @property
    def given(self) -> NDArray[np.float32]:
        """The page-locked input."""
        return self.locked[0].array.view(np.float32)

    @property
    def found(self) -> NDArray[np.float32]:
        """The page-locked output."""
        return self.locked[1].array.view(np.float32)

    def up(self) -> None:
        """Enqueue the upload."""
        self.device.upload(self.memory[0], self.locked[0], self.size, self.stream)

    def down(self, source: int = 1) -> None:
        """Enqueue the download of the output, or of the input."""
        self.device.download(self.locked[1], self.memory[source], self.size, self.stream)

    def compute(self, kernel: standin_engine.CompiledKernel) -> None:
        """Enqueue the kernel."""
        addresses = {"input": self.memory[0].address, "logits": self.memory[1].address}
        kernel(self.stream.handle, addresses, {"input": self.shape, "logits": self.shape})


def copies(device: cuda.Device, size: int) -> str:
    """Random bytes up and down, with the rate by events."""
    with Pair(device, size // 4) as pair:
        pair.locked[0].array[:] = np.random.default_rng(0).integers(0, 256, size, np.uint8)
        events = [device.event() for _ in range(3)]
        for _ in range(2):  # the first maps the memory
            events[0].record(pair.stream)
            pair.up()
            events[1].record(pair.stream)
            pair.down(source=0)
            events[2].record(pair.stream)
            events[2].synchronize()
        require(np.array_equal(pair.locked[0].array, pair.locked[1].array), "the bytes that came back are others")
        rates = [size / 1e6 / max(b.time_since(a), 1e-6) for a, b in pairwise(events)]
        for event in events:
            event.close()
    return f"{rates[0]:.1f} GB/s up, {rates[1]:.1f} GB/s down"


def graph(device: cuda.Device, kernel: standin_engine.CompiledKernel) -> str:
    """Upload, kernel and download recorded once, replayed on inputs that change."""
    with Pair(device, 3 * 1024) as pair:

        def enqueue() -> None:
            pair.up()
            pair.compute(kernel)
            pair.down()

        enqueue()
        pair.stream.synchronize()
        recorded = device.record(pair.stream, enqueue)
        for seed in range(20):
            images = np.random.default_rng(seed).standard_normal(3 * 1024).astype(np.float32)
            pair.given[:] = images
            recorded.launch()
            pair.stream.synchronize()
            require(
                np.array_equal(pair.found, standin_engine.expected(images)), f"replay {seed} computed something else"
            )
        recorded.close()
    return "20 replays, bitwise"


def legacy(device: cuda.Device, kernel: standin_engine.CompiledKernel) -> str:
    """A blocking stream's capture would be broken by this; ours are non-blocking."""
    from cuda.bindings import driver

    with Pair(device, 256) as pair, Pair(device, 256) as other:

        def enqueue() -> None:
            pair.compute(kernel)
            outcome: list[Any] = []

            def meanwhile() -> None:
                with device.current():
                    outcome.append(driver.cuMemcpyHtoD(other.memory[0].address, other.given.ctypes.data, other.size))

            thread = threading.Thread(target=meanwhile)
            thread.start()
            thread.join()
            require(outcome and not int(outcome[0][0]), f"the other thread's copy: {outcome}")

        pair.compute(kernel)
        pair.stream.synchronize()
        recorded = device.record(pair.stream, enqueue)
        pair.given[:] = 3.0
        pair.up()
        recorded.launch()
        pair.down()
        pair.stream.synchronize()
        require(
            np.array_equal(pair.found, standin_engine.expected(pair.given.copy())), "the graph computed something else"
        )
        recorded.close()
    return "captured and replayed"


def broken_capture(device: cuda.Device) -> str:
    """An exception inside `enqueue` is the one that is raised, and the stream works on."""
    with Pair(device, 16) as pair:
        with contextlib.suppress(ZeroDivisionError):
            device.record(pair.stream, lambda: 1 // 0)
        pair.given[:] = 5.0
        pair.up()
        pair.down(source=0)
        pair.stream.synchronize()
        require((pair.found == 5.0).all(), "the stream did not copy afterwards")
    return ""


def threads(device: cuda.Device, turns: int = 200) -> str:
    """Two threads copy their own numbers through their own streams at once."""
    wrong: list[str] = []

    def work(number: int) -> None:
        try:
            with device.current(), Pair(device, 4096) as pair:
                for turn in range(turns):
                    pair.given[:] = number + 2 * turn
                    pair.up()
                    pair.down(source=0)
                    pair.stream.synchronize()
                    if not (pair.found == number + 2 * turn).all():
                        wrong.append(f"thread {number}, turn {turn}")
        except Exception as error:
            wrong.append(f"thread {number}: {error}")

    running = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    require(not wrong, "; ".join(wrong[:3]))
    return f"{turns} turns each"


def too_much(device: cuda.Device) -> str:
    """More than the card has: refused as DeviceMemoryError; a small allocation still works."""
    _, total = device.memory()
    try:
        device.allocate(total + 2**30).free()
    except cuda.DeviceMemoryError as error:
        device.allocate(MIB).free()
        return str(error)[:120]
    raise AssertionError("an allocation larger than the card was granted")


def given_back(device: cuda.Device) -> str:
    """Free memory before and after buffers, streams, events and graphs were made and given back."""

    def use() -> None:
        with Pair(device, MIB) as pair:
            pair.up()
            pair.stream.synchronize()
            device.record(pair.stream, pair.up).close()
            device.event().close()

    use()  # what the driver makes once and keeps
    gc.collect()
    before, _ = device.memory()
    for _ in range(5):
        use()
    after, _ = device.memory()
    require(before - after <= 4 * MIB, f"{(before - after) / MIB:.1f} MiB did not come back")
    return f"{(before - after) / MIB:.1f} MiB kept"


@contextlib.contextmanager
def stand_in(context: Context) -> Iterator[Path]:
    """An engine file whose engine is the kernel."""
    path = context.work / "stand-in.plan"
    path.write_bytes(b"a stand-in for an engine")
    info = cuda.device_info()
    manifest = Manifest(
        artefact=digest(path, "engine"),
        inputs=INPUTS,
        outputs=OUTPUTS,
        build=Build(flavor="tensorrt"),
        versions={"tensorrt": standin_engine.VERSION},
        device=Device(compute_capability=info.compute_capability, name=info.name),
    )
    sidecar(path).write_text(manifest.to_json())
    device = cuda.open_device(0)
    with device.current():
        kernel = make_kernel(device, context)
    with standin_engine.in_place_of_tensorrt(lambda plan: standin_engine.Engine(INPUTS, OUTPUTS, PROFILES, kernel)):
        yield path


def whole_path(context: Context, recorder: Recorder) -> None:
    """The TensorRT runner, its lanes, buffers and queries, and the benchmark's loop, on the stand-in."""
    with contextlib.ExitStack() as stack:
        with recorder.check("stand-in engine: the runner computes what the kernel does"):
            recorder.need(2)
            path = stack.enter_context(stand_in(context))
            with TensorRTRunner(path, "cuda:0", cuda_graph=False) as runner:
                for batch in (1, 3, 8, 32, 2):
                    images = np.random.default_rng(batch).standard_normal((batch, 3, 16, 16)).astype(np.float32)
                    found = runner.run({"input": images})["logits"]
                    require(np.array_equal(found, standin_engine.expected(images)), f"batch {batch} is wrong")
        path = context.work / "stand-in.plan"
        if not path.exists():
            return
        check_engine(path, recorder, "stand-in engine", turns=30 if context.rehearse else 1000)
        with recorder.check("stand-in engine: the benchmark's loop", measured=True) as figures:
            recorder.need(3)
            figures["detail"] = timed(path, 0.05 if context.rehearse else 1.0)


def timed(path: Path, seconds: float) -> str:
    """Throughput with and without graphs, with transfers."""
    said = []
    for cuda_graph in (True, False):
        loop = LoopOptions(warm_up=50, duration=seconds, iterations=10)
        options = Options(loop=loop, device="cuda:0", transfers=True, cuda_graph=cuda_graph)
        with Prepared(Artefact(path), options) as prepared:
            trace = measure(prepared, options).trace
        require((trace.times[:, 1:] >= 0).all() and (trace.latency > 0).all(), "a time is negative")
        words = "graphs" if cuda_graph else "no graphs"
        said.append(
            f"{words}: {trace.throughput:,.0f} qps, compute {1e3 * float(np.median(trace.compute)):.1f} µs, enqueue "
            f"{1e3 * float(np.median(trace.enqueue)):.1f} µs"
        )
    return "; ".join(said)
