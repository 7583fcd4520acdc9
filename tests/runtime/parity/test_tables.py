"""`runtime.parity.tables`: an input that chooses rows of a table is tried on all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from runtime.artefact import Facts
from runtime.manifest import TensorSpec
from runtime.parity.__main__ import main
from runtime.parity.cases import Wanted, make_cases
from runtime.parity.tables import stored_tables


def save(path: Path, *, lost: int | None = None, stored: str = "") -> Path:
    """A table of ten rows of three numbers, looked up by `kind` (N, 1); the row `lost` is zero."""
    table = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
    if lost is not None:
        table[lost] = 0
    nodes = [
        *([helper.make_node(stored, ["table"], ["read"])] if stored else []),
        helper.make_node("Squeeze", ["kind", "axis"], ["row"]),
        helper.make_node("Gather", ["read" if stored else "table", "row"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("kind", TensorProto.INT64, ["batch", 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1]), "axis")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize("stored", ["", "Identity"])
def test_the_rows_are_those_of_the_table(tmp_path: Path, stored: str) -> None:
    path = save(tmp_path / "a.onnx", stored=stored)
    assert stored_tables(path, ["kind"]) == {"kind": (0, 9)}
    assert not stored_tables(path, ["other"])
    assert not stored_tables(path, [])


def test_a_lost_row_fails(tmp_path: Path) -> None:
    whole, lost = save(tmp_path / "a.onnx"), save(tmp_path / "b.onnx", lost=7)
    assert CliRunner().invoke(main, [str(whole), str(save(tmp_path / "c.onnx")), "-q"]).exit_code == 0
    assert CliRunner().invoke(main, [str(whole), str(lost), "-q"]).exit_code == 4


def test_each_row_comes_once_before_one_comes_again() -> None:
    wanted = Wanted(between={"kind": (0, 49)}, noise=64)
    cases, _ = make_cases([TensorSpec("kind", "int64", ("batch", 1))], (), Facts(), wanted)
    drawn = np.concatenate([feeds["kind"].ravel() for feeds in cases[-1]])
    assert len(drawn) == 64
    assert set(drawn[:50].tolist()) == set(range(50))
