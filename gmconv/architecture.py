"""From an architecture's name to a module: which factories a checkpoint may name, and which only a caller may."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from gmconv.errors import ArchitectureUnavailableError, CheckpointError, type_words
from gmconv.packages import find_own, pip
from gmconv.surgery import SCRIPT, network_within

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*")  # no ':' or '/': timm would fetch "hf-hub:..." from the network
_PUBLISHED = ("timm", "torchvision")  # zoos that pip can install; of any other name it might install a stranger's
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
                f"{where}: arch_kwargs[{key!r}] is {type_words(value)}; use numbers, strings and lists"
            )
    return dict(kwargs)


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def build(arch: str, kwargs: Mapping[str, Any], where: str, *, trusted: bool) -> nn.Module:
    """The plain network that `arch` names, freshly made.

    Args:
        arch: `"gmconv.models:NAME"` (or just `NAME`), `"torchvision:NAME"`, `"timm:NAME"`; with
            `trusted` also any `"package.module:factory"`.
        kwargs: keyword arguments of the factory.
        where: what to name in an error (the checkpoint's path).
        trusted: whether the user, not the file, chose `arch`.

    Raises:
        CheckpointError: unknown, or not allowed to a file.
        ArchitectureUnavailableError: the package is not installed.
    """
    namespace, _, name = arch.rpartition(":")
    namespace = {"": "gmconv.models", "torchvision": "torchvision.models"}.get(namespace, namespace)
    if namespace in ("gmconv.models", "torchvision.models", "timm") and not _NAME.fullmatch(name):
        raise CheckpointError(f"{where}: {arch[:80]!r} is not an architecture name; write e.g. gmconv.models:resnet50")
    with _offline() as attempts:
        try:
            model = _make(namespace, name, dict(kwargs), where, arch, trusted)
        except (ArchitectureUnavailableError, KeyboardInterrupt):
            raise
        except BaseException as error:  # a factory is somebody's own code
            if attempts:
                raise CheckpointError(
                    f"{where}: {arch} wants to download something from {attempts[0]}; the weights come from the "
                    f"checkpoint alone: build it without (weights=None, pretrained=False)"
                ) from error
            if isinstance(error, click.ClickException):  # a sentence already
                message = error.message
                raise CheckpointError(message if message.startswith(where) else f"{where}: {message}") from error
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise CheckpointError(f"{where}: {arch} cannot be built with {dict(kwargs)} ({reason})") from error
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"{where}: {arch} returned {type_words(model)}, not a torch.nn.Module")
    model = network_within(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise CheckpointError(f"{where}: what {arch} returned {SCRIPT}")
    asked = torch.get_default_device().type == "meta"  # by who wants to know its size alone
    if not asked and (empty := [name for name, parameter in model.named_parameters() if parameter.is_meta]):
        raise CheckpointError(f"{where}: {arch} makes {empty[0]!r} on the meta device, where nothing can be loaded")
    return model


def factory_keywords(arch: str, where: str) -> set[str]:
    """Which keywords the user's own factory `"package.module:factory"` takes, the usual ones where it takes any.

    Raises CheckpointError, ArchitectureUnavailableError.
    """
    factory = _own_factory(*arch.rpartition(":")[::2], where, arch)
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # of a class written in C
        return set()
    names = {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    return names | ({"num_classes"} if any(one.kind == one.VAR_KEYWORD for one in parameters) else set())


def _make(namespace: str, name: str, kwargs: dict[str, Any], where: str, arch: str, trusted: bool) -> object:
    if namespace == "gmconv.models":
        from gmconv import models

        if trusted and name not in models.list():
            _refuse_module(name, where)
        masks = ("gmconv", "sigma", "sigma_per")  # what create() was told about masks is in the list of masked layers
        return models.create(name, gmconv=False, **{k: v for k, v in kwargs.items() if k not in masks})
    if namespace == "torchvision.models":
        zoo = _module("torchvision.models", arch, where)
        if name not in zoo.list_models():
            raise CheckpointError(
                f"{where}: torchvision has no network {name!r}; {_close(name, zoo.list_models(), 'torchvision:')}"
            )
        builder = inspect.signature(zoo.get_model_builder(name)).parameters
        none = {key: None for key in ("weights", "weights_backbone") if key in builder}
        return zoo.get_model(name, **none, **kwargs)
    if namespace == "timm":
        zoo = _module("timm", arch, where)
        if not zoo.is_model(name):
            raise CheckpointError(f"{where}: timm has no network {name!r}; {_close(name, zoo.list_models(), 'timm:')}")
        return zoo.create_model(name, pretrained=False, **kwargs)
    if not trusted:
        raise CheckpointError(
            f"{where}: its architecture {arch[:80]!r} is outside gmconv.models, torchvision.models and timm; a file "
            f"may not choose code to run: if you trust it, say --arch {arch[:80]} (in Python: arch={arch[:80]!r})"
        )
    factory = _own_factory(namespace, name, where, arch)
    with contextlib.chdir("."):  # as hydra does it, a factory may leave another one behind
        return factory(**kwargs)


def _refuse_module(name: str, where: str) -> None:
    """Where a name without a colon is no network of the zoo, and is a module that can be imported."""
    find_own(name, "make", where)
    package, *rest = name.split(".")
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(package)  # of a module in it this would import the package
        files = [Path(place, *rest) for place in (spec and spec.submodule_search_locations) or ()]
        if spec and (not rest or any(file.is_dir() or file.with_suffix(".py").is_file() for file in files)):
            raise CheckpointError(
                f"{where}: gmconv.models has no network {name!r}; did you mean a factory of your own, {name}:make?"
            )


def _own_factory(namespace: str, name: str, where: str, arch: str) -> Callable[..., object]:
    if namespace == "__main__":
        raise CheckpointError(
            f"{where}: {arch} is in a notebook or a script, which no other program can import: put it into a module, "
            f"or hand the network itself to gmconv.deploy"
        )
    find_own(namespace, name, where)
    with contextlib.chdir("."):
        module = _module(namespace, arch, where)
    factory = getattr(module, name, None)
    if not callable(factory):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise CheckpointError(f"{where}: {namespace} has no factory {name!r}; {_close(name, own, f'{namespace}:')}")
    if isinstance(factory, nn.Module):
        raise CheckpointError(f"{where}: {arch} is a network, not a factory: name a function or class that makes one")
    return factory  # type: ignore[no-any-return]


def _module(name: str, arch: str, where: str) -> Any:
    try:
        return importlib.import_module(name)
    except SystemExit as error:
        raise CheckpointError(
            f"{where}: {name} ends the program when it is imported; put what it does under if __name__ == '__main__'"
        ) from error
    except (ImportError, RuntimeError) as error:  # a torchvision that does not match torch raises RuntimeError
        package, lacking = name.split(".")[0], getattr(error, "name", None) or ""
        kind: type[ArchitectureUnavailableError | CheckpointError]
        if lacking and f"{name}.".startswith(f"{lacking}."):
            zoo = difflib.get_close_matches(package, _PUBLISHED, n=1)
            advice = pip(package) if package in _PUBLISHED else _whereabouts(lacking, arch)
            advice = f"did you mean {zoo[0]}:{arch.rpartition(':')[2]}?" if zoo and zoo[0] != package else advice
            why = f"there is no module {lacking}"
            kind = ArchitectureUnavailableError if package in _PUBLISHED else CheckpointError  # a name, as it was given
        else:
            advice, why = "mend that first", f"{package} is there and does not import ({error})"
            kind = ArchitectureUnavailableError
        raise kind(f"{where}: its architecture {arch} needs {name}, and {why}: {advice}") from error


def _whereabouts(lacking: str, arch: str) -> str:
    """Where a module of one's own may be that is not there: under a near name beside it, or below src."""
    parent, _, leaf = lacking.rpartition(".")
    here = Path.cwd()
    places = list(getattr(sys.modules.get(parent), "__path__", ())) if parent else [str(here), str(here / "src")]
    found = [module.name for module in pkgutil.iter_modules(places)]
    if not parent and leaf in found:
        return f"it lies in {here / 'src'}: set PYTHONPATH=src, or install the package (pip install -e .)"
    if near := difflib.get_close_matches(leaf, found, n=1):
        return f"did you mean {lacking[: len(lacking) - len(leaf)]}{near[0]}{arch[len(lacking) :]}?"
    return "it is looked for here and on Python's path (PYTHONPATH)"


def _close(name: str, known: Sequence[str], prefix: str) -> str:
    """Names that are spelt alike, or a few of those there are."""
    close = difflib.get_close_matches(name.lower(), known, n=3)
    if close:
        return f"did you mean {' or '.join(prefix + one for one in close)}?"
    return f"it has {', '.join(known[:8])}{', …' if len(known) > 8 else ''}" if known else "it has none"


class _Attempt(Exception):  # noqa: N818 (not an OSError: libraries take those for a bad connection and try again)
    """Raised inside a factory that opens a connection."""


_watched = threading.local()


def _refuse_connections(event: str, args: tuple[Any, ...]) -> None:
    attempts: list[str] | None = getattr(_watched, "attempts", None)
    if attempts is None or event not in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect"):
        return
    host = args[1] if event == "socket.connect" else args[0]
    if isinstance(host, tuple):
        host = host[0]
    elif event == "socket.connect":
        return  # a path: a socket of this machine
    attempts.append(str(host)[:80])
    raise _Attempt(f"nothing here touches the network; {host} was asked for")


@contextlib.contextmanager
def _offline() -> Iterator[list[str]]:
    """Refuse this thread every connection to a host meanwhile; yields the hosts it asked for."""
    if not getattr(_offline, "hooked", False):
        sys.addaudithook(_refuse_connections)  # one for the process: hooks cannot be taken off
        _offline.hooked = True  # type: ignore[attr-defined]
    before = getattr(_watched, "attempts", None)
    _watched.attempts = [] if before is None else before
    try:
        yield _watched.attempts
    finally:
        _watched.attempts = before
