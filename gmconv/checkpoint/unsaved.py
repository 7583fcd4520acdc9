"""Trained tensors that a network uses and that none of its checkpoints can hold, as no module registered them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from types import FunctionType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gmconv.errors import RefusedError

_DEEPEST = 4  # lists in dicts in functions ...


class saved_alone(TorchFunctionMode):  # noqa: N801 (a context manager)
    """Refuse, at the end of the block, a network that computed with a trainable tensor of no module.

    A layer in a plain list, a parameter in a dict or in a function is trained with the others if the training script
    says so, and is missing from the state_dict all the same: what is loaded then has the factory's random values.

    Raises RefusedError, with the tensors' names.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._known = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._used: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            trained = isinstance(value, Tensor) and value.requires_grad and value.is_leaf
            if trained and (storage := _storage(value)) not in self._known:
                self._used.setdefault(storage, value)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if error is not None or not self._used:
            return
        places = dict(_tensors(self._model))
        names = [places.get(at, f"a tensor {tuple(tensor.shape)}") for at, tensor in self._used.items()]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise RefusedError(
            f"{', '.join(names[:3])}{more}: the network computes with what its state_dict does not hold, so the "
            f"checkpoint lacks it and it is as random as its factory made it; register it (nn.ModuleList, "
            f"nn.ParameterList, a module's own attribute) and save again, or hand the trained network itself to "
            f"gmconv.deploy"
        )


def _storage(tensor: Tensor) -> int:
    """What a tensor shares with its views."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _tensors(model: nn.Module) -> Iterator[tuple[int, str]]:
    """The tensors that a network's modules hold in containers and functions, by storage, with the way to them."""
    seen = set(map(id, model.modules()))
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                yield from _within(value, f"{name}.{key}".lstrip("."), seen, 0)


def _within(value: Any, place: str, seen: set[int], depth: int) -> Iterator[tuple[int, str]]:
    if isinstance(value, Tensor):
        yield _storage(value), place
        return
    if id(value) in seen or depth > _DEEPEST:
        return
    if isinstance(value, nn.Module):
        yield from ((_storage(tensor), f"{place}.{name}") for name, tensor in value.named_parameters())
        yield from ((at, f"{place}.{name}") for at, name in _tensors(value))
        return
    seen.add(id(value))
    inner: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        inner = [(f"{place}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        inner = [(f"{place}[{index}]", item) for index, item in enumerate(value)]
    elif isinstance(value, functools.partial):
        inner = [(place, item) for item in (value.func, *value.args, *value.keywords.values())]
    elif isinstance(value, FunctionType):
        inner = [(place, item) for item in (*_enclosed(value), *(value.__defaults__ or ()))]
    for where, item in inner:
        yield from _within(item, where, seen, depth + 1)


def _enclosed(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not set yet
            yield cell.cell_contents
