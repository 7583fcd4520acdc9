"""What `--crop lossless` changes in ONNX Runtime, and which layers stay whole for it.

A tap that is zero adds nothing, but a convolution with fewer taps may add the others in another order, and in fp32 that
moves the last bits: ONNX Runtime has one kernel for 3x3 and another for 1x1. How far that reaches at the output depends
on the network behind the layer, so it is measured, on the graphs that are shipped.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from export.crop.latency import open_session
from export.graph import capture
from gmconv.cropping.certificate import SumOrder
from gmconv.cropping.choose import crop_to
from gmconv.cropping.measure import Outputs, output_error, run
from gmconv.cropping.window import Window

LIMIT = 1e-6
_MARGIN = 0.5  # the largest of some thousand rounding errors varies by a third and more from input to input


def hold_sum_order(model: nn.Module, batch: Tensor, windows: Mapping[str, Window]) -> SumOrder:
    """Which layers a lossless crop in fp32 must leave whole for the outputs to stay within 1e-6 of their RMS.

    Cropped against uncropped, both as exported, in ONNX Runtime on `batch`. Where cutting every layer changes too much,
    layers are left whole from the input on: the fewer layers follow a change, the less of it is seen.

    Args:
        model: baked, fp32; not changed.
        batch: (N, C, H, W).
        windows: what a lossless crop keeps of each layer.
    """
    kernels = {name: tuple(cast(nn.Conv2d, model.get_submodule(name)).kernel_size) for name in windows}
    names = [name for name, window in windows.items() if window.size != kernels[name]]
    if not names:
        return SumOrder(limit=LIMIT)
    reference = run_as_exported(model, batch)

    def change(cut: Sequence[str]) -> float:
        cropped = crop_to(model, {name: windows[name] for name in cut})
        return output_error([reference], [run_as_exported(cropped, batch)]).relative_max

    everything = change(names)
    if everything <= _MARGIN * LIMIT:
        return SumOrder(limit=LIMIT, error=everything, error_of_all=everything)
    found, cut, enough = 0.0, 0, len(names)
    while enough - cut > 1:  # the last `cut` layers may be cropped, the last `enough` may not
        middle = (cut + enough) // 2
        measured = change(names[-middle:])
        if measured > _MARGIN * LIMIT:
            enough = middle
        else:
            cut, found = middle, measured
    return SumOrder(limit=LIMIT, error=found, error_of_all=everything, whole=tuple(names[: len(names) - cut]))


def run_as_exported(model: nn.Module, batch: Tensor) -> Outputs:
    """The outputs of `model` as the exporter writes it, in ONNX Runtime on the CPU."""
    import onnx_ir as ir

    count = len(run(model, batch[:1]))
    batch = batch.detach().cpu().float()
    model = copy.deepcopy(model).cpu().float()
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        exported = capture.to_onnx(
            model,
            {"x": torch.zeros(batch.shape)},
            output_names=[f"y{i}" for i in range(count)],
            axes=capture.Axes(batch=False),
            opset=20,
            log=Path(folder) / "exporter.log",
        ).model
    session = open_session(ir.to_proto(exported))
    return tuple(torch.from_numpy(y) for y in session.run(None, {"x": batch.numpy()}))
