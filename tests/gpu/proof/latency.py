"""Step c: what the masks cost where the network was trained, in torch, and what baking and cropping give back.

Every form (live, baked, twin, cropped) in every mode (eager, a CUDA graph, torch.compile) at every batch; those of one
batch take turns, as in `runtime.benchmark`. The times are the device's, from CUDA events around each call: in eager
mode they contain the waits for the host, as every user's do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.benchmark.interleave import Interleaved, interleave
from runtime.benchmark.timing import Lane, LoopOptions, Progress, Trace
from tests.gpu.proof.networks import Network, large_kernels, zoo
from tests.gpu.proof.rows import Recorder, require
from tests.gpu.proof.steps import Context

BATCHES = (1, 8, 32, 128)
#: Seconds of timing for each form, mode and batch.
SECONDS = 0.25
#: torch.compile takes tens of seconds for a deep network: these only, in this order, while there is time.
COMPILED = {"resnet20, 7x7": 1, "depthwise31": 1, "resnet50": 32}
COMPILED_FORMS = ("live", "baked")
#: Baking must not cost; both sides are the same convolutions, so a few percent are the machine's.
SLOWER = 1.05


def run(context: Context, recorder: Recorder) -> None:
    """Rows of figures in ms, and as ratios to the live network and to the plain twin."""
    networks = [
        Network("resnet20, 7x7", zoo("resnet20", 32, kernel_size=7).make, (3, 32, 32)),
        large_kernels(128),
        zoo("resnet50", 224),
    ]
    batches, compiled, seconds = BATCHES, COMPILED, SECONDS
    if context.rehearse:
        networks = [large_kernels(16, channels=4, blocks=1)]
        batches, compiled, seconds = (1, 2), {"depthwise31": 1}, 0.01
    for network in networks:
        forms = {name: model.to(context.device) for name, model in network.forms().items()}
        for batch in batches:
            images = network.images(batch).to(context.device)
            time_forms(recorder, network.name, forms, images, "eager", seconds)
            # A stand-in's replay takes a tick or two of the clock: there is nothing to judge in a rehearsal.
            time_forms(recorder, network.name, forms, images, "graph", seconds, judged=not context.rehearse)
        del forms
    for network in networks:
        if network.name in compiled:
            forms = {name: network.forms()[name].to(context.device) for name in COMPILED_FORMS}
            images = network.images(compiled[network.name]).to(context.device)
            time_forms(recorder, network.name, forms, images, "inductor", seconds)


def time_forms(
    recorder: Recorder,
    name: str,
    forms: dict[str, nn.Module],
    images: Tensor,
    mode: str,
    seconds: float,
    *,
    judged: bool = False,  # not where it is eager: times of small networks are the host's then, and move with it
) -> None:
    """One row: the forms of one network in one mode at one batch, interleaved."""
    what = f"{name}, batch {len(images)}, {mode if mode in ('eager', 'graph') else 'torch.compile'}"
    with recorder.check(what, measured=True) as figures, torch.inference_mode():
        recorder.need(45 if mode == "inductor" else 4)
        lanes = [CallLane(CALLS[mode](model, images)) for model in forms.values()]
        found = interleave(lanes, warm_up=20, seconds=seconds, minimum=5)
        figures |= ratios(found, tuple(forms))
        figures["detail"] = words(figures)
        if judged:
            require_as_fast(figures)


def require_as_fast(figures: dict[str, Any]) -> None:
    """Raise AssertionError where the baked network surely takes longer than the live one."""
    low = figures["over_live"]["baked"]["low"]
    require(low <= SLOWER, f"baked takes at least {low:.3f} of the live network's time; {figures['detail']}")


def ratios(found: Interleaved, forms: tuple[str, ...]) -> dict[str, Any]:
    """Median ms of each form, and its latency over the live network's and the twin's with 95 % intervals."""
    figures: dict[str, Any] = {"ms": {f: float(np.median(v)) for f, v in zip(forms, found.latencies, strict=True)}}
    for reference in {"live", "twin"} & set(forms):
        figures[f"over_{reference}"] = {}
        for form in forms:
            ratio = found.ratio(forms.index(form), forms.index(reference))
            figures[f"over_{reference}"][form] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
    figures["rounds"] = found.rounds
    return figures


def words(figures: dict[str, Any]) -> str:
    """The row's figures in a line."""
    ms = ", ".join(f"{form} {value:.4g}" for form, value in figures["ms"].items())
    said = [f"{ms} ms"]
    for reference in ("live", "twin"):
        others = {form: r for form, r in figures.get(f"over_{reference}", {}).items() if form != reference}
        if others:
            said.append(f"over {reference}: " + ", ".join(f"{form} {r['value']:.3f}" for form, r in others.items()))
    return "; ".join(said)


class CallLane(Lane):
    """A call on torch's current stream, clocked by CUDA events around it."""

    clock = "CUDA events"
    _RING = 8

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self._RING)]

    def run(self, options: LoopOptions, progress: Progress | None = None) -> Trace:
        """Not needed here: forms are only ever compared."""
        raise NotImplementedError

    def block(self, seconds: float, minimum: int) -> NDArray[np.float64]:
        """See `Lane.block`; waits for the card every few calls, so that the host cannot run far ahead."""
        times: list[float] = []
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(times) < minimum:
            for start, end in self._events:
                start.record()
                self._call()
                end.record()
            self._events[-1][1].synchronize()
            times += [start.elapsed_time(end) for start, end in self._events]
        return np.asarray(times, dtype=np.float64)


def eager(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """The network as it is called in training code."""
    for _ in range(3):
        model(images)
    return lambda: model(images)


def graph(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """The network captured once and replayed, as torch's documentation does it: after a warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(images)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        kept = model(images)

    def replay() -> object:
        captured.replay()
        return kept

    expected = model(images)
    replay()
    torch.cuda.synchronize()
    require(torch.equal(kept, expected), "the graph's output is not the network's")
    return replay


def inductor(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """The network through torch.compile, for this shape alone."""
    compiled = torch.compile(model, dynamic=False)
    for _ in range(3):
        compiled(images)
    return lambda: compiled(images)


CALLS: dict[str, Callable[[nn.Module, Tensor], Callable[[], object]]] = {
    "eager": eager,
    "graph": graph,
    "inductor": inductor,
}
