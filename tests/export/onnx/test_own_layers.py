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
from tests.gmconv.test_fusing import Branches, MaskedBranches

Layer = Callable[[int, int], nn.Module]


def live(model: nn.Module) -> Live:
    return Live(model, (torch.randn(2, 3, 16, 16),), Foreign())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("layer", [layers.Softplus, calls.ItemBlock, calls.hooked], ids=lambda layer: layer.__name__)
def test_a_constant_kernel_is_an_initializer_and_the_manifest_says_what_it_was(layer: Layer, tmp_path: Path) -> None:
    manifest = export_onnx(live(layers.net(layer)), tmp_path / "net.onnx")
    assert manifest.certificate is not None
    assert [kernel["kind"] for kernel in manifest.certificate["kernels"]] == ["mask", "mask"]
    assert not manifest.rows_meet
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
    assert manifest.rows_meet  # it is computed from the whole batch
    assert any("depend on the others of its batch" in text for text in manifest.warnings)
    assert [note for note in manifest.export.notes if "layer 'a' is exported as it is" in note]


def test_the_yardstick_is_the_live_network_whatever_its_forward_does_with_dtypes(tmp_path: Path) -> None:
    class Grid(layers.Base):
        def kernel(self) -> torch.Tensor:
            return (self.weight.float() * layers.gauss(5, self.sigma.float())).float()

    class OnlyFloat32(layers.Base):
        def kernel(self) -> torch.Tensor:
            assert self.weight.dtype == torch.float32
            return super().kernel()

    model = layers.net(Grid)
    model.b = calls.PlainAttribute(16, 16)
    manifest = export_onnx(live(model), tmp_path / "net.onnx")
    assert manifest.export is not None
    assert manifest.export.notes == ("exported from memory",)
    manifest = export_onnx(live(layers.net(OnlyFloat32)), tmp_path / "only.onnx")
    assert manifest.export is not None
    assert [note for note in manifest.export.notes if "float64 yardstick is the baked network" in note]


def test_kernels_of_layers_that_write_share_hide_or_follow_the_threads_are_stored(tmp_path: Path) -> None:
    """A parent that writes into its child, layers in a list or a function, one weight at two scales, LAPACK, cond."""
    model = layers.net(calls.MasksChild)
    model.b = nn.Sequential(calls.AtScales(16, 16), calls.Unregistered(16, 16), calls.InClosure(16, 16))
    model.stem.append(nn.Sequential(calls.Cayley(8, 8), calls.LastKernel(8, 8), calls.SetsData(8, 8)))
    model.stem.append(calls.Conditional(8, 8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    manifest = export_onnx(live(model), tmp_path / "net.onnx")
    assert manifest.certificate is not None
    assert len(manifest.certificate["kernels"]) == 9
    graph = onnx.load(tmp_path / "net.onnx").graph
    stored = {tensor.name for tensor in graph.initializer}
    assert all(node.input[1] in stored for node in graph.node if node.op_type == "Conv")
    assert manifest.parity is not None
    assert all(hop.bitwise for hop in manifest.parity.hops if hop.name == "live -> baked")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "it stays as it was"


class Shuffled(nn.Module):
    """Convolves channels in an order that is drawn once and that no state_dict holds."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv, self.order = nn.Conv2d(i, o, 3, padding=1), torch.randperm(i)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x[:, self.order])


def listed() -> nn.Module:
    return layers.Net(calls.Unregistered)


def shuffled() -> nn.Module:
    return layers.Net(Shuffled)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (listed, r"^a\.layers\[0\]\.sigma, a\.layers\[0\]\.weight, .* and 3 more: .*nn\.ModuleList"),
        (shuffled, "^loaded twice, the network gives two answers .*random values that are no parameters or buffers"),
    ],
)
def test_what_no_checkpoint_holds_is_not_exported_from_one(
    factory: Callable[[], nn.Module], words: str, tmp_path: Path
) -> None:
    torch.save(factory().state_dict(), tmp_path / "net.pth")
    foreign = Foreign(arch=f"{factory.__module__}:{factory.__name__}", input_shape=(3, 16, 16))
    with pytest.raises(RefusedError, match=words):
        export_onnx(tmp_path / "net.pth", tmp_path / "net.onnx", ExportOptions(foreign=foreign))
    assert [file.name for file in tmp_path.iterdir()] == ["net.pth"]


def test_a_layer_under_autocast_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="layer 'a' computes in bfloat16"):
        export_onnx(live(layers.net(calls.Autocast)), tmp_path / "net.onnx")


@pytest.mark.parametrize("block", [Branches, MaskedBranches])
def test_branches_are_merged_where_asked_and_that_is_a_hop(block: type[nn.Module], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), block(), nn.Flatten(), nn.Linear(4 * 14 * 14, 5)).eval()
    manifest = export_onnx(live(model), tmp_path / "net.onnx", ExportOptions(fuse=True))
    assert manifest.parity is not None
    assert {hop.name for hop in manifest.parity.hops} == {"live -> baked", "baked -> fused", "fused -> ORT"}
    assert manifest.export is not None
    assert manifest.export.operators["Conv"] == 2
