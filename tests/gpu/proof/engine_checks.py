"""What any engine must hold on a card, whatever computes inside: used on the stand-in and on TensorRT's own."""

from __future__ import annotations

import gc
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.runners.base import numpy_dtype
from runtime.runners.tensorrt import TensorRTRunner
from tests.gpu.proof.rows import Recorder, require

Feeds = dict[str, NDArray[Any]]
MIB = 2**20


def check_engine(path: Path, recorder: Recorder, name: str, *, turns: int = 1000, **about: str) -> None:
    """One row for each: graphs, queries on two streams, a bound call, threads, memory. `about`: flavor, precision."""
    checks: dict[str, Callable[[], str]] = {
        "CUDA graphs on and off agree bitwise": lambda: graphs(path),
        "two contexts on two streams agree with one": lambda: two_streams(path),
        "a bound call agrees with run": lambda: bound(path),
        "two threads do not disturb each other": lambda: two_threads(path, max(10, turns // 10)),
        f"{turns:,} runs do not grow": lambda: no_growth(path, turns),
        "closing gives the memory back": lambda: closing(path),
    }
    for what, check in checks.items():
        with recorder.check(f"{name}: {what}", **about) as figures:
            recorder.need(2)
            figures["detail"] = check()


def noise(runner: TensorRTRunner, batch: int, seed: int = 0) -> Feeds:
    """Inputs of this batch for the runner."""
    generator = np.random.default_rng(seed)
    return {
        spec.name: generator.standard_normal(
            (batch, *(d for d in spec.shape[1:] if isinstance(d, int))), dtype=np.float32
        ).astype(numpy_dtype(spec.dtype))
        for spec in runner.inputs
    }


def batches(runner: TensorRTRunner) -> tuple[int, ...]:
    """The batches worth running: the corners of the first profile, and one between."""
    profile = next(iter(runner.profiles[0].values()))
    low, opt, high = profile.min[0], profile.opt[0], profile.max[0]
    return tuple(dict.fromkeys((low, opt, high, min(high, low + 2))))


def same(found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]], what: str) -> None:
    """Raise AssertionError unless every output is bitwise the same."""
    for name, array in expected.items():
        require(np.array_equal(found[name], array), f"{what}: {name} differs in {(found[name] != array).sum()} values")


def graphs(path: Path) -> str:
    """Plain, recorded, launched, launched."""
    with TensorRTRunner(path, cuda_graph=True) as on, TensorRTRunner(path, cuda_graph=False) as off:
        for batch in batches(on):
            for seed in range(4):
                feeds = noise(on, batch, seed)
                same(on.run(feeds), off.run(feeds), f"batch {batch}, call {seed + 1}")
        return f"batch {', '.join(map(str, batches(on)))}"


def two_streams(path: Path) -> str:
    """Queries in flight on two streams, their clocks in order."""
    with TensorRTRunner(path) as runner:
        feeds = noise(runner, batches(runner)[1])
        expected = runner.run(feeds)
        for transfers in (False, True):
            for cuda_graph in (False, True):
                queries = runner.queries(feeds, 2, transfers=transfers, cuda_graph=cuda_graph, streams=2)
                require(queries is not None and len(queries) == 4, "two queries on each of two streams")
                for _ in range(20):
                    for query in queries or []:
                        query.enqueue()
                    times = [query.wait() for query in queries or []]
                for query, time in zip(queries or [], times, strict=True):
                    same(query.outputs(), expected, f"transfers {transfers}, graphs {cuda_graph}")  # type: ignore[attr-defined]
                    moments = (time.start_h2d, time.end_h2d, time.start_compute, time.end_compute, time.start_d2h)
                    late = [b - a for a, b in zip(moments, (*moments[1:], time.end_d2h), strict=True)]
                    require(min(late) > -0.01, f"times out of order: {time}")
                    require(time.start_enqueue <= time.end_enqueue, f"times out of order: {time}")
    return "with and without transfers and graphs"


def bound(path: Path) -> str:
    """The call that `runtime.benchmark` repeats on the host's clock."""
    with TensorRTRunner(path) as runner:
        feeds = noise(runner, batches(runner)[1])
        expected = runner.run(feeds)
        call = runner.bind(feeds)
        for _ in range(3):
            outputs = call()
        require(isinstance(outputs, dict), "a bound call returns the outputs")
        same(outputs, expected, "bound")  # type: ignore[arg-type]
    return ""


def two_threads(path: Path, turns: int) -> str:
    """Two runners in two threads, and one runner from both."""
    with TensorRTRunner(path) as first, TensorRTRunner(path) as second:
        sizes = batches(first)
        expected = {batch: first.run(noise(first, batch)) for batch in sizes}
        wrong: list[str] = []

        def work(runner: TensorRTRunner) -> None:
            try:
                for turn in range(turns):
                    batch = sizes[turn % len(sizes)]
                    same(runner.run(noise(runner, batch)), expected[batch], f"turn {turn}, batch {batch}")
            except Exception as error:
                wrong.append(str(error))

        for pair in ((first, second), (first, first)):
            running = [threading.Thread(target=work, args=(runner,)) for runner in pair]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
    require(not wrong, "; ".join(wrong[:2]))
    return f"{turns} turns each"


def no_growth(path: Path, turns: int) -> str:
    """Device and host memory after many runs at three batches."""
    with TensorRTRunner(path, cuda_graph=True) as runner:
        feeds = [noise(runner, batch) for batch in batches(runner)]
        for turn in range(min(turns, 300)):  # everything that is made once is made
            runner.run(feeds[turn // 10 % len(feeds)])
        gc.collect()
        device, host = runner.device_memory(), resident()
        for turn in range(turns):
            runner.run(feeds[turn // 10 % len(feeds)])
        gc.collect()
        lost, grown = device - runner.device_memory(), resident() - host
    require(lost <= MIB, f"{lost / MIB:.1f} MiB of device memory are gone")
    require(grown <= 16 * MIB, f"{grown / MIB:.1f} MiB of host memory are gone")
    return f"device {lost / MIB:+.1f} MiB, host {grown / MIB:+.1f} MiB"


def closing(path: Path) -> str:
    """Runners opened, used in every way and closed, beside one that keeps the context."""
    with TensorRTRunner(path) as keeper:
        largest = noise(keeper, max(batches(keeper)))

        def use() -> None:
            with TensorRTRunner(path) as runner:
                runner.run(largest)
                runner.bind(largest)()
                runner.queries(largest, 2, transfers=True, cuda_graph=True, streams=2)

        keeper.run(largest)
        use()
        gc.collect()
        before = keeper.device_memory()
        for _ in range(4):
            use()
        gc.collect()
        lost = before - keeper.device_memory()
    require(lost <= 4 * MIB, f"{lost / MIB:.1f} MiB did not come back in 4 rounds")
    return f"{lost / MIB:+.1f} MiB after 4 rounds"


def resident() -> int:
    """Resident bytes of this process now (not the peak)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
