"""How long the tables are in which a network looks whole numbers up: noise for such an input names any of the rows."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from runtime.runners.base import Runner

_STORED = ("Cast", "DequantizeLinear", "Identity")
_PASSING = (*_STORED, "Flatten", "Gather", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


def table_ends(runner: Runner) -> dict[str, tuple[int, int]]:
    """First and last row, for those inputs of a checkpoint or an ONNX file that choose rows of a table."""
    if runner.artefact.kind == "checkpoint":
        return runner.table_ends()  # type: ignore[attr-defined,no-any-return]
    whole = [spec.name for spec in runner.inputs if spec.dtype in ("int32", "int64")]
    return stored_tables(runner.artefact.path, whole) if runner.artefact.kind == "onnx" else {}


def stored_tables(path: Path, names: Collection[str]) -> dict[str, tuple[int, int]]:
    """The same of the inputs `names` of an ONNX file, from its graph."""
    if not names:
        return {}
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    tables = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    chosen_by = {name: name for name in names}
    lengths: dict[str, int] = {}
    for node in graph.node:
        first = node.input[0] if node.input else ""
        if node.op_type in _STORED and first in tables:
            tables[node.output[0]] = tables[first]
        elif node.op_type in _PASSING and first in chosen_by:
            chosen_by[node.output[0]] = chosen_by[first]
        elif node.op_type == "Gather" and first in tables and node.input[1] in chosen_by:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            name, length = chosen_by[node.input[1]], tables[first][axis]
            lengths[name] = min(length, lengths.get(name, length))
    return {name: (0, length - 1) for name, length in lengths.items()}
