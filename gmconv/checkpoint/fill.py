"""From what a file holds to a network that holds it: masks put on, values checked, torch's own loading."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from gmconv.checkpoint.file import NumpyArray
from gmconv.checkpoint.names import find_state, first
from gmconv.errors import CheckpointError, printable, type_words
from gmconv.layer import GMConv2d
from gmconv.surgery import convert

_LAZY = (UninitializedParameter, UninitializedBuffer)
_EXPANDED = 2**22  # elements that a tensor may have beyond those that the file stores (a view with stride 0)


def fill(
    model: nn.Module,
    raw: Mapping[str, Any],
    path: Path,
    arch: str,
    *,
    recorded: Any = None,
    weights: str | None = None,
) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """Load the weights in `raw` into `model` (as its factory made it, on the CPU); masked layers are converted first.

    Args:
        model: changed in place; float64 afterwards where all weights in the file are.
        raw: of `read_file`.
        path, arch: for messages.
        recorded: a file's own list of masked layers; None to find them by their `sigma`.
        weights: which of several sets; see `load_checkpoint`.

    Returns:
        The layers converted, with their `sigma_per`; notes on what was read between the lines; warnings of what was
        assumed, which golden pairs can confirm.

    Raises:
        CheckpointError: a key is missing, unexpected, of another shape or kind, or holds NaN or Inf.
    """
    what = f"{path}: does not fit {arch}"
    names = set(model.state_dict()) | {f"{name}.sigma" for name in (recorded if isinstance(recorded, dict) else ())}
    found = find_state(raw, names, path, weights)
    state, notes, warnings = found.state, list(found.notes), list(found.warnings)
    masked = _masked(recorded, state, model, path)
    converted = put_masks(model, masked, str(path), arch)
    wanted = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    for name in wanted.keys() & state.keys():
        state[name] = _readable(name, state[name], wanted[name], path, notes)
    kinds = {value.dtype for key, value in state.items() if isinstance(wanted.get(key), nn.Parameter)}
    if kinds == {torch.float64}:
        model.double()
    elif torch.float64 in {p.dtype for p in model.parameters()} - kinds:  # which the factory made the default
        model.float()
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes that differ
        require_same_keys(model, state, what)
        raise CheckpointError(f"{what}; {printable(' '.join(str(error).split()), 300)}") from error
    missing = _really_missing(result.missing_keys, state, wanted)
    _refuse(what, missing, result.unexpected_keys, [])
    _require_finite(model, state, path)
    if converted and recorded is None:
        warnings.append(_assumed(model, converted, arch))
    for half in {p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)}:
        notes.append(f"{str(half).removeprefix('torch.')} weights widened to float32")
        model.float()
    return masked, tuple(dict.fromkeys(notes)), tuple(warnings)


def _assumed(model: nn.Module, converted: Collection[str], arch: str) -> str:
    """What is taken for granted of sigmas that no layer of the factory's reads."""
    below = any(bool((model.get_parameter(f"{name}.sigma") < 0).any()) for name in converted)
    return (
        f"assumed: the sigma of {len(converted)} layers{' (some is negative, as a logarithm may be)' * below} is "
        f"GMConv2d's, in taps as stored, the mask exp(-r^2 / 2 sigma^2), because {arch} has plain convolutions there; "
        f"nothing in the file says so, and a variance or a logarithm of that name would be another network: give "
        f"--arch the factory of the network as it was trained, with its own layer, or --golden FILE.npz with what your "
        f"program computed"
    )


