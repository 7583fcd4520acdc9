"""Recording golden pairs: what the user's own program computes, for `gmconv.golden` to read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gmconv.errors import RefusedError
from gmconv.files import replacing, require_writable, unwritable
from gmconv.inputs import arguments_of
from gmconv.outputs import named_outputs
from gmconv.surgery import require_module


def save_golden(model: nn.Module, batches: Iterable[Any], path: str | os.PathLike[str]) -> None:
    """Record what `model` computes, as it is: its own code, on its own device, in eval mode, without TF32.

    Args:
        model: any module; its mode is put back.
        batches: one batch (a tensor or array, a tuple of them, or a dict by argument), or a list of such.
        path: the .npz file to write.

    Raises:
        RefusedError: no batches, bfloat16, shapes that differ beyond axis 0, or a path that cannot be written.
        UnavailableError: the disk is full.
    """
    require_module(model, "save_golden")
    path = Path(path)
    if not path.name:
        raise RefusedError(f"{path}: is a directory; give a file name")
    path = path if str(path).endswith(".npz") else Path(f"{path}.npz")  # as numpy names it
    require_writable(path)
    parted = isinstance(batches, tuple) and all(hasattr(part, "__array__") for part in batches)
    alone = parted or isinstance(batches, Mapping) or hasattr(batches, "__array__")
    parts: dict[str, list[NDArray[Any]]] = {}
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    training, tf32 = model.training, (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    try:
        model.eval()
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        for batch in [batches] if alone else batches:
            given = arguments_of(model, batch)
            with torch.no_grad():
                returned = named_outputs(given.call(model, device))
            for side, tensors in (("input", given.tensors), ("output", returned)):
                for name, tensor in tensors.items():
                    if tensor.dtype == torch.bfloat16:
                        raise RefusedError(
                            f"{side} {name!r} is in bfloat16, which numpy has not: record copy.deepcopy(model).float()"
                        )
                    key = side if len(tensors) == 1 else f"{side}.{name}"
                    parts.setdefault(key, []).append(tensor.detach().cpu().numpy())
    finally:
        model.train(training)
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
    if not parts:
        raise RefusedError(f"{path}: no batches were given; record at least one")
    try:
        whole = {key: np.ascontiguousarray(np.concatenate(arrays)) for key, arrays in parts.items()}
    except ValueError as error:
        raise RefusedError(f"{path}: the batches do not fit each other ({error}); record each shape apart") from error
    try:
        with replacing(path) as stream:
            np.savez(stream, **whole)  # type: ignore[arg-type]
    except OSError as error:
        raise unwritable(path, error) from error
