"""How long each convolution takes in ONNX Runtime at each window it could be cropped to."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from export.graph import capture
from gmconv.cropping.certificate import CropCertificate
from gmconv.cropping.choose import Where, crop_to, croppable
from gmconv.cropping.layers import pads_of
from gmconv.cropping.macs import count_macs
from gmconv.cropping.window import Window, nested_windows

if TYPE_CHECKING:
    from onnx import ModelProto

K = TypeVar("K")
Latencies = Mapping[str, Mapping[Window, float]]
"""Milliseconds by layer name and window."""
_ROUNDS = 15
_SECONDS_PER_RUN = 0.02  # a round repeats a fast layer until it has run for about this long


def measure_latencies(
    model: nn.Module,
    example: Tensor,
    *,
    where: Where | None = None,
    windows: Mapping[str, Sequence[Window]] | None = None,
    threads: int = 0,
    rounds: int = _ROUNDS,
    progress: Callable[[str], None] = lambda _: None,
) -> Latencies:
    """Time each croppable layer of `model` alone, at the shapes it sees for `example` (batch first), window by window.

    The windows of one layer take turns, so that a busy moment of the machine hits all of them: all of its
    `nested_windows`, or where `windows` is given its own there and the whole kernel, for those layers that have a
    smaller one. `threads` 0 lets ONNX Runtime choose. Layers of equal geometry are timed once.

    Returns:
        Milliseconds (median of `rounds`) per layer and window, the whole kernel first.
    """
    shapes = count_macs(model, example)
    known: dict[tuple[Any, ...], dict[Window, float]] = {}
    found = {}
    for name, conv in croppable(model, where).items():
        if name not in shapes:
            continue
        shape = (example.shape[0], *shapes[name].input_shape)
        kernel = (int(conv.kernel_size[0]), int(conv.kernel_size[1]))
        timed = nested_windows(kernel)
        if windows is not None:
            timed = list(dict.fromkeys((Window.whole(kernel), *windows.get(name, ()))))
            if len(timed) == 1:
                continue
        key = (shape, conv.out_channels, kernel, conv.stride, conv.dilation, conv.groups, pads_of(conv), tuple(timed))
        if key not in known:
            progress(name)
            known[key] = _time_windows(conv, shape, timed, threads, rounds)
        found[name] = known[key]
    return found


def with_latencies(certificate: CropCertificate, latencies: Latencies) -> CropCertificate:
    """The certificate with each layer's time before and after, where both windows were timed."""
    layers = []
    for layer in certificate.layers:
        times = {} if layer.split and layer.split.taken else latencies.get(layer.name, {})
        before, after = times.get(Window.whole(layer.kernel)), times.get(Window(*layer.offset, *layer.kept))
        layers.append(dataclasses.replace(layer, latency_before_ms=before, latency_after_ms=after))
    return dataclasses.replace(certificate, layers=tuple(layers))


def _time_windows(
    conv: nn.Conv2d, shape: tuple[int, ...], windows: Sequence[Window], threads: int, rounds: int
) -> dict[Window, float]:
    feeds = {"x": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
    sessions = {window: _session(conv, shape, window, threads) for window in windows}
    return {window: statistics.median(values) for window, values in time_sessions(sessions, feeds, rounds).items()}


def time_sessions(sessions: Mapping[K, Any], feeds: Mapping[str, Any], rounds: int) -> dict[K, list[float]]:
    """Milliseconds per run of each ONNX Runtime session, one value per round; they take turns within a round."""
    repeats = {}
    for key, session in sessions.items():
        session.run(None, feeds)
        start = time.perf_counter()
        session.run(None, feeds)
        repeats[key] = max(1, min(50, round(_SECONDS_PER_RUN / max(time.perf_counter() - start, 1e-6))))
    times: dict[K, list[float]] = {key: [] for key in sessions}
    for _ in range(rounds):
        for key, session in sessions.items():
            start = time.perf_counter()
            for _ in range(repeats[key]):
                session.run(None, feeds)
            times[key].append((time.perf_counter() - start) / repeats[key] * 1e3)
    return times


def _session(conv: nn.Conv2d, shape: tuple[int, ...], window: Window, threads: int) -> Any:
    """A session of `conv` cropped to `window`: one Conv node, after a Pad where it reads only a part of its input.

    Built by hand, since exporting each takes longer than timing it. Padding is timed as zeros.
    """
    from onnx import TensorProto, helper, numpy_helper

    cropped = crop_to(nn.Sequential(conv), {"0": window})[0]
    left, right, top, bottom = pads_of(cast(nn.Conv2d, cropped))
    sides = (top, left, bottom, right)
    weight = np.random.default_rng(1).standard_normal(
        (conv.out_channels, conv.in_channels // conv.groups, window.height, window.width), dtype=np.float32
    )
    weights = {"w": weight}
    nodes = []
    if min(sides) < 0:
        weights["cut"] = np.array([0, 0, *(min(p, 0) for p in sides[:2]), 0, 0, *(min(p, 0) for p in sides[2:])])
        nodes.append(helper.make_node("Pad", ["x", "cut"], ["read"]))
    nodes.append(
        helper.make_node(
            "Conv",
            ["read" if nodes else "x", "w"],
            ["y"],
            pads=[max(p, 0) for p in sides],
            strides=[int(s) for s in conv.stride],
            dilations=[int(d) for d in conv.dilation],
            group=conv.groups,
        )
    )
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return open_session(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), threads)


def module_session(module: nn.Module, shape: tuple[int, ...], *, outputs: int = 1, threads: int = 0) -> Any:
    """A CPU session of a module as the exporter writes it for inputs `x` of `shape` (batch first).

    `module` itself is moved to the CPU, fp32 and eval mode; `outputs` is how many tensors it returns.
    """
    import onnx_ir as ir

    with tempfile.TemporaryDirectory() as folder:
        exported = capture.to_onnx(
            module.cpu().float().eval(),
            torch.zeros(shape),
            input_name="x",
            output_names=[f"y{i}" for i in range(outputs)],
            axes=capture.Axes(batch=False),
            opset=20,
            log=Path(folder) / "exporter.log",
        ).model
    return open_session(ir.to_proto(exported), threads)


def open_session(model: ModelProto | Path, threads: int = 0) -> Any:
    """A CPU session of a graph or an ONNX file; `threads` 0 lets ONNX Runtime choose."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
