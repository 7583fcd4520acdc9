"""Factories by name: what `gmconv.models.create` looks up."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

Factory = Callable[..., nn.Module]

_FACTORIES: dict[str, Factory] = {}


def register(build: Factory) -> Factory:
    """Make a function that builds a plain network a factory of this zoo, under the function's name.

    The factory takes the builder's keywords and `gmconv` (True: every Conv2d larger than 1x1 becomes a GMConv2d),
    `sigma` (initial value, taps) and `sigma_per` ("layer" or "channel").
    """

    @functools.wraps(build)
    def factory(gmconv: bool = True, *, sigma: float = 5.0, sigma_per: str = "layer", **options: Any) -> nn.Module:
        network = build(**options)
        if not gmconv:
            return network
        from gmconv.surgery import convert

        return convert(network, sigma=sigma, sigma_per=sigma_per, inplace=True)  # type: ignore[arg-type]

    keywords = [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(build).parameters.values()]
    own = [p for p in inspect.signature(factory, follow_wrapped=False).parameters.values() if p.name != "options"]
    factory.__signature__ = inspect.Signature(own + keywords)  # type: ignore[attr-defined]
    _FACTORIES[build.__name__] = factory
    return factory


def names() -> list[str]:
    """Every registered name, sorted."""
    return sorted(_FACTORIES)


def create(name: str, gmconv: bool = True, **kwargs: Any) -> nn.Module:
    """A freshly initialised network of the zoo, in train mode.

    `gmconv=False` gives the plain twin: the same parameters without the sigmas. Keywords of every network:
    `num_classes`, `in_channels`, `sigma` (initial value, taps), `sigma_per` ("layer" or "channel"); the CIFAR ResNets
    also take `kernel_size`.

    Raises CheckpointError for a name or keyword the zoo does not have, or a value out of range.
    """
    from gmconv.errors import CheckpointError

    factory = _FACTORIES.get(name)
    if factory is None:
        package, dot, own = str(name).rpartition(".")
        if dot:
            raise CheckpointError(f"gmconv.models has no network {str(name)[:80]!r}; did you mean {package}:{own}?")
        close = difflib.get_close_matches(str(name).lower(), _FACTORIES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names())}"
        raise CheckpointError(f"gmconv.models has no network {str(name)[:80]!r}; {hint}")
    accepted = inspect.signature(factory).parameters
    unknown = [keyword for keyword in kwargs if keyword not in accepted]
    if unknown:
        raise CheckpointError(f"{name} takes no {', '.join(unknown)}; its keywords are {', '.join(accepted)}")
    try:
        return factory(gmconv=gmconv, **kwargs)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name} cannot be built with {kwargs}: {error}") from error


def check_sizes(num_classes: int, in_channels: int) -> None:
    """Raise ValueError unless both are positive integers (a checkpoint's arch_kwargs come from a file)."""
    for label, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{label} must be a positive integer, not {value!r}")
