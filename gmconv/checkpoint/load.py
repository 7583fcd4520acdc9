"""Checkpoints: writing one, and reading one of ours or of anybody's training script.

Always `weights_only=True`: nothing in a file may run code. Architecture factories come from three namespaces
(`gmconv.models:NAME`, `torchvision:NAME`, `timm:NAME`) unless the caller, not the file, names another.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import msgspec
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gmconv.architecture import build, plain_kwargs
from gmconv.checkpoint.file import read_file
from gmconv.checkpoint.fill import fill, put_masks, require_same_keys
from gmconv.checkpoint.names import plain_values
from gmconv.errors import (
    ArchitectureUnsaidError,
    CheckpointError,
    InputsUnsaidError,
    RefusedError,
    printable,
    type_words,
)
from gmconv.files import file_named, replacing, unwritable
from gmconv.foreign import DTYPES, OTHERWISE, labels_of, preprocessing_of, sizing
from gmconv.inputs import Input, in_order
from gmconv.preprocessing import Preprocessing, differences, read_preprocessing
from gmconv.surgery import masked_layers, network_within, refuse_valueless, require_module

SCHEMA = "gmconv-deploy.checkpoint/v1"
_LARGEST_INPUT = 2**28  # elements of one sample: a gigabyte


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A trained network and what is known of it.

    `model` is live (masks computed in forward), in eval mode, on the CPU, float32 (float64 where all weights were
    stored so). `inputs` are what its forward takes, `input_shape` the `(C, H, W)` of the first image among them, None
    where there is none. `preprocessing` has the fields of `gmconv.preprocessing.Preprocessing`. `notes` says what was
    read between the lines of a foreign file, `warnings` what was assumed or told of it and may be wrong. `sha256` is of
    the file's bytes.
    """

    model: nn.Module
    arch: str
    arch_kwargs: dict[str, Any]
    input_shape: tuple[int, int, int] | None
    inputs: tuple[Input, ...]
    masked: dict[str, str]
    sha256: str
    preprocessing: dict[str, Any] | None = None
    labels: tuple[str, ...] | None = None
    dataset: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Facts(TypedDict, total=False):
    """What a checkpoint of ours may say besides its network.

    `preprocessing`: fields of `gmconv.preprocessing.Preprocessing`. `labels`: class names in the order of the logits,
    or the file that has them one a line.
    `dataset`: how to find the data it was trained on, e.g. `{"name": "digits", "test_size": 0.2, "split_seed": 0}`.
    `training`: anything worth keeping (epochs, accuracy, seed). `inputs`: of a network that takes several, or no image,
    `(name, shape of one sample, dtype)` of each, by its forward's names.
    """

    preprocessing: Mapping[str, Any] | None
    labels: Sequence[str] | str | Path | None
    dataset: Mapping[str, Any] | None
    training: Mapping[str, Any] | None
    inputs: Sequence[tuple[str, Sequence[int], str]] | None


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    arch: str,
    input_shape: tuple[int, int, int] | None,
    arch_kwargs: Mapping[str, Any] | None = None,
    **facts: Unpack[Facts],
) -> None:
    """Write one file that `load_checkpoint` turns back into this model; atomic.

    Args:
        path: of the file, usually `*.pt`.
        model: live (its GMConv2d layers are recorded by name) or plain; out of `torch.compile` and the like.
        arch: `"gmconv.models:resnet20"`, `"torchvision:NAME"`, `"timm:NAME"`, or
            `"package.module:factory"`, which `load_checkpoint` accepts only with `arch=` (`--arch`) said again: a file
            may not choose code to run.
        input_shape: `(C, H, W)` of one image; None where the network takes none, which `inputs` tells then.
        arch_kwargs: keyword arguments of the factory (plain values).
        facts: see `Facts`.

    Raises:
        CheckpointError: the architecture does not rebuild this model, or the file cannot be written.
        UnavailableError: the disk is full.
        RefusedError: labels that are none, or a network without values (lazy, or on the meta device).
        TypeError: a fact that there is not.
    """
    if unknown := sorted(facts.keys() - Facts.__annotations__.keys()):
        raise TypeError(f"save_checkpoint takes no {unknown[0]!r}; it takes {', '.join(Facts.__annotations__)}")
    require_module(model, "save_checkpoint")
    model = network_within(model)
    refuse_valueless(model)
    path = file_named(path, "save_checkpoint: path")
    kwargs = plain_kwargs(arch_kwargs or {}, str(path))
    masked: dict[str, str] = {name: layer.sigma_per for name, layer in masked_layers(model).items()}
    state = model.state_dict()
    for key, value in state.items():
        state[key] = value.detach() if isinstance(value, Tensor) else value
    record = {
        "schema": SCHEMA,
        "arch": arch,
        "arch_kwargs": kwargs,
        "masked": masked,
        "input_shape": None if input_shape is None and facts.get("inputs") else _input_shape(input_shape, str(path)),
        "preprocessing": dict(facts.get("preprocessing") or {}) or None,
        "dataset": dict(facts.get("dataset") or {}) or None,
        "training": dict(facts.get("training") or {}) or None,
        "labels": list(labels_of(facts.get("labels")) or ()) or None,
        "inputs": [[name, list(shape), dtype] for name, shape, dtype in facts.get("inputs") or ()] or None,
        "state_dict": state,
    }
    rebuilt = build(arch, kwargs, str(path), trusted=True)
    put_masks(rebuilt, masked, str(path), arch)
    require_same_keys(rebuilt, state, f"{path}: {arch} with {kwargs} does not rebuild this model")
    try:
        with replacing(path) as stream:
            torch.save(record, stream)
    except RefusedError as error:
        raise CheckpointError(error.message) from error
    except (OSError, RuntimeError) as error:
        raise unwritable(path, error, refused=CheckpointError) from error


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    preprocessing: Mapping[str, Any] | str | Path | None = None,
    labels: Sequence[str] | str | Path | None = None,
    inputs: Sequence[Sequence[Any]] | None = None,
    weights: str | None = None,
) -> Checkpoint:
    """Read a checkpoint of ours, or a foreign state_dict when `arch` says what it belongs to.

    The network is built by its factory and filled by torch's own `load_state_dict`, so what is loaded is what a
    training script loads. Foreign files may wrap the state_dict at any depth, prefix its keys (`module.`, Lightning's
    `model.`, wrappers of FSDP, `torch.compile` and activation checkpoints), be on CUDA, in half or another precision,
    compressed, or `.safetensors`. A `sigma` beside the 4-d weight of a plain `nn.Conv2d` is read as GMConv2d's.

    Args:
        path: the file.
        arch: overrides the file's own; any `package.module:factory`, because the caller is trusted and the file is not.
        num_classes: passed to the factory.
        input_shape: `(C, H, W)`, for files that do not know it.
        preprocessing: fields of `gmconv.preprocessing.Preprocessing`, or a JSON file of them: these alone are other
            than the file says, and a warning says so where it says something.
        labels: class names, or the file that has them one a line, for files that do not know them.
        inputs: of a network that takes several, or no image: `(name, shape of one sample, dtype)` of each, by its
            forward's names.
        weights: which of a file's weights, by key or dotted path (`"state_dict_ema"`, `"ema.module"`) or any part of
            it that only one has; None: the raw ones, not an average of them.

    Raises:
        CheckpointError: the file is missing, damaged, holds code, NaN or Inf, or does not fit its architecture.
        RefusedError: `labels` or `preprocessing` are none.
        ArchitectureUnavailableError: the architecture's package is not installed.
    """
    path = file_named(path, "load_checkpoint: path")
    raw = read_file(path)
    ours = raw.get("schema") == SCHEMA
    if str(raw.get("schema")).startswith("gmconv-deploy.training/"):
        raise CheckpointError(
            f"{path}: is the state of a training run, for gmconv train --resume; the network to deploy is in the file "
            f"without .last"
        )
    if not ours and isinstance(raw.get("schema"), str):
        raise CheckpointError(
            f"{path}: schema {printable(raw['schema'])!r} is unknown here; this version reads {SCHEMA!r}"
        )
    facts = _facts(raw if ours else {}, path)
    kwargs = plain_kwargs(facts["arch_kwargs"] or {}, str(path))
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    name, shape, inputs = arch or facts["arch"], input_shape or facts["input_shape"], inputs or facts["inputs"]
    if not isinstance(name, str):
        takes = (
            "" if inputs or shape else " and --input-shape C,H,W of one image (or --input NAME:SHAPE for each input)"
        )
        raise ArchitectureUnsaidError(f"{path}: does not say its architecture; give --arch NAME{takes}")
    given, shape = _inputs(shape, inputs, input_shape, str(path))
    if ours:
        _require_small(raw, name, kwargs, path, trusted=arch is not None)
    model = build(name, kwargs, str(path), trusted=arch is not None).cpu()
    masked, notes, warnings = fill(model, raw, path, name, recorded=facts["masked"], weights=weights)
    model.eval()  # by itself, as an override of train() may return nothing
    prepared, doubts = _preprocessing(preprocessing, shape, facts["preprocessing"], reshaped=input_shape is not None)
    sized = () if facts["preprocessing"] else sizing(preprocessing, prepared)
    return Checkpoint(
        model=model,
        arch=name,
        arch_kwargs=kwargs,
        input_shape=shape,
        inputs=in_order(model, given),
        masked=masked,
        sha256=_sha256(path),
        preprocessing=prepared,
        labels=labels_of(labels) or tuple(facts["labels"] or ()) or None,
        dataset=facts["dataset"],
        training=facts["training"],
        notes=(*notes, *sized),
        warnings=(*warnings, *doubts),
    )


