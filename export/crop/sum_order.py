"""What `--crop lossless` changes in ONNX Runtime, and which layers stay whole for it.

A tap that is zero adds nothing, but a convolution with fewer taps may add the others in another order, and in fp32 that
moves the last bits: ONNX Runtime has one kernel for 3x3 and another for 1x1. How far that reaches at the output depends
on the network behind the layer, so it is measured, on the graphs that are shipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from export.crop.latency import module_session
from gmconv.cropping.certificate import SumOrder
from gmconv.cropping.choose import Where, choose_windows, crop_to, croppable
from gmconv.cropping.groups import DepthwiseSplit
from gmconv.cropping.measure import output_error, run

LIMIT = 1e-6
_MARGIN = 0.5  # the largest of some thousand rounding errors varies by a third and more from input to input


def hold_sum_order(
    model: nn.Module,
    batch: Tensor,
    splits: Mapping[str, DepthwiseSplit] | None = None,
    *,
    where: Where | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> SumOrder:
    """Which layers a lossless crop in fp32 must leave whole for the outputs to stay within 1e-6 of their RMS.

    Cropped against uncropped, both as exported, in ONNX Runtime on `batch`. Where cutting every layer changes too much,
    layers are left whole from the input on: the fewer layers follow a change, the less of it is seen.

    Args:
        model: baked, fp32; not changed.
        batch: (N, C, H, W).
        splits: depthwise layers that would be cropped in channel groups.
        where: as for `gmconv.crop`.
        note: called with a few words before ONNX Runtime runs.
    """
    layers, windows = croppable(model, where), choose_windows(model, "lossless", where=where)
    groups = {name: split.groups for name, split in (splits or {}).items() if split.taken}
    names = [n for n, w in windows.items() if n in groups or (w.height, w.width) != tuple(layers[n].kernel_size)]
    if not names:
        return SumOrder(limit=LIMIT)
    note("comparing the order of sums, cropped and uncropped, in ONNX Runtime")
    reference = _outputs(copy.deepcopy(model), batch)

    def change(cut: Sequence[str]) -> float:
        if not cut:
            return 0.0
        chosen = {name: windows[name] for name in cut}
        cropped = crop_to(model, chosen, {name: groups[name] for name in cut if name in groups})
        return output_error([reference], [_outputs(cropped, batch)]).relative_max

    everything = found = change(names)
    cut, enough = (0, len(names)) if everything > _MARGIN * LIMIT else (len(names), len(names))
    if cut == 0:
        found = 0.0
    while enough - cut > 1:  # the last `cut` layers may be cropped, the last `enough` may not
        middle = (cut + enough) // 2
        measured = change(names[-middle:])
        if measured > _MARGIN * LIMIT:
            enough = middle
        else:
            cut, found = middle, measured
    return SumOrder(limit=LIMIT, error=found, error_of_all=everything, whole=tuple(names[: len(names) - cut]))


def _outputs(model: nn.Module, batch: Tensor) -> tuple[Tensor, ...]:
    """The outputs of `model` (changed: fp32, on the CPU) as exported, in ONNX Runtime."""
    count = len(run(model, batch[:1]))
    batch = batch.detach().cpu().float()
    session = module_session(model, tuple(batch.shape), outputs=count)
    return tuple(torch.from_numpy(y) for y in session.run(None, {"x": batch.numpy()}))
