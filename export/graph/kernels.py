"""Proof on the exported program that kernels are stored: a second one, which knows nothing of how they were baked."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

from gmconv.errors import RefusedError, layer_words

if TYPE_CHECKING:
    from torch import fx
    from torch.export import ExportedProgram

_Made = Literal["input", "stored", "computed"]
_CONVOLUTION = re.compile(r"aten\.(conv[123]d|convolution|conv_transpose[123]d|_convolution)\.\w+")
# Operators that move a stored tensor about, or round it, and compute nothing new.
_MOVES = re.compile(
    r"aten\.(alias|detach|clone|_to_copy|to|view|_unsafe_view|reshape|permute|transpose|t|unsqueeze|squeeze|contiguous"
    r"|lift_fresh_copy|expand)\.\w+"
)


def require_stored_kernels(program: ExportedProgram | None, kept: Collection[str] = ()) -> None:
    """Prove that every convolution which the input reaches reads a kernel that is stored in the file.

    Args:
        program: as exported and functionalized; None where the exporter gave none.
        kept: layers that may go on computing their kernel.

    Raises:
        RefusedError: a convolution (its layer named) computes its kernel.
    """
    if program is None:
        return
    given = set(program.graph_signature.user_inputs)
    places = program.graph.find_nodes(op="placeholder")
    made: dict[fx.Node, _Made] = {node: "input" if node.name in given else "stored" for node in places}
    _walk(program.graph_module, made, set(kept), "")


def _walk(module: fx.GraphModule, made: dict[fx.Node, _Made], kept: set[str], outer: str) -> None:
    """Follow the graph in order; `made` holds its inputs and takes what each node is made from."""
    for node in module.graph.nodes:
        if node in made or node.op == "output":
            continue
        sources = [made[source] for source in node.all_input_nodes if source in made]
        if node.op == "get_attr":
            made[node] = "stored"
            continue
        operator = str(node.target)
        inner = [getattr(module, str(a.target)) for a in node.all_input_nodes if a.op == "get_attr"]
        inner = [found for found in inner if hasattr(found, "graph")]
        for branch in inner:  # torch.cond and its like
            _walk(branch, _inputs(branch, node, made), kept, _layer(node) or outer)
        if _CONVOLUTION.fullmatch(operator):
            _require_stored(node, made, kept, outer)
        if "input" in sources:
            made[node] = "input"
        elif sources and set(sources) == {"stored"} and _MOVES.fullmatch(operator):
            made[node] = "stored"
        else:
            made[node] = "computed"


def _require_stored(node: fx.Node, made: Mapping[fx.Node, _Made], kept: set[str], outer: str) -> None:
    x, kernel = _argument(node, 0, "input"), _argument(node, 1, "weight")
    layer = _layer(node) or outer
    if made.get(x) != "input" or made.get(kernel) == "stored":
        return
    if any(layer == name or layer.startswith(f"{name}.") for name in kept):
        return
    why = "from the network's input" if made.get(kernel) == "input" else "in the graph"
    raise RefusedError(
        f"{layer_words(layer)} computes its kernel {why}, and baking did not see it: "
        f"write it as a call of torch.nn.functional.conv2d in a module of its own"
    )


def _argument(node: fx.Node, index: int, name: str) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name)


def _inputs(branch: fx.GraphModule, node: fx.Node, made: Mapping[fx.Node, _Made]) -> dict[fx.Node, _Made]:
    """What the inputs of a subgraph are made from: the last operands of the node that runs it, in order."""
    places = branch.graph.find_nodes(op="placeholder")
    operands = [a for a in _flat(node.args) if a in made and a.op != "get_attr"][-len(places) :]
    if len(operands) != len(places):
        return dict.fromkeys(places, "input")
    return dict(zip(places, (made[operand] for operand in operands), strict=True))


def _flat(values: Any) -> list[Any]:
    if isinstance(values, list | tuple):
        return [item for value in values for item in _flat(value)]
    return [values] if hasattr(values, "all_input_nodes") else []


def _layer(node: fx.Node) -> str:
    """The module that makes the call, by its path; empty for the network itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    return paths[-1] if paths else ""
