"""Why torch's exporter refused a network, in one sentence: where, what, and what to do."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gmconv.errors import layer_words

if TYPE_CHECKING:
    from torch import nn

_FIXED = ("constraint", "specializ", "user-specified ranges")


def why_not(error: Exception, model: nn.Module, *, hw: bool) -> str:
    """The sentence; `hw`: height and width were to be free."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    lines = [line.strip() for line in str(chain[-1]).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # a heading
        lines = [line.rpartition(", but ")[2] for line in lines[1:]]
    reason = (lines[0] if lines else type(error).__name__).rstrip(".")[:300]
    said = " ".join(str(link) for link in chain)
    layer = _layer_at_fault(chain, model)
    refused = f"the network cannot be exported{f' at {layer_words(layer)}' if layer is not None else ''}"
    if (found := _bound(chain)) is not None:
        operator, argument, axes = found
        what = "batch" if axes == {0} else "height and width" if 0 not in axes else "batch, height and width"
        return (
            f"{refused}: the {argument} of its {operator} follow{'s' * (argument[-1] != 's')} the {what}, and in an "
            f"ONNX graph that is one number; {_settled(axes, hw=hw)}"
        )
    if "data-dependent" in said:
        advice = "its forward decides in Python by values of a tensor, and a graph has one way for all: use torch.where"
    elif any(mark in said.lower() for mark in _FIXED):
        axes = {int(axis) for axis in re.findall(r"(?:size\(\)|shape)\[(\d)\]", said)} or ({0, 2} if hw else {0})
        what = "batch" if axes == {0} else "height or width" if 0 not in axes else "batch, height or width"
        advice = f"its forward fixes the {what}: {_settled(axes, hw=hw)}"
    else:
        advice = "the exporter's own report, above unless -q, says more"
    return f"{refused} ({reason}); {advice}"


def _settled(axes: set[int], *, hw: bool) -> str:
    """What to do where the graph holds for one length of those axes."""
    if hw and 0 not in axes:
        return "leave --dynamic-hw out"
    return f"give --batch N{' without --dynamic-hw' if hw and axes != {0} else ''}"


def _bound(chain: Sequence[BaseException]) -> tuple[str, str, set[int]] | None:
    """Of the operator that could not be translated: its name, the argument that is computed from the length of free
    axes and that ONNX has as an attribute, and those axes of the inputs."""
    if "attribute" not in str(chain[-1]):
        return None
    for node in reversed([node for node in _values(chain, "node") if hasattr(node, "all_input_nodes")]):
        schema = getattr(node.target, "_schema", None)
        for argument, given in zip(schema.arguments if schema else (), node.args, strict=False):
            if argument.type.isSubtypeOf(_tensor_type()):
                continue
            symbols = {symbol for value in _flat(given) for symbol in _symbols(value)}
            if symbols:
                inputs = [one for one in node.graph.nodes if one.op == "placeholder"]
                shapes = [getattr(one.meta.get("val"), "shape", ()) for one in inputs]
                axes = {axis for shape in shapes for axis, side in enumerate(shape) if symbols & _free(side)}
                return node.target._schema.name.partition("::")[2], argument.name, axes or {0}
    return None


def _tensor_type() -> Any:
    import torch

    return torch._C.OptionalType(torch._C.TensorType.get())


def _flat(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


def _symbols(value: Any) -> set[Any]:
    return _free(getattr(value, "meta", {}).get("val"))


def _free(side: Any) -> set[Any]:
    """The symbols of a length that is no number."""
    return set(getattr(getattr(getattr(side, "node", None), "expr", None), "free_symbols", ()))


def _values(chain: Sequence[BaseException], name: str) -> Iterator[Any]:
    """What the local variable of that name is in each frame of the chain that has one."""
    for error in chain:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if name in frame.f_locals:
                yield frame.f_locals[name]


def _layer_at_fault(chain: Sequence[BaseException], model: nn.Module) -> str | None:
    """The innermost module that was at work when a step failed: running its forward, or translating its operator."""
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    for error in chain:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            found = names.get(id(frame.f_locals.get("self")), "") or found
            meta = getattr(frame.f_locals.get("node"), "meta", None)
            stack = list(meta.get("nn_module_stack", {}).values()) if isinstance(meta, dict) else []
            found = next((path for path, _ in reversed(stack) if path in names.values() and path), found)
    return found
