"""Networks of a user's own layers through the whole export: constant kernels stored, others named, branches merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from export.onnx import ExportOptions, export_onnx
from export.onnx.trained import Live
from gmconv.errors import BakeError, RefusedError
from gmconv.foreign import Foreign
from tests.gmconv.constants import calls, dynamic, layers
from tests.gmconv.test_fusing import Branches

Layer = Callable[[int, int], nn.Module]


def live(model: nn.Module) -> Live:
    return Live(model, (torch.randn(2, 3, 16, 16),), Foreign())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("layer", [layers.Softplus, calls.ItemBlock, calls.hooked], ids=lambda layer: layer.__name__)
def test_a_constant_kernel_is_an_initializer_and_the_manifest_says_what_it_was(layer: Layer, tmp_path: Path) -> None:
    manifest = export_onnx(live(layers.net(layer)), tmp_path / "net.onnx")
    assert manifest.certificate is not None
    assert [kernel["kind"] for kernel in manifest.certificate["kernels"]] == ["mask", "mask"]
    assert all(kernel["gaussian"]["misfit"] <= 1e-6 for kernel in manifest.certificate["kernels"])
    graph = onnx.load(tmp_path / "net.onnx").graph
    stored = {tensor.name for tensor in graph.initializer}
    assert all(node.input[1] in stored for node in graph.node if node.op_type == "Conv")
    assert not {node.op_type for node in graph.node} & {"Exp", "Pow", "Div", "Mul"}
    assert manifest.parity is not None
    assert all(hop.bitwise for hop in manifest.parity.hops if hop.name == "live -> baked")


def test_a_kernel_that_depends_on_the_input_is_refused_or_kept_and_noted(tmp_path: Path) -> None:
    model = layers.net(dynamic.Modulated)
    with pytest.raises(BakeError, match="layer 'a' .*computed from the network's input"):
        export_onnx(live(model), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
    manifest = export_onnx(live(model), tmp_path / "net.onnx", ExportOptions(keep_dynamic=True))
    assert manifest.export is not None
    assert [note for note in manifest.export.notes if "layer 'a' keeps computing its kernel" in note]


def test_a_network_that_knows_only_float32_is_held_to_its_baked_form_or_refused_in_a_sentence(tmp_path: Path) -> None:
    class Grid(layers.Base):
        def kernel(self) -> torch.Tensor:
            return (self.weight.float() * layers.gauss(5, self.sigma.float())).float()

    manifest = export_onnx(live(layers.net(Grid)), tmp_path / "net.onnx")
    assert manifest.export is not None
    assert [note for note in manifest.export.notes if "float64 yardstick is the baked network" in note]
    with pytest.raises(RefusedError, match="float64 neither live nor baked.*nn.ModuleList"):
        export_onnx(live(layers.net(calls.Unregistered)), tmp_path / "list.onnx")


def test_branches_are_merged_where_asked_and_that_is_a_hop(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Branches(), nn.Flatten(), nn.Linear(4 * 14 * 14, 5)).eval()
    manifest = export_onnx(live(model), tmp_path / "net.onnx", ExportOptions(fuse=True))
    assert manifest.parity is not None
    assert {hop.name for hop in manifest.parity.hops} == {"live -> baked", "baked -> fused", "fused -> ORT"}
    assert manifest.export is not None
    assert manifest.export.operators["Conv"] == 2