def put_masks(model: nn.Module, masked: Mapping[str, str], where: str, arch: str) -> set[str]:
    """Convert those of the named convolutions that are no GMConv2d yet; their names.

    Raises CheckpointError where there is no convolution of that name.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in masked:
        if not isinstance(modules.get(name), nn.Conv2d):
            raise CheckpointError(
                f"{where}: {arch} has no convolution named {printable(name)!r} to put its mask on; check --arch"
            )
    plain = {name for name in masked if not isinstance(modules[name], GMConv2d)}
    for per in ("layer", "channel"):
        names = {name for name in plain if masked[name] == per}
        if names:
            convert(model, sigma_per=per, where=lambda name, _, names=names: name in names, inplace=True)  # type: ignore[misc]
    return plain


def _masked(recorded: Any, state: Mapping[str, Any], model: nn.Module, path: Path) -> dict[str, str]:
    """Masked layers and their `sigma_per`: as recorded, or from sigma keys that the network lacks itself."""
    if isinstance(recorded, dict) and all(v in ("layer", "channel") for v in recorded.values()):
        return {str(k): str(v) for k, v in recorded.items()}
    if recorded is not None:
        raise CheckpointError(f"{path}: its list of masked layers is damaged; save it again")
    own = model.state_dict().keys()
    found = {}
    for key, sigma in state.items():
        layer = key.removesuffix(".sigma")
        weight = state.get(f"{layer}.weight")
        if layer == key or key in own or not (isinstance(weight, Tensor) and isinstance(sigma, Tensor)):
            continue
        if weight.ndim != 4:
            continue
        if sigma.numel() not in (1, weight.shape[0]):
            raise CheckpointError(
                f"{path}: {printable(key)} has {sigma.numel()} values; a static mask has 1, or one for each of its "
                f"{weight.shape[0]} output channels"
            )
        found[layer] = "layer" if sigma.numel() == 1 else "channel"
    found |= {
        name: module.sigma_per
        for name, module in model.named_modules()
        if isinstance(module, GMConv2d) and f"{name}.sigma" in state
    }
    return found


def _sides(tensor: Tensor) -> list[int]:
    """Its shape but for axes of length 1, which forms of one mask put in different places."""
    return [side for side in tensor.shape if side != 1]


def _readable(name: str, value: Any, target: Tensor, path: Path, notes: list[str]) -> Any:
    """One value as a dense tensor that torch copies into `target` without changing what it means."""
    where = f"{path}: {printable(name)}"
    if isinstance(value, NumpyArray):
        try:
            value = value.tensor()
        except ValueError as error:
            raise CheckpointError(f"{where} {error}; save tensors") from error
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{where} is {type_words(value)}, not a tensor; save a plain state_dict")
    if value.is_meta:
        raise CheckpointError(f"{where} has no values (a meta tensor); save the state_dict of a network on a device")
    if name.endswith("sigma") and not isinstance(target, _LAZY) and _sides(value) == _sides(target):
        value = value.reshape(target.shape)
    if isinstance(target, _LAZY) or value.shape != target.shape:
        return value  # torch says what it makes of it
    if value.layout != torch.strided or value.is_quantized:
        try:
            value = value.dequantize() if value.is_quantized else value.to_dense()
        except (RuntimeError, NotImplementedError) as error:
            raise CheckpointError(f"{where} cannot be read as a dense tensor; save a plain state_dict") from error
        notes.append("sparse or quantized tensors were read as the dense ones they stand for")
    stored = value.untyped_storage().nbytes() // value.element_size()
    if value.numel() > stored + _EXPANDED:
        raise CheckpointError(f"{where} claims {value.numel():,} values and stores {stored:,}; save it again")
    if isinstance(target, nn.Parameter) and target.is_floating_point() and not value.is_floating_point():
        raise CheckpointError(
            f"{where} is {str(value.dtype).removeprefix('torch.')}, not floating point: a quantized weight without its "
            f"scale is no weight; save the network before it was quantized"
        )
    if value.is_complex() and not target.is_complex():
        raise CheckpointError(f"{where} is complex, the network's is real; save the weights it was trained with")
    return value


def _really_missing(missing: list[str], state: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> list[str]:
    """Without counters of batches, which no evaluation uses, and weights that are tied to one that is there."""
    present = {id(wanted[name]) for name in wanted.keys() & state.keys()}
    return [
        name for name in missing if not name.endswith("num_batches_tracked") and id(wanted.get(name)) not in present
    ]


def require_same_keys(model: nn.Module, state: Mapping[str, Any], what: str) -> None:
    """Raise CheckpointError with what is missing, unexpected or mis-shaped in `state`, if anything is."""
    want = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    missing = [key for key in want if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in want]
    shapes = [
        f"{printable(key)} is {tuple(state[key].shape)}, should be {tuple(want[key].shape)}"
        for key in want
        if isinstance(state.get(key), Tensor)
        and not isinstance(want[key], _LAZY)
        and state[key].shape != want[key].shape
        and not (key.endswith("sigma") and state[key].numel() == want[key].numel())
    ]
    _refuse(what, missing, unexpected, shapes)


def _refuse(what: str, missing: Collection[str], unexpected: Collection[str], shapes: Collection[str]) -> None:
    parts = [("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes)]
    found = [f"{len(keys)} {title}: {first(list(keys))}" for title, keys in parts if keys]
    if found:
        raise CheckpointError(f"{what}; {'; '.join(found)}")


def _require_finite(model: nn.Module, state: OrderedDict[str, Any], path: Path) -> None:
    """NaN nowhere; Inf only in buffers that are no statistics (a mask of minus infinity is a fair constant)."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name not in state or not value.is_floating_point():
            continue
        constant = not isinstance(value, nn.Parameter) and "running_" not in name
        if not (~torch.isnan(value) if constant else torch.isfinite(value)).all():
            raise CheckpointError(
                f"{path}: {printable(name)} holds NaN or Inf; the training diverged or the file is damaged"
            )
