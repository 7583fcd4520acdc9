"""`--bisect` names the corrupted layer in the words of the user's model, wherever the error was planted."""

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import gmconv
from export.onnx import export_onnx
from export.onnx.trained import Live
from gmconv.foreign import Foreign
from runtime.parity.bisect import judge_layers
from runtime.parity.bisection import Bisection, LayerError
from runtime.parity.layers import Graph
from runtime.parity.run import ParityOptions, compare_artefacts
from runtime.parity.tolerances import TOLERANCES
from tests.gmconv.constants import calls

pytestmark = pytest.mark.xdist_group("test_bisect")  # its networks are exported once


class Small(nn.Module):
    """In-place and reused ReLU, a branch, a BatchNorm that folds, a convolution without one, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.relu = nn.ReLU(inplace=True)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.left(x) + self.right(x))
        return self.head(x.mean((2, 3)))


Plant = Callable[..., Path]


def plant_in(source: Path, folder: Path) -> Plant:
    def plant(
        name: str, change: Callable[[Any], Any] = lambda w: w * 1.3 + 0.05, channels: slice = slice(0, 1)
    ) -> Path:
        model = onnx.load(source)
        tensor = next(t for t in model.graph.initializer if t.name == name)
        weight = numpy_helper.to_array(tensor).copy()
        weight[channels] = change(weight[channels])
        tensor.CopyFrom(numpy_helper.from_array(weight, name))
        onnx.save(model, folder / "bad.onnx")
        return folder / "bad.onnx"

    return plant


def save(model: nn.Module, folder: Path, arch: str, shape: tuple[int, int, int]) -> tuple[Path, Path]:
    model = model.eval()
    gmconv.save_checkpoint(folder / "net.pt", model, arch=arch, input_shape=shape)
    torch.onnx.export(
        gmconv.bake(model),
        (torch.zeros(2, *shape),),
        str(folder / "net.onnx"),
        dynamo=True,
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        external_data=False,
        verbose=False,
    )
    return folder / "net.pt", folder / "net.onnx"


def randomize_norms(model: nn.Module) -> nn.Module:
    """Running statistics as after training, so that folding a BatchNorm changes the weights."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    module = types.ModuleType("bisect_small")
    module.Small = Small  # type: ignore[attr-defined]
    sys.modules["bisect_small"] = module
    torch.manual_seed(0)
    model = gmconv.convert(randomize_norms(Small()), sigma=1.2)
    return save(model, tmp_path_factory.mktemp("small"), "bisect_small:Small", (3, 12, 12))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.manual_seed(0)
    model = randomize_norms(gmconv.models.create("resnet20", sigma=0.9))
    return save(model, tmp_path_factory.mktemp("resnet"), "gmconv.models:resnet20", (3, 16, 16))


SMALL = ParityOptions(bisect=True, yardstick=False, samples=8, foreign=Foreign(arch="bisect_small:Small"))
LARGE = ParityOptions(bisect=True, yardstick=False, samples=8)


def found_in(reference: Path, bad: Path, options: ParityOptions) -> Bisection:
    (candidate,) = compare_artefacts(reference, [bad], options).candidates
    assert not candidate.passed
    assert candidate.bisection is not None
    return candidate.bisection


@pytest.mark.parametrize("layer", ["stem.0", "left", "right.0", "head"])
def test_a_planted_error_is_found_in_every_layer(small: tuple[Path, Path], tmp_path: Path, layer: str) -> None:
    found = found_in(small[0], plant_in(small[1], tmp_path)(f"{layer}.weight"), SMALL)
    assert found.culprit is not None
    assert found.culprit.name == layer
    assert found.culprit.own > 1e-3
    assert layer in found.sentence
    assert (found.culprit.sigma == "1.200") == (layer != "head")


@pytest.mark.parametrize("row", range(5))
def test_the_last_layer_is_named_whatever_the_sign_of_what_is_wrong(
    small: tuple[Path, Path], tmp_path: Path, row: int
) -> None:
    bad = plant_in(small[1], tmp_path)("head.weight", lambda weight: weight * 1.1, slice(row, row + 1))
    culprit = found_in(small[0], bad, SMALL).culprit
    assert culprit is not None
    assert culprit.name == "head"


