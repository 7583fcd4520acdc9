"""How long each convolution takes in ONNX Runtime at each window it could be cropped to."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from torch import Tensor, nn

from gmconv.cropping.choose import crop_to, croppable
from gmconv.cropping.layers import pads_of
from gmconv.cropping.macs import count_macs
from gmconv.cropping.window import Window

if TYPE_CHECKING:
    from onnx import ModelProto

K = TypeVar("K")
Latencies = Mapping[str, Mapping[Window, float]]
"""Milliseconds by layer name and window."""
_ROUNDS = 15
_SECONDS_PER_RUN = 0.02  # a round repeats a fast layer until it has run for about this long
_TURNS = 4  # more sessions than these share the time of so many


def measure_latencies(
    model: nn.Module,
    example: Tensor,
    windows: Mapping[str, Sequence[Window]],
    *,
    threads: int = 0,
    rounds: int = _ROUNDS,
) -> Latencies:
    """Time layers of `model` alone, at the shapes they see for `example` (batch first): whole, and at their `windows`.

    Layers of equal geometry are timed as one, at all of their windows, which take turns; those without a smaller window
    are not. The fastest run counts: whatever else the machine does only adds to a run, and by more than cropping takes
    away from a small one. `threads` 0 lets ONNX Runtime choose.

    Returns:
        Milliseconds (the fastest run in `rounds`) per layer and window, the whole kernel first.
    """
    shapes = count_macs(model, example)
    groups: dict[tuple[Any, ...], tuple[nn.Conv2d, dict[Window, None]]] = {}
    asked: dict[str, tuple[tuple[Any, ...], tuple[Window, ...]]] = {}
    for name, conv in croppable(model, lambda name, _: name in windows and name in shapes).items():
        shape = (example.shape[0], *shapes[name].input_shape)
        timed = tuple(dict.fromkeys((Window.whole(conv.kernel_size), *windows[name])))
        if len(timed) == 1:
            continue
        key = (shape, conv.out_channels, timed[0], conv.stride, conv.dilation, conv.groups, pads_of(conv))
        groups.setdefault(key, (conv, {}))[1].update(dict.fromkeys(timed))
        asked[name] = key, timed
    known = {}
    for key, (conv, union) in groups.items():
        shape = key[0]
        feeds = {"x": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
        sessions = {window: _session(conv, shape, window, threads) for window in union}
        known[key] = {window: min(values) for window, values in time_sessions(sessions, feeds, rounds).items()}
    return {name: {window: known[key][window] for window in timed} for name, (key, timed) in asked.items()}


def time_sessions(sessions: Mapping[K, Any], feeds: Mapping[str, Any], rounds: int) -> dict[K, list[float]]:
    """Milliseconds of each ONNX Runtime session's fastest run in each round; they take turns within a round."""
    repeats, share = {}, min(1.0, _TURNS / max(1, len(sessions)))
    for key, session in sessions.items():
        session.run(None, feeds)
        start = time.perf_counter()
        session.run(None, feeds)
        alone = min(50, _SECONDS_PER_RUN / max(time.perf_counter() - start, 1e-6))
        repeats[key] = max(1, round(share * alone))
    times: dict[K, list[float]] = {key: [] for key in sessions}
    for _ in range(rounds):
        for key, session in sessions.items():
            stamps = [time.perf_counter()]
            for _ in range(repeats[key]):
                session.run(None, feeds)
                stamps.append(time.perf_counter())
            times[key].append(min(after - before for before, after in pairwise(stamps)) * 1e3)
    return times


def _session(conv: nn.Conv2d, shape: tuple[int, ...], window: Window, threads: int) -> Any:
    """A session of `conv` cropped to `window`: one Conv node, after a Pad where it reads only a part of its input.

    Built by hand, since exporting each takes longer than timing it. Padding is timed as zeros.
    """
    from onnx import TensorProto, helper, numpy_helper

    cropped = cast(nn.Conv2d, crop_to(nn.Sequential(conv), {"0": window})[0])
    left, right, top, bottom = pads_of(cropped)
    sides = (top, left, bottom, right)
    cut = np.array([0, 0, min(top, 0), min(left, 0), 0, 0, min(bottom, 0), min(right, 0)])
    weight = np.random.default_rng(1).standard_normal(tuple(cropped.weight.shape), dtype=np.float32)
    nodes = [
        helper.make_node(
            "Conv",
            ["read" if cut.any() else "x", "w"],
            ["y"],
            pads=[max(p, 0) for p in sides],
            strides=[int(s) for s in conv.stride],
            dilations=[int(d) for d in conv.dilation],
            group=conv.groups,
        )
    ]
    if cut.any():
        nodes.insert(0, helper.make_node("Pad", ["x", "cut"], ["read"]))
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(cut, "cut")],
    )
    return open_session(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), threads)


def open_session(model: ModelProto | Path, threads: int = 0) -> Any:
    """A CPU session of a graph or an ONNX file; `threads` 0 lets ONNX Runtime choose."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
