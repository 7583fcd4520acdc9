"""Which depthwise layers are faster as channel groups of smaller windows: timed in ONNX Runtime, as exported."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
from torch import Tensor, nn

from export.crop.latency import module_session, time_sessions
from gmconv.cropping.choose import Tolerance, Where, choose_groups, choose_windows, crop_to, croppable
from gmconv.cropping.groups import ChannelGroup, DepthwiseSplit
from gmconv.cropping.macs import count_macs
from gmconv.cropping.measure import run
from gmconv.cropping.window import Precision
from runtime.benchmark.interleave import bootstrap_ratio

_ROUNDS = 20
_COPIES = 8  # taps per channel that copying channels costs at least (it lost wherever measured to 20): not timed below
_FASTER = 0.95  # the split layer must take at most this share of the time, with 97.5 % confidence


def faster_splits(
    model: nn.Module,
    example: Tensor,
    tolerance: Tolerance,
    *,
    precision: Precision = "fp32",
    fp32_layers: Collection[str] = (),
    where: Where | None = None,
    threads: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, DepthwiseSplit]:
    """Time every depthwise layer that could be split, at the shape it sees for `example` (batch first).

    One window against the best splits into two and three groups, in turns. Each has a BatchNorm and a ReLU behind it:
    ONNX Runtime folds both into one convolution, but not into several, and a split has to be worth that too.

    Args:
        model, tolerance, precision, fp32_layers, where: as for `gmconv.crop`.
        threads: ONNX Runtime's; 0 lets it choose.
        note: called with a few words before each layer is timed.

    Returns:
        By layer name the fastest split and its times, `taken` where it is faster. Layers that cannot save a tenth of
        their multiply-accumulates and 8 taps per channel (no 3x3 can), never run, or whose weight the network reads
        elsewhere are missing.
    """
    candidates = choose_groups(model, tolerance, precision=precision, fp32_layers=fp32_layers, where=where)
    if not candidates:
        return {}
    shapes, layers = count_macs(model, example), croppable(model)
    windows = choose_windows(model, tolerance, precision=precision, fp32_layers=fp32_layers)
    found = {}
    for name, splits in candidates.items():
        channels, window = layers[name].in_channels, windows[name]
        splits = [groups for groups in splits if window.taps - _taps(groups) / channels >= _COPIES]
        if name not in shapes or not splits:
            continue
        if not _runs_split(model, example, name, splits[0]):
            note(f"{name} is not split: the network reads its weight elsewhere")
            continue
        note(f"timing {name} in channel groups in ONNX Runtime")
        alone, shape = nn.Sequential(layers[name]), (len(example), *shapes[name].input_shape)
        variants = [crop_to(alone, {"0": window}), *(crop_to(alone, {}, {"0": groups}) for groups in splits)]
        feeds = {"x": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
        tail = (nn.BatchNorm2d(layers[name].out_channels), nn.ReLU())
        sessions = {i: module_session(nn.Sequential(v, *tail), shape, threads=threads) for i, v in enumerate(variants)}
        times = {i: np.asarray(values) for i, values in time_sessions(sessions, feeds, _ROUNDS).items()}
        best = min(range(1, len(variants)), key=lambda i: float(np.median(times[i])))
        found[name] = DepthwiseSplit(
            groups=splits[best - 1],
            one_window_ms=float(np.median(times[0])),
            split_ms=float(np.median(times[best])),
            taken=bootstrap_ratio(times[best], times[0]).high <= _FASTER,
        )
    return found


def _runs_split(model: nn.Module, example: Tensor, name: str, groups: Sequence[ChannelGroup]) -> bool:
    """Whether the network runs with the layer split: not where it reads the weight or bias, which is then in parts."""
    try:
        run(crop_to(model, {}, {name: groups}), example)
    except Exception:  # it ran before the split, so whatever this is, the split did it
        return False
    return True


def _taps(groups: Sequence[ChannelGroup]) -> int:
    return sum(len(group.channels) * group.window.taps for group in groups)
