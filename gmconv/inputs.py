"""What a network takes: one image, or several tensors by the names of its forward's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from gmconv.errors import RefusedError

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True)
class Arguments:
    """Tensors by name, in the order of the forward's arguments; those named in `keywords` go by keyword."""

    tensors: dict[str, Tensor]
    keywords: tuple[str, ...] = ()

    def call(self, model: nn.Module, device: torch.device | None = None) -> Any:
        """What `model` returns for them."""
        moved = {name: tensor if device is None else tensor.to(device) for name, tensor in self.tensors.items()}
        positional = [tensor for name, tensor in moved.items() if name not in self.keywords]
        return model(*positional, **{name: moved[name] for name in self.keywords})


def arguments_of(model: nn.Module, examples: Any) -> Arguments:
    """Examples as `Arguments`: a tensor (named "input"), a list or tuple of tensors, or a dict of arguments.

    Raises RefusedError when they are no tensors, or not arguments of the forward.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    if isinstance(examples, Mapping):
        known = [parameter.name for parameter in parameters]
        unknown = [str(name) for name in examples if name not in known]
        if unknown and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            raise RefusedError(f"the network's forward takes {', '.join(known)}; there is no {unknown[0]!r}")
        order = [name for name in known if name in examples] + unknown
        tensors = {name: _tensor(name, examples[name]) for name in order}
        pairs = zip(parameters, order, strict=False)
        positional = len(list(takewhile(lambda pair: pair[0].name == pair[1] and pair[0].kind in _POSITIONAL, pairs)))
        return Arguments(tensors, tuple(order[positional:]))
    given: Sequence[Any] = examples if isinstance(examples, list | tuple) else [examples]
    if not given:
        raise RefusedError("no example was given; pass a tensor, or a tuple with one for each argument")
    names = [parameter.name for parameter in parameters if parameter.kind in _POSITIONAL]
    names += [f"input_{index}" for index in range(len(names), len(given))]
    chosen = ["input"] if len(given) == 1 else names[: len(given)]
    return Arguments({name: _tensor(name, value) for name, value in zip(chosen, given, strict=True)})


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "__array__"):
        return torch.as_tensor(value)
    raise RefusedError(f"example {name!r} is a {type(value).__name__}; pass tensors, one batch of each input")
