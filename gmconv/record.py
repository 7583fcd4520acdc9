"""Recording golden pairs: what the user's own program computes, for `gmconv.golden` to read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gmconv.cli import of_the_machine
from gmconv.errors import RefusedError
from gmconv.files import file_named, replacing, require_writable, unwritable
from gmconv.inputs import Arguments, arguments_of, does_not_run
from gmconv.npz import npz_names
from gmconv.outputs import named_outputs, refuse_unshippable, unlike
from gmconv.surgery import evaluating, refuse_valueless, require_module


def save_golden(model: nn.Module, batches: Iterable[Any], path: str | os.PathLike[str]) -> None:
    """Record what `model` computes, as it is: its own code, on its own device, in eval mode, without TF32.

    Args:
        model: any module; the mode of each part is put back.
        batches: one batch (a tensor or array, a tuple of them, or a dict by argument), or a list of such.
        path: the .npz file to write.

    Raises:
        RefusedError: no batches, or one that the network does not run on; outputs that are NaN or infinite, others
            when the first batch is run again, not a row for each sample, or bfloat16; shapes that differ beyond
            axis 0, or a path that cannot be written, or where something else lies than such pairs.
        UnavailableError: the disk is full.
    """
    require_module(model, "save_golden")
    path = file_named(path, "save_golden: path")
    path = path if str(path).endswith(".npz") or not path.name else Path(f"{path}.npz")  # as numpy names it
    require_writable(path)
    _refuse_other_arrays(path)
    refuse_valueless(model)
    parted = isinstance(batches, tuple) and all(hasattr(part, "__array__") for part in batches)
    alone = parted or isinstance(batches, Mapping) or hasattr(batches, "__array__")
    parts: dict[str, list[NDArray[Any]]] = {}
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with _answering(model):
        for batch in [batches] if alone else batches:
            given = arguments_of(model, batch)
            if dim := [name for name, tensor in given.tensors.items() if tensor.dtype == torch.bfloat16]:
                raise RefusedError(
                    f"input {dim[0]!r} is in bfloat16, which numpy has not: record copy.deepcopy(model).float()"
                )
            taken, returned = _arrays(given.tensors), _returned(model, given, device)
            if not parts:
                _refuse_two_answers(returned, _returned(model, given, device))
            for side, arrays in (("input", taken), ("output", returned)):
                for name, array in arrays.items():
                    parts.setdefault(side if len(arrays) == 1 else f"{side}.{name}", []).append(array)
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


def _refuse_other_arrays(path: Path) -> None:
    """Raise RefusedError for a file that holds no golden pairs: somebody's data has the same suffix."""
    if path.is_file():
        names = npz_names(path)
        sides = {name.partition(".")[0] for name in names}
        if sides != {"input", "output"}:
            raise RefusedError(f"{path}: is there and holds no golden pairs ({', '.join(names)}); give another name")


@contextmanager
def _answering(model: nn.Module) -> Iterator[None]:
    """In eval mode and without TF32, both put back."""
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with ExitStack() as stack:
        try:
            stack.enter_context(evaluating(model))
        except Exception as error:  # of a program of torch.export
            raise RefusedError(f"the network cannot be put into eval mode ({error})") from error
        try:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
            with torch.no_grad():
                yield
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


def _returned(model: nn.Module, given: Arguments, device: torch.device) -> dict[str, NDArray[Any]]:
    samples = len(next(iter(given.tensors.values())))
    try:
        returned = given.call(model, device)
    except Exception as error:
        if of_the_machine(error):
            raise
        advice = (
            "a batch is a tensor, a tuple of tensors, or a dict with one for each argument; of a loader that gives "
            "labels too, record (images for images, _ in loader)"
        )
        raise does_not_run(model, given.inputs, error, samples, advice) from error
    named = named_outputs(returned)
    refuse_unshippable(named)
    if other := [name for name, tensor in named.items() if tensor.shape[:1] != (samples,)]:
        raise RefusedError(
            f"output {other[0]!r} has shape {tuple(named[other[0]].shape)} for {samples} samples, and pairs hold a row "
            f"for each: record a network that returns one"
        )
    found = _arrays(named)
    if damaged := [name for name, array in found.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]:
        raise RefusedError(f"output {damaged[0]!r} is NaN or infinite, which nothing can be compared with: mend that")
    return found


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    # Copied, as a forward may return a buffer that its next call overwrites.
    return {name: np.array(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()}


def _refuse_two_answers(once: Mapping[str, NDArray[Any]], again: Mapping[str, NDArray[Any]]) -> None:
    if (found := unlike(once, again)) is not None:
        raise RefusedError(
            f"run twice on one batch, the network gives two answers (output {found[0]!r} differs by {found[1]:.1e} of "
            f"its RMS), and nothing can be held against them: its forward draws random numbers, or changes a buffer "
            f"with each call, which it should not in eval mode"
        )
