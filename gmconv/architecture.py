"""From an architecture's name to a module: which factories a checkpoint may name, and which only a caller may."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from gmconv.errors import ArchitectureUnavailableError, CheckpointError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*")  # no ':' or '/': timm would fetch "hf-hub:..." from the network
# Arguments by which a factory would read another file or the network.
_FORBIDDEN = {
    "weights",
    "weights_backbone",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
}


def plain_kwargs(kwargs: Any, where: str) -> dict[str, Any]:
    """The factory's keyword arguments, refused unless they are plain values that load nothing.

    Raises:
        CheckpointError: not a dict of plain values, or an argument that would make the factory read weights.
    """
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        raise CheckpointError(f"{where}: its arch_kwargs are not a dict of keyword arguments")
    for key, value in kwargs.items():
        if key in _FORBIDDEN:
            raise CheckpointError(
                f"{where}: arch_kwargs may not set {key!r}; the weights come from the checkpoint alone"
            )
        if not _plain(value):
            raise CheckpointError(
                f"{where}: arch_kwargs[{key!r}] is a {type(value).__name__}; use numbers, strings and lists"
            )
    return dict(kwargs)


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def build(arch: str, kwargs: Mapping[str, Any], where: str, *, trusted: bool) -> nn.Module:
    """The plain network that `arch` names, freshly made.

    Args:
        arch: `"gmconv.models:NAME"` (or just `NAME`), `"torchvision.models:NAME"`, `"timm:NAME"`; with
            `trusted` also any `"package.module:factory"`.
        kwargs: keyword arguments of the factory.
        where: what to name in an error (the checkpoint's path).
        trusted: whether the user, not the file, chose `arch`.

    Raises:
        CheckpointError: unknown, or not allowed to a file.
        ArchitectureUnavailableError: the package is not installed.
    """
    namespace, _, name = arch.rpartition(":")
    namespace = namespace or "gmconv.models"
    if namespace in ("gmconv.models", "torchvision.models", "timm") and not _NAME.fullmatch(name):
        raise CheckpointError(f"{where}: {arch[:80]!r} is not an architecture name; write e.g. gmconv.models:resnet50")
    try:
        model = _make(namespace, name, dict(kwargs), where, arch, trusted)
    except CheckpointError as error:
        message = error.message
        raise CheckpointError(message if message.startswith(where) else f"{where}: {message}") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {arch} cannot be built with {dict(kwargs)} ({error})") from error
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"{where}: {arch} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _make(namespace: str, name: str, kwargs: dict[str, Any], where: str, arch: str, trusted: bool) -> object:
    if namespace == "gmconv.models":
        from gmconv import models

        masks = ("gmconv", "sigma", "sigma_per")  # what create() was told about masks is in the list of masked layers
        return models.create(name, gmconv=False, **{k: v for k, v in kwargs.items() if k not in masks})
    if namespace == "torchvision.models":
        zoo = _module("torchvision.models", arch, where)
        if name not in zoo.list_models():
            raise CheckpointError(
                f"{where}: torchvision.models has no network {name!r}; see torchvision.models.list_models()"
            )
        return zoo.get_model(name, weights=None, **kwargs)
    if namespace == "timm":
        zoo = _module("timm", arch, where)
        if not zoo.is_model(name):
            raise CheckpointError(f"{where}: timm has no network {name!r}; see timm.list_models()")
        return zoo.create_model(name, pretrained=False, **kwargs)
    if not trusted:
        raise CheckpointError(
            f"{where}: its architecture {arch[:80]!r} is outside gmconv.models, torchvision.models and timm; a file "
            f"may not choose code to run: if you trust it, say --arch {arch[:80]}"
        )
    factory = getattr(_module(namespace, arch, where), name, None)
    if not callable(factory):
        raise CheckpointError(f"{where}: {namespace} has no factory {name!r}; check --arch")
    return factory(**kwargs)


def _module(name: str, arch: str, where: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # a torchvision that does not match torch raises RuntimeError
        raise ArchitectureUnavailableError(
            f"{where}: its architecture {arch} needs the package {name.split('.')[0]}, which does not import here "
            f"({error}): pip install {name.split('.')[0]}"
        ) from error
