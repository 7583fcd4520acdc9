"""From a module that computes its kernel to a plain layer that holds it."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gmconv.constants.observe import SET_DATA, VALUES, Use
from gmconv.constants.operators import Product, kernel_call, product_operands
from gmconv.errors import BakeError, layer_words

_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_WRITES = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"})


def plain_layer(use: Use, weight: nn.Parameter) -> nn.Module:
    """The plain layer that makes the call `use` with `weight`. Raises BakeError where no plain layer can state it."""
    settings = dict(use.settings)
    if use.layer is Product:
        return Product(weight, settings["place"]).eval()
    if use.layer is nn.Linear:
        plain: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], False, device="meta")
    else:
        dims, groups = weight.dim() - 2, settings.pop("groups", 1)
        transposed = "Transpose" in use.layer.__name__
        per_group = weight.shape[0 if not transposed else 1] * (1 if not transposed else groups)
        ins, outs = (weight.shape[0], per_group) if transposed else (weight.shape[1] * groups, per_group)
        arguments = {name: _per_axis(value, dims) for name, value in settings.items()}
        mode = "zeros"
        if use.pads is not None:
            arguments["padding"], mode = _symmetric(use, arguments.get("padding")), use.pads[1]
        if transposed:
            plain = use.layer(ins, outs, tuple(weight.shape[2:]), groups=groups, bias=False, device="meta", **arguments)
        else:
            arguments["padding_mode"] = mode
            plain = use.layer(ins, outs, tuple(weight.shape[2:]), groups=groups, bias=False, device="meta", **arguments)
    plain.weight = weight
    if use.bias is not None and not use.bias_varies:
        plain.bias = use.bias if isinstance(use.bias, nn.Parameter) else nn.Parameter(use.bias, requires_grad=False)
    return plain.eval()


def _per_axis(value: Any, dims: int) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return (value,) * dims
    values = tuple(int(v) for v in value)
    return values * dims if len(values) == 1 else values


def _symmetric(use: Use, padding: Any) -> tuple[int, ...]:
    """The padding of a layer for the `F.pad` before the call. Raises BakeError where its sides differ."""
    assert use.pads is not None
    flat, _ = use.pads
    if any(flat[2 * i] != flat[2 * i + 1] for i in range(len(flat) // 2)) or (padding and any(padding)):
        raise BakeError(f"{layer_words(use.name)}: its padding is none that a plain layer states")
    return tuple(int(side) for side in reversed(flat[::2]))


def become(module: nn.Module, plain: nn.Module) -> None:
    """Make `module` the layer `plain`, in place: same object, same forward hooks, whatever points at it."""
    hooks = {name: module.__dict__[name] for name in _HOOKS if name in module.__dict__}
    module.__dict__.clear()
    module.__dict__.update(plain.__dict__)
    module.__dict__.update(hooks)
    module.__class__ = type(plain)


def redirect(
    module: nn.Module,
    layers: Mapping[int, nn.Module],
    values: Sequence[Any],
    stems: Mapping[int, str] = MappingProxyType({}),
    *,
    frozen: bool = False,
) -> dict[int, str]:
    """Keep the forward of `module`, but have its calls numbered in `layers` made by those layers, its new children.

    They are called `baked_0`, ..., or `STEM_0` by `stems`. With `frozen`, what the forward writes into parameters and
    buffers goes nowhere: no kernel is made from it any more, and a traced forward may not write.

    `values` are what tensors, all of them constants, give Python in a forward: it is told them again, since where a
    forward is traced tensors have no values. Returns the children's names in `module`, by number.
    """
    names: dict[int, str] = {}
    for number, layer in layers.items():
        name = f"{stems.get(number, 'baked')}_{len(names)}"
        while hasattr(module, name):
            name += "_"
        names[number] = name
        module.add_module(name, layer)
    original = module.__dict__.pop("forward", None)
    cls = type(module)
    kept = cls.forward if original is None else original

    @functools.wraps(kept)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Redirect(self, names, values, frozen=frozen):
            return kept(*args, **kwargs) if original is not None else kept(self, *args, **kwargs)

    if original is not None:  # it takes no self, and torch.export reads what a forward takes
        with contextlib.suppress(ValueError):  # of a forward that is no Python
            own = inspect.signature(original)
            first = inspect.Parameter("_", inspect.Parameter.POSITIONAL_ONLY)
            forward.__signature__ = own.replace(parameters=[first, *own.parameters.values()])  # type: ignore[attr-defined]
    body = {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    module.__class__ = type(cls.__name__, (cls,), body)
    return names


class _Redirect(TorchFunctionMode):
    """Counts the kernel operators that run inside a forward, and has the chosen ones made by a child layer."""

    active: list[_Redirect] = []  # noqa: RUF012 (one stack, as torch keeps one of modes)

    def __init__(self, module: nn.Module, names: Mapping[int, str], values: Sequence[Any], *, frozen: bool) -> None:
        super().__init__()
        self.module, self.names, self.count = module, names, -1
        self.values, self.told = values, 0
        self.kept = {id(t): t for t in (*module.parameters(), *module.buffers())} if frozen else {}

    def __enter__(self) -> Any:
        self.active.append(self)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exc: Any) -> None:
        self.active.remove(self)
        super().__exit__(*exc)  # type: ignore[no-untyped-call]

    def _tell(self) -> Any:
        told = self.told
        for mode in self.active:  # those around it do not see the call
            mode.told += 1
        return copy.copy(self.values[told])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in VALUES and self.told < len(self.values):
            return self._tell()
        if self.kept and args and id(args[0]) in self.kept:
            if func == SET_DATA:
                return None
            if func == _GET_DATA:
                return args[0].detach().clone()
            if name in _WRITES or (name.endswith("_") and not name.endswith("__")):
                return func(args[0].detach().clone(), *args[1:], **(kwargs or {}))
        call = kernel_call(func, args, kwargs)
        if call is None and product_operands(func, args, kwargs) is None:
            return func(*args, **(kwargs or {}))
        self.count += 1
        child = self.names.get(self.count)
        if child is None:
            return func(*args, **(kwargs or {}))
        layer: Any = getattr(self.module, child)
        if call is None:
            return layer.call(func, args, kwargs)
        if call.bias is None or layer.bias is not None:
            return layer(call.input)
        if isinstance(layer, nn.Linear):  # a bias that varies
            return torch.nn.functional.linear(call.input, layer.weight, call.bias)
        convolved: Tensor = layer._conv_forward(call.input, layer.weight, call.bias)
        return convolved