def _preprocessing(
    given: Mapping[str, Any] | str | Path | None,
    shape: tuple[int, int, int] | None,
    own: dict[str, Any] | None,
    *,
    reshaped: bool,
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """What is `given` and, for the rest, the file's `own`, and where they contradict each other. Raises RefusedError.

    `reshaped`: the caller gave the size of the images.
    """
    try:
        recorded = read_preprocessing(own)
    except RefusedError:  # replaced, or told to whoever needs it
        recorded = None
    if recorded is not None and shape is not None and reshaped:
        recorded = replace(recorded, size=shape[1:])
    found = preprocessing_of(given, shape, recorded)
    if found is None or recorded is None:
        return found or own, ()
    changed = differences(msgspec.convert(found, Preprocessing), recorded)
    return found, (OTHERWISE + changed,) * bool(changed)


_FACTS = ("arch", "arch_kwargs", "input_shape", "masked", *Facts.__annotations__)


def _facts(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a file of ours says besides its weights, refused unless it is plain and short."""
    facts = {key: raw.get(key) for key in _FACTS}
    if not plain_values(facts.values()):
        raise CheckpointError(f"{path}: holds more than a description of a network; save it again")
    for key in ("preprocessing", "dataset", "training"):
        if facts[key] is not None and not isinstance(facts[key], dict):
            raise CheckpointError(f"{path}: its {key} is {type_words(facts[key])}, not a dict; save it again")
    labels = facts["labels"]
    if labels is not None and not (
        isinstance(labels, list | tuple) and all(isinstance(item, str) and item.isprintable() for item in labels)
    ):
        raise CheckpointError(f"{path}: its labels are not a list of strings; save it again")
    inputs = facts["inputs"]
    if inputs is not None and not (isinstance(inputs, list | tuple) and all(map(_is_input, inputs))):
        raise CheckpointError(f"{path}: its inputs are not a list of (name, shape, dtype); save it again")
    return facts


def _is_input(value: Any) -> bool:
    if not (isinstance(value, list | tuple) and len(value) == 3 and isinstance(value[1], list | tuple)):
        return False
    name, shape, dtype = value
    sizes = [size for size in shape if type(size) is int and 0 < size < 65536]
    known = isinstance(name, str) and name.isprintable() and dtype in DTYPES
    return known and len(sizes) == len(shape) <= 8 and math.prod(sizes) <= _LARGEST_INPUT


class _Unfilled(TorchFunctionMode):
    """Skips random fills: meta tensors hold no values, and torch's Python for filling them takes 1.5 s to import."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _require_small(raw: Mapping[str, Any], arch: str, kwargs: dict[str, Any], path: Path, *, trusted: bool) -> None:
    """Refuse a file that names a network larger than its weights, before that network takes memory."""
    try:
        with torch.device("meta"), _Unfilled():
            skeleton = build(arch, kwargs, str(path), trusted=trusted)
    except CheckpointError:
        return  # what is wrong with it is said when it is built for real; a constructor that computes is not
    held = sum(value.untyped_storage().nbytes() for value in (raw.get("state_dict") or {}).values() if _dense(value))
    needed = sum(parameter.numel() for parameter in skeleton.parameters())
    if needed > held + 2**20:  # bytes held for each number needed: one at least
        raise CheckpointError(
            f"{path}: {arch} with {kwargs} has {needed:,} parameters, more than the file holds; save it again"
        )


def _dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def _inputs(
    shape: Any, inputs: Sequence[Sequence[Any]] | None, said: Sequence[int] | None, where: str
) -> tuple[list[Input], tuple[int, int, int] | None]:
    """What the network takes, and (C, H, W) of the first image; `said`: the shape that the caller gave. Or refused."""
    if not inputs and shape is None:
        raise InputsUnsaidError(
            f"{where}: does not say what it takes; give --input-shape C,H,W of one image, or --input "
            f"NAME:SHAPE[:DTYPE] for each input"
        )
    if not inputs:
        shape = _input_shape(shape, where)
        return [Input("input", shape)], shape
    given = [Input(str(name), tuple(size), str(dtype)) for name, size, dtype in inputs]
    image = next((one.shape for one in given if one.is_image), None)
    if said is not None and image != tuple(said):
        takes = ", ".join(f"{one.name} {'x'.join(map(str, one.shape))}" for one in given)
        raise CheckpointError(
            f"{where}: --input-shape {','.join(map(str, said))} is none of its inputs ({takes}): leave it out, or give "
            f"each input as --input NAME:SHAPE[:DTYPE]"
        )
    return given, None if image is None else _input_shape(image, where)


def _input_shape(shape: Any, where: str) -> tuple[int, int, int]:
    if (
        isinstance(shape, list | tuple)
        and len(shape) == 3
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 65536 for n in shape)
    ):
        if math.prod(shape) > _LARGEST_INPUT:
            raise CheckpointError(f"{where}: an input of {shape} takes gigabytes for one sample; give --input-shape")
        return (shape[0], shape[1], shape[2])
    raise CheckpointError(
        f"{where}: input shape {str(shape)[:80]} is not C,H,W in pixels; an input that is no image is told as --input "
        f"NAME:SHAPE[:DTYPE]"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
