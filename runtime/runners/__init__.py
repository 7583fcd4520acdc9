"""Engines behind one contract: `open_runner` picks by artefact."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import click
import msgspec

from gmconv.packages import require
from runtime import cuda
from runtime.artefact import Kind, artefact_kind
from runtime.manifest import Manifest
from runtime.runners.base import Runner, parse_device

_RUNNERS: dict[Kind, tuple[str, str]] = {
    "checkpoint": ("runtime.runners.torch", "TorchRunner"),
    "onnx": ("runtime.runners.onnxruntime", "OnnxRuntimeRunner"),
    "engine": ("runtime.runners.tensorrt", "TensorRTRunner"),
}


def open_runner(path: str | Path, device: str = "cpu", **options: Any) -> Runner:
    """Open an artefact on a device: a checkpoint in torch, ONNX in ONNX Runtime, an engine in TensorRT.

    `options` are fields of TorchOptions or OnnxRuntimeOptions, or keyword arguments of TensorRTRunner; None means not
    given. One that the artefact's runner does not have is refused, never ignored; but `foreign`, which is about
    checkpoints alone, may be given for any.

    Raises:
        RefusedError: the file is missing, foreign, damaged, or not the one its manifest describes.
        UnavailableError: the machine lacks what the device needs.
        click.UsageError: an option that makes no sense for this artefact.
    """
    path = Path(path)
    kind = artefact_kind(path)
    module, name = _RUNNERS[kind]
    runner: Any = getattr(importlib.import_module(module), name)
    accepted = getattr(runner, "Options", runner)
    given = {key: value for key, value in options.items() if value is not None}
    if kind != "checkpoint":
        given.pop("foreign", None)
    if unknown := sorted(given.keys() - inspect.signature(accepted).parameters.keys()):
        raise click.UsageError(f"{path.name} is {_A[kind]}: {', '.join(unknown)} does not apply to it")
    _refuse_values(path.name, get_type_hints(accepted.__init__, include_extras=True), given)
    opened: Runner = runner(path, device, **given) if accepted is runner else runner(path, device, accepted(**given))
    return opened


def refuse_device(path: Path, manifest: Manifest | None, device: str) -> None:
    """Raise UnavailableError, before an artefact is opened, where its runner has no such device on this machine."""
    if manifest is not None and artefact_kind(path) == "engine":
        from runtime.runners.engine import engine_gpu

        engine_gpu(path, manifest, device)
    elif device != "cpu":
        from runtime.runners.providers import PROVIDERS, require_provider

        require_provider(require("onnxruntime", "gpu"), PROVIDERS["cuda"])
        cuda.device_info(parse_device(device)[1])


def _refuse_values(artefact: str, types: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name in given.keys() - {"foreign"}:
        try:
            msgspec.convert(given[name], types[name])
        except msgspec.ValidationError as error:
            raise click.UsageError(f"{artefact}: {name}={given[name]!r}: {str(error).replace('`', '')}") from None


_A: dict[Kind, str] = {"checkpoint": "a checkpoint", "onnx": "an ONNX file", "engine": "a TensorRT engine"}
