"""Running a float32 network in float64, whatever its forward does with dtypes: the yardstick of every proof."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_STRICT = ("conv", "linear", "bilinear", "scaled_dot_product_attention", "multi_head_attention_forward")
_WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operators compute in float64 what they would in float32; what they write to takes the rounded result."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # True would import torch._dynamo, which takes seconds
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is None or (schema.returns and all(_views(value) for value in schema.returns)):
            return func(*args, **kwargs)
        wide = tree_map(_widened, args)
        made = func(*wide, **tree_map(_widened, kwargs))
        for index, argument in enumerate(schema.arguments[: len(args)]):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and wide[index] is not args[index]:
                args[index].copy_(wide[index])
                made = args[index] if made is wide[index] else made
        return made


class _Functions(TorchFunctionMode):
    """Widens the arguments of functions that ask, before any operator runs, whether their types are the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "").startswith(_STRICT):
            args, kwargs = tree_map(_widened, args), tree_map(_widened, kwargs or {})
        return func(*args, **(kwargs or {}))


def _views(value: Any) -> bool:
    return value.alias_info is not None and not value.alias_info.is_write


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in _WIDER:
        return value.to(_WIDER[value.dtype])
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


@contextmanager
def widening() -> Iterator[None]:
    """Compute in float64 what would be in float32: also with tensors that no module owns, constants, `.float()`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Operators(), _Functions():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def double_precision() -> Iterator[None]:
    """Run float32 modules in float64: each one's tensors are widened (exactly) for its own forward, then put back.

    So the extra memory is one layer's, not twice the network's. Inputs are to be given in float64.
    """
    kept: list[dict[str, Tensor]] = []

    def tensors(module: nn.Module) -> dict[str, Tensor]:
        return {n: t for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}

    def widen(module: nn.Module, _: Any) -> None:
        found = tensors(module)
        kept.append({name: t.data for name, t in found.items() if t.is_floating_point()})
        for name, data in kept[-1].items():
            found[name].data = data.double()

    def restore(module: nn.Module, *_: Any) -> None:
        found = tensors(module)
        for name, data in kept.pop().items():
            if name in found:
                found[name].data = data

    hooks = nn.modules.module
    with ExitStack() as stack:
        stack.callback(hooks.register_module_forward_pre_hook(widen).remove)
        stack.callback(hooks.register_module_forward_hook(restore, always_call=True).remove)
        stack.enter_context(widening())
        yield