@pytest.mark.parametrize(
    ("op", "other", "said"),
    [
        ("Add", "Sub", "relu (Sub, Relu), or an operator between left, right.0 and it."),
        ("ReduceMean", "ReduceMax", "head (ReduceMax, Gemm), or an operator between relu and it."),
        ("Relu", "LeakyRelu", "relu (LeakyRelu)."),
    ],
)
def test_an_operator_that_is_no_layer_is_not_blamed_on_the_one_behind(
    small: tuple[Path, Path], tmp_path: Path, op: str, other: str, said: str
) -> None:
    model = onnx.load(small[1])
    next(node for node in model.graph.node if node.op_type == op).op_type = other
    onnx.save(model, tmp_path / "bad.onnx")
    found = found_in(small[0], tmp_path / "bad.onnx", SMALL)
    assert found.sentence.startswith(f"first layer out of tolerance: {said} From")


def test_twenty_of_twenty_in_resnet20(resnet: tuple[Path, Path], tmp_path: Path) -> None:
    plant = plant_in(resnet[1], tmp_path)
    graph = onnx.load(resnet[1]).graph
    weights = [node.input[1] for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(set(weights)) == 20
    named = {}
    for weight in weights:
        found = found_in(resnet[0], plant(weight), LARGE)
        named[weight.removesuffix(".weight")] = found.culprit and found.culprit.name
    assert named == {name: name for name in named}


class Own(nn.Module):
    """Layers with children: a kernel of two parents' making, two convolutions in one forward, one weight twice, one
    whose child's convolution takes in the BatchNorm behind the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.scales = calls.Borrowed(3, 8), calls.Block(8, 8), calls.AtScales(8, 8)
        self.deep, self.norm = calls.Depthwise(8, 8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.scales(self.block(torch.relu(self.first(x))))
        return self.head(self.norm(self.deep(x)).mean((2, 3)))


def test_layers_of_a_users_own_are_named_and_none_behind_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("bisect_own")
    module.Own = Own  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bisect_own", module)
    torch.manual_seed(0)
    model, path = randomize_norms(Own()).eval(), tmp_path / "own.onnx"
    torch.save(model.state_dict(), tmp_path / "own.pth")
    export_onnx(Live(model, torch.randn(2, 3, 12, 12), Foreign()), path)
    options = replace(LARGE, foreign=Foreign(arch="bisect_own:Own", input_shape=(3, 12, 12)))
    for layer in ("first.first", "block.baked_1", "scales_layer_baked_0", "scales.out", "deep.baked_0 or deep.point"):
        bad = plant_in(path, tmp_path)(f"{layer.split()[-1]}.weight", channels=slice(None))
        found = found_in(tmp_path / "own.pth", bad, options)
        assert found.culprit is not None
        assert found.culprit.name == layer


def test_onnx_against_onnx_names_the_layer_too(resnet: tuple[Path, Path], tmp_path: Path) -> None:
    found = found_in(resnet[1], plant_in(resnet[1], tmp_path)("layer2.1.conv2.weight"), LARGE)
    assert found.culprit is not None
    assert found.culprit.name == "layer2.1.conv2"


def test_onnx_against_onnx_with_other_tensor_names(resnet: tuple[Path, Path], tmp_path: Path) -> None:
    bad = plant_in(resnet[1], tmp_path)("layer2.1.conv2.weight")
    model = onnx.load(bad)
    kept = {"input", "logits"} | {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        node.input[:] = [n if n in kept or not n else f"other_{n}" for n in node.input]
        node.output[:] = [n if n in kept else f"other_{n}" for n in node.output]
        del node.metadata_props[:]
    del model.graph.value_info[:]
    onnx.save(model, bad)
    found = found_in(resnet[1], bad, LARGE)
    assert found.culprit is not None
    assert found.culprit.name == "layer2.1.conv2"


def test_a_fold_is_seen_through_where_tensors_pair_by_position(norms: tuple[Path, Path], tmp_path: Path) -> None:
    model = Norms().eval()
    args = {"dynamo": True, "optimize": False, "external_data": False, "verbose": False}
    torch.onnx.export(model, (torch.zeros(2, 3, 12, 12),), str(tmp_path / "unfolded.onnx"), **args)
    unfolded = onnx.load(tmp_path / "unfolded.onnx").graph
    theirs = {name for node in unfolded.node for name in node.output}
    folded = onnx.load(norms[1])
    for node in folded.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{name}_" if name in theirs else name for name in names]
    del folded.graph.output[:], folded.graph.value_info[:]
    onnx.save(folded, tmp_path / "folded.onnx")
    matches = Graph(tmp_path / "folded.onnx").same_tensors(Graph(tmp_path / "unfolded.onnx"))
    kinds = {name: node.op_type for node in unfolded.node for name in node.output}
    ends = [kinds[match.other] for match in matches]
    assert ends == ["BatchNormalization", "Conv", "Conv", "Add", "BatchNormalization", "Gemm"]


def test_a_wrong_bias_is_found(small: tuple[Path, Path], tmp_path: Path) -> None:
    found = found_in(small[0], plant_in(small[1], tmp_path)("left.bias"), SMALL)
    assert found.culprit is not None
    assert found.culprit.name == "left"


def test_of_two_corrupted_layers_the_first_is_named(resnet: tuple[Path, Path], tmp_path: Path) -> None:
    bad = plant_in(resnet[1], tmp_path)("layer3.0.conv1.weight")
    bad = plant_in(bad, tmp_path)("layer1.2.conv1.weight")
    found = found_in(resnet[0], bad, LARGE)
    assert found.culprit is not None
    assert found.culprit.name == "layer1.2.conv1"
    assert "1 later layer is out of tolerance too" in found.sentence


def layers(*own: float, accumulated: tuple[float, ...] | None = None) -> list[LayerError]:
    return [
        LayerError(
            name=f"layer{i}",
            ops="Conv",
            tensor=f"t{i}",
            sigma=None,
            own=error,
            own_max=4 * error,
            accumulated=total,
            accumulated_max=4 * total,
        )
        for i, (error, total) in enumerate(zip(own, accumulated or own, strict=True))
    ]


def test_an_error_that_is_within_tolerance_and_stands_out_is_named() -> None:
    found = judge_layers(layers(1e-7, 2e-7, 1e-5, 1e-7, 1e-7), TOLERANCES["fp32"])
    assert found.culprit is not None
    assert found.culprit.name == "layer2"
    assert "no layer alone is out of tolerance" in found.sentence


def test_an_error_that_grows_over_many_layers_is_named_where_it_leaves_the_tolerance() -> None:
    found = judge_layers(layers(*[1e-5] * 4, accumulated=(1e-5, 1.6e-5, 2.4e-5, 3e-5)), TOLERANCES["fp32"])
    assert found.culprit is not None
    assert found.culprit.name == "layer2"
    assert "the error grew" in found.sentence


def test_layers_that_all_agree_point_at_the_engine() -> None:
    found = judge_layers(layers(1e-7, 2e-7, 0.0), TOLERANCES["fp32"])
    assert found.culprit is None
    assert "all 3 layers agree" in found.sentence


class Two(nn.Module):
    """Two outputs of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = (nn.Conv2d(i, 4, 3, padding=1) for i in (3, 4, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.stem(x).relu()
        return self.left(x), self.right(x)


@pytest.mark.parametrize("change", ["swapped", "halved"])
def test_outputs_that_are_not_what_the_layers_make_are_named(tmp_path: Path, change: str) -> None:
    torch.manual_seed(0)
    model, options = Two().eval(), ParityOptions(bisect=True, foreign=Foreign(arch=f"{__name__}:Two"))
    gmconv.save_checkpoint(tmp_path / "net.pt", model, arch=f"{__name__}:Two", input_shape=(3, 8, 8))
    gmconv.deploy(model, torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    graph = (changed := onnx.load(tmp_path / "net.onnx")).graph
    one, other = (output.name for output in graph.output)
    for node in graph.node:
        swapped = [{one: other, other: one}.get(name, name) for name in node.output]
        node.output[:] = swapped if change == "swapped" else [{one: "whole"}.get(name, name) for name in node.output]
    if change == "halved":
        graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "half"))
        graph.node.append(onnx.helper.make_node("Mul", ["whole", "half"], [one]))
    onnx.save(changed, tmp_path / "bad.onnx")
    found = found_in(tmp_path / "net.pt", tmp_path / "bad.onnx", options)
    assert found.culprit is None
    told = f"output {other!r} is what {one!r} should be" if change == "swapped" else f"output {one!r} is another"
    assert f"layers agree, but {told}: " in found.sentence


def without_metadata(path: Path, prefix: str = "") -> Path:
    """As another exporter or a quantizer leaves a graph; with a prefix, weights lose their names too."""
    model = onnx.load(path)
    renamed = {}
    for index, tensor in enumerate(model.graph.initializer):
        if prefix:
            old, tensor.name = tensor.name, f"{prefix}{index}"
            renamed[old] = tensor.name
    for node in model.graph.node:
        del node.metadata_props[:]
        node.input[:] = [renamed.get(name, name) for name in node.input]
    onnx.save(model, path)
    return path


def test_the_names_of_the_weights_are_enough(resnet: tuple[Path, Path], tmp_path: Path) -> None:
    bad = without_metadata(plant_in(resnet[1], tmp_path)("layer2.2.conv1.weight"))
    found = found_in(resnet[0], bad, LARGE)
    assert found.culprit is not None
    assert found.culprit.name == "layer2.2.conv1"


class Norms(nn.Module):
    """BatchNorms that fold, into a convolution and a linear layer; one behind an add stays; a MatMul and its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.pre, self.conv3 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.rows = nn.Linear(10, 6)
        self.fc, self.bn2 = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.rows(self.conv3(self.pre(x + self.conv2(x)).relu()).relu())
        return self.head(self.bn2(self.fc(x.mean((2, 3)))).relu())


@pytest.fixture(scope="module")
def norms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.manual_seed(0)
    reference, path = save(randomize_norms(Norms()), tmp_path_factory.mktemp("norms"), f"{__name__}:Norms", (3, 12, 12))
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.op_type == "MatMul")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    tensor.name = node.input[1] = "rows.weight"  # torch calls what it has transposed `val_12`
    onnx.save(model, path)
    return reference, path


@pytest.mark.parametrize("names", ["metadata", "weights"])
@pytest.mark.parametrize("layer", ["conv1", "conv2", "pre", "conv3", "rows", "fc", "head"])
def test_each_layer_is_compared_with_what_it_returns(
    norms: tuple[Path, Path], tmp_path: Path, layer: str, names: str
) -> None:
    bad = plant_in(norms[1], tmp_path)(f"{layer}.weight", lambda w: w * np.float32(1.05), slice(None))
    options = replace(LARGE, foreign=Foreign(arch=f"{__name__}:Norms"))
    found = found_in(norms[0], without_metadata(bad) if names == "weights" else bad, options)
    off = [found.name for found in found.layers if found.own > 1e-6]
    assert (off, found.culprit and found.culprit.name) == ([layer], layer)


def test_without_any_names_it_says_so(resnet: tuple[Path, Path], tmp_path: Path) -> None:
    bad = without_metadata(plant_in(resnet[1], tmp_path)("conv1.weight"), prefix="onnx::Conv_")
    found = found_in(resnet[0], bad, LARGE)
    assert found.culprit is None
    assert "no module names" in found.sentence


def test_an_engine_without_its_onnx_file_says_what_to_do(resnet: tuple[Path, Path], tmp_path: Path) -> None:
    from runtime.parity.bisect import bisect
    from runtime.runners import open_runner

    (tmp_path / "net.plan").write_bytes(b"ftrt")
    with open_runner(resnet[0]) as reference:
        feeds = {"input": np.zeros((1, 3, 16, 16), np.float32)}
        found = bisect(reference, tmp_path / "net.plan", feeds, TOLERANCES["fp32"])
    assert found.culprit is None
    assert "put the ONNX file it was built from beside it" in found.sentence


def test_two_checkpoints_are_compared_module_by_module(resnet: tuple[Path, Path], tmp_path: Path) -> None:
    loaded = gmconv.load_checkpoint(resnet[0])
    with torch.no_grad():
        loaded.model.get_submodule("layer2.0.conv1").weight[0] += 0.05  # type: ignore[index, operator]
    gmconv.save_checkpoint(tmp_path / "bad.pt", loaded.model, arch=loaded.arch, input_shape=loaded.input_shape)
    found = found_in(resnet[0], tmp_path / "bad.pt", LARGE)
    assert found.culprit is not None
    assert found.culprit.name == "layer2.0.conv1"
