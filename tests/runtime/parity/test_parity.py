"""`python -m runtime.parity` says whether two artefacts are one network, on every corner of the shapes they take."""

import io
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from rich.console import Console
from torch import nn

import gmconv
from gmconv.errors import RefusedError
from gmconv.foreign import Foreign
from gmconv.preprocessing import Preprocessing
from runtime.artefact import Facts
from runtime.manifest import FileDigest, Manifest, ShapeRange, TensorSpec, digest, sidecar
from runtime.parity.cases import NOISE_ALONE, corner_shapes
from runtime.parity.cropped import CUT
from runtime.parity.run import ParityOptions, compare_artefacts
from runtime.parity.tolerances import TOLERANCES
from runtime.records import Crop, Export
from runtime.runners.base import as_inputs

pytestmark = pytest.mark.xdist_group("test_parity")  # its networks are exported once

Cli = Callable[..., subprocess.CompletedProcess[str]]
LAYER = {"name": "conv1", "kernel": [3, 3], "kept": [1, 1], "offset": [1, 1], "l1_removed": 1.0}
SEEN = {"samples": 8, "relative_max": 0.1}
SPEC = (TensorSpec("input", "float32", ("batch", 3, 16, 16)),)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of a small random GMConv network, and its ONNX file without a manifest."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    model = gmconv.models.create("resnet20", sigma=1.0).eval()
    gmconv.save_checkpoint(folder / "net.pt", model, arch="gmconv.models:resnet20", input_shape=(3, 16, 16))
    export(gmconv.bake(model), folder / "net.onnx", (3, 16, 16))
    return folder / "net.pt", folder / "net.onnx"


def export(
    model: nn.Module,
    path: Path,
    shape: tuple[int, int, int],
    *,
    free_sides: bool = False,
    outputs: list[str] | None = None,
) -> None:
    axes = {0: torch.export.Dim.DYNAMIC} | (
        {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC} if free_sides else {}
    )
    torch.onnx.export(
        model,
        (torch.zeros(2, *shape),),
        str(path),
        dynamo=True,
        input_names=["input"],
        output_names=outputs or ["logits"],
        dynamic_shapes=(axes,),
        external_data=False,
        verbose=False,
        optimize=True,
    )


def changed(source: Path, target: Path, change: Callable[[Any], None]) -> Path:
    model = onnx.load(source)
    change(model)
    onnx.save(model, target)
    return target


def grow_first_kernel(model: Any) -> None:
    """From 3x3 to 5x5, of which the margin is zero."""
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    tensor = next(t for t in model.graph.initializer if t.name == node.input[1])
    grown = np.pad(numpy_helper.to_array(tensor), ((0, 0), (0, 0), (1, 1), (1, 1)))
    tensor.CopyFrom(numpy_helper.from_array(grown, tensor.name))
    for attribute in node.attribute:
        if attribute.name in ("pads", "kernel_shape"):
            more = 1 if attribute.name == "pads" else 2
            attribute.ints[:] = [size + more for size in attribute.ints]


def scale_first_channel(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        weight = numpy_helper.to_array(tensor).copy()
        weight[0] = weight[0] * 1.3 + 0.05
        tensor.CopyFrom(numpy_helper.from_array(weight, name))

    return change


def test_an_export_is_its_checkpoints_network(pair: tuple[Path, Path]) -> None:
    report = compare_artefacts(pair[0], [pair[1]])
    (found,) = report.candidates
    assert repr(report).splitlines()[-1].startswith(f"PASSED  {pair[1]}  fp32, smallest margin")
    html = report._repr_html_()
    assert html is not None
    assert f"{pair[1].name}: verdict" in html
    assert report.passed
    assert [case.shape for case in found.verdict.hops] == [
        "1x3x16x16",
        "2x3x16x16",
        "3x3x16x16",
        "17x3x16x16",
        "8x3x16x16",
    ]
    assert found.verdict.hops[-1].outputs[0].samples == 64
    assert found.verdict.yardstick[0].passed
    assert 0 < found.verdict.yardstick[0].candidate_rel_rms < 1e-5


def test_what_manifests_warn_of_and_what_was_assumed_is_said_once(pair: tuple[Path, Path], tmp_path: Path) -> None:
    torch.save(gmconv.load_checkpoint(pair[0]).model.state_dict(), tmp_path / "net.pth")
    for name in ("a.onnx", "b.onnx"):
        shutil.copy(pair[1], tmp_path / name)
        outputs = (TensorSpec("logits", "float32", ("batch", 10)),)
        told = Export(opset=20, warnings=("samples meet",))
        manifest = Manifest(artefact=digest(tmp_path / name, "onnx"), inputs=SPEC, outputs=outputs, export=told)
        sidecar(tmp_path / name).write_text(manifest.to_json())
    foreign = Foreign(arch="resnet20", input_shape=(3, 16, 16))
    options = ParityOptions(samples=4, yardstick=False, foreign=foreign)
    report = compare_artefacts(tmp_path / "net.pth", [tmp_path / "a.onnx", tmp_path / "b.onnx"], options)
    assert report.warnings[0] == "samples meet"
    assert [text.startswith("assumed: the sigma of 19 layers") for text in report.warnings[1:]] == [True]
    assert repr(report).count("warning: samples meet") == 1
    assert repr(report).count("warning: assumed:") == 1
    assert [one["warnings"] for one in report.to_dict()["candidates"]] == [list(report.warnings)] * 2


@pytest.mark.parametrize("name", ["conv1.weight", "layer3.2.conv2.weight", "linear.weight"])
def test_one_corrupted_channel_fails_the_whole_network(pair: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    bad = changed(pair[1], tmp_path / "bad.onnx", scale_first_channel(name))
    report = compare_artefacts(pair[0], [bad], ParityOptions(yardstick=False, samples=8))
    assert not report.passed
    assert "relative RMS error" in report.candidates[0].failures()[0]


def test_onnx_against_onnx(pair: tuple[Path, Path], tmp_path: Path) -> None:
    bad = changed(pair[1], tmp_path / "bad.onnx", scale_first_channel("layer1.0.conv1.weight"))
    report = compare_artefacts(pair[1], [pair[1], bad], ParityOptions(samples=8))
    assert [candidate.passed for candidate in report.candidates] == [True, False]
    assert report.candidates[0].verdict.hops[0].outputs[0].max_abs == 0
    assert report.candidates[0].verdict.yardstick == ()


def test_names_may_differ_from_the_checkpoints(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def rename(model: Any) -> None:
        for node in model.graph.node:
            node.input[:] = ["pixels" if n == "input" else n for n in node.input]
            node.output[:] = ["scores" if n == "logits" else n for n in node.output]
        model.graph.input[0].name, model.graph.output[0].name = "pixels", "scores"

    renamed = changed(pair[1], tmp_path / "renamed.onnx", rename)
    assert compare_artefacts(pair[0], [renamed], ParityOptions(samples=8)).passed


class Twofold(nn.Module):
    """Two outputs of different shapes, in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = gmconv.GMConv2d(3, 4, 3, sigma=1.0)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.conv(x)
        return features, features.amax((2, 3))


def test_several_outputs_of_a_checkpoint_go_by_position(tmp_path: Path) -> None:
    import sys
    import types

    module = types.ModuleType("parity_twofold")
    module.Twofold = Twofold  # type: ignore[attr-defined]
    sys.modules["parity_twofold"] = module
    torch.manual_seed(0)
    model = Twofold().eval()
    gmconv.save_checkpoint(tmp_path / "net.pt", model, arch="parity_twofold:Twofold", input_shape=(3, 8, 8))
    export(gmconv.bake(model), tmp_path / "net.onnx", (3, 8, 8), outputs=["map", "top"])
    options = ParityOptions(samples=8, foreign=Foreign(arch="parity_twofold:Twofold"))
    found = compare_artefacts(tmp_path / "net.pt", [tmp_path / "net.onnx"], options).candidates[0]
    assert found.passed
    assert [output.output for output in found.verdict.hops[0].outputs] == ["map", "top"]
    assert [output.top1 is not None for output in found.verdict.hops[0].outputs] == [False, True]
    assert {item.output for item in found.verdict.yardstick} == {"map", "top"}


def swapped_ends(path: Path) -> Path:
    """Inputs `a` (N, 2), `b` (N, 3) and outputs `x` = 2a, `y` = 3b; b and y first unless `path` is called plain."""
    info, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    inputs = [info("a", kind, ["batch", 2]), info("b", kind, ["batch", 3])]
    outputs = [info("x", kind, ["batch", 2]), info("y", kind, ["batch", 3])]
    nodes = [onnx.helper.make_node("Mul", [a, f"by_{b}"], [b], name=b) for a, b in ("ax", "by")]
    factors = {"by_x": 2.0, "by_y": 3.0}
    if path.stem != "plain":
        inputs.reverse(), outputs.reverse()
    held = [numpy_helper.from_array(np.float32(value), name) for name, value in factors.items()]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, held)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_another_order_of_inputs_and_outputs_is_said(tmp_path: Path) -> None:
    """They are compared by name; who takes them by position would get another one."""
    network, artefact = swapped_ends(tmp_path / "plain.onnx"), swapped_ends(tmp_path / "swapped.onnx")
    said = [
        "its inputs come in another order, and were compared by name: b, a in the artefact, a, b in the network; "
        "take them by name, not by position",
        "its outputs come in another order, and were compared by name: y, x in the artefact, x, y in the network; "
        "take them by name, not by position",
    ]
    done = run(network, artefact, "--report", tmp_path / "report.html")
    assert done.exit_code == 0, done.output
    assert [line for line in done.stdout.splitlines() if "another order" in line] == [f"note: {text}" for text in said]
    assert json.loads(run(network, artefact, "--json").stdout)["candidates"][0]["notes"] == [*said, NOISE_ALONE]
    assert all(text in (tmp_path / "report.html").read_text() for text in said)
    assert "another order" not in run(network, network).stdout


def test_one_networks_inputs_become_anothers_by_name_else_by_position() -> None:
    feeds = {"a": np.zeros((2, 2), np.float32), "b": np.ones((2, 3), np.float32)}
    swapped = (TensorSpec("b", "float32", ("batch", 3)), TensorSpec("a", "float16", ("batch", 2)))
    named = as_inputs(swapped, feeds)
    assert {name: (array.shape, array.dtype.name) for name, array in named.items()} == {
        "b": ((2, 3), "float32"),
        "a": ((2, 2), "float16"),
    }
    other = (TensorSpec("left", "float32", ("batch", 2)), TensorSpec("right", "float32", ("batch", 3)))
    assert {name: array.shape for name, array in as_inputs(other, feeds).items()} == {"left": (2, 2), "right": (2, 3)}


def test_a_network_with_other_inputs_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    grey = gmconv.models.create("resnet20", in_channels=1).eval()
    export(gmconv.bake(grey), tmp_path / "grey.onnx", (1, 16, 16))
    with pytest.raises(RefusedError, match=r"grey\.onnx.*not one network"):
        compare_artefacts(pair[0], [tmp_path / "grey.onnx"])


def test_an_output_that_one_side_lacks_fails(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def add_output(model: Any) -> None:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(model.graph.node[0].output[0]))

    more = changed(pair[1], tmp_path / "more.onnx", add_output)
    report = compare_artefacts(pair[0], [more], ParityOptions(samples=8))
    assert not report.passed
    assert "missing in the reference" in report.candidates[0].failures()[0]


def test_nan_on_both_sides_fails(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def poison(model: Any) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "linear.bias")
        tensor.CopyFrom(numpy_helper.from_array(np.full(10, np.nan, np.float32), tensor.name))

    bad = changed(pair[1], tmp_path / "nan.onnx", poison)
    report = compare_artefacts(bad, [bad], ParityOptions(samples=8))
    assert not report.passed
    assert "NaN or Inf in both sides" in report.candidates[0].failures()[0]


def test_a_constant_network_fails(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def numb(model: Any) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "linear.weight")
        tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(tensor)), tensor.name))

    constant = changed(pair[1], tmp_path / "constant.onnx", numb)
    report = compare_artefacts(constant, [constant], ParityOptions(samples=8))
    assert not report.passed
    assert any("a constant proves nothing" in text for text in report.candidates[0].failures())


def test_a_batch_that_the_graph_claims_and_cannot_run_fails(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def fix_batch_inside(model: Any) -> None:
        graph = model.graph
        graph.initializer.append(numpy_helper.from_array(np.array([2, 10], np.int64), "fixed"))
        graph.node[-1].output[0] = "before"
        graph.node.append(onnx.helper.make_node("Reshape", ["before", "fixed"], ["logits"]))

    bad = changed(pair[1], tmp_path / "fixed.onnx", fix_batch_inside)
    found = compare_artefacts(pair[0], [bad], ParityOptions(samples=8)).candidates[0]
    verdicts = {hop.shape: hop.outputs[0] for hop in found.verdict.hops}
    assert verdicts["2x3x16x16"].passed
    assert "does not run on this input" in verdicts["3x3x16x16"].reason


def test_a_manifest_is_verified_and_claims_no_precision_that_the_graph_has_not(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    path = changed(pair[1], tmp_path / "net.onnx", scale_first_channel("layer3.2.conv2.weight"))
    manifest = Manifest(
        artefact=digest(path, "onnx"),
        inputs=SPEC,
        outputs=(TensorSpec("logits", "float32", ("batch", 10)),),
        chain=(FileDigest("checkpoint", "other.pt", "0" * 64, 1),),
    )
    sidecar(path).write_text(replace(manifest, precision="fp8").to_json())
    with pytest.raises(RefusedError, match="its manifest says fp8, and the graph holds fp32"):
        compare_artefacts(pair[0], [path])
    sidecar(path).write_text(manifest.to_json())
    found = compare_artefacts(pair[0], [path], ParityOptions(samples=8)).candidates[0]
    assert any("was made from other.pt" in text for text in found.verdict.notes)
    sidecar(path).write_text(replace(manifest, artefact=replace(manifest.artefact, sha256="0" * 64)).to_json())
    with pytest.raises(RefusedError, match="sha256"):
        compare_artefacts(pair[0], [path])


def test_another_preprocessing_is_noted(pair: tuple[Path, Path], tmp_path: Path) -> None:
    paths = [changed(pair[1], tmp_path / f"{name}.onnx", lambda model: None) for name in ("a", "b", "c")]
    for path, mean in zip(paths, (0.0, 0.5, None), strict=True):
        manifest = Manifest(
            artefact=digest(path, "onnx"),
            inputs=SPEC,
            outputs=(TensorSpec("logits", "float32", ("batch", 10)),),
            preprocessing=None if mean is None else Preprocessing(size=(16, 16), mean=(mean,) * 3, std=(1.0,) * 3),
        )
        sidecar(path).write_text(manifest.to_json())
    other, silent = compare_artefacts(paths[0], paths[1:], ParityOptions(samples=8)).candidates
    said = "b.onnx is served with other preprocessing than a.onnx: mean 0.5, 0.5, 0.5 (not 0, 0, 0); the same tensors"
    assert any(text.startswith(said) for text in other.verdict.notes)
    assert not any("preprocessing" in text for text in silent.verdict.notes)


def test_the_verdict_says_that_a_file_was_made_from_another_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = changed(pair[1], tmp_path / "net.onnx", lambda model: None)
    manifest = Manifest(
        artefact=digest(path, "onnx"),
        inputs=SPEC,
        outputs=(TensorSpec("logits", "float32", ("batch", 10)),),
        chain=(FileDigest("checkpoint", "other.pt", "0" * 64, 1),),
    )
    sidecar(path).write_text(manifest.to_json())
    report = compare_artefacts(pair[0], [path], ParityOptions(samples=8))
    assert repr(report).splitlines()[-1].endswith(", not from this checkpoint")


@pytest.mark.parametrize(
    ("crop", "allowed"),
    [
        ({"tolerance": 1e-3}, 1e-2 + 2e-5),
        ({"tolerance": None, "budget": {"kind": "top1"}, "end_to_end": {**SEEN, "relative_rms": 0.01}}, 0.05 + 2e-5),
        ({"tolerance": "lossless", "end_to_end": {**SEEN, "relative_rms": 0.01}}, 2e-5),
    ],
)
def test_a_crop_is_judged_by_what_it_may_cost(
    pair: tuple[Path, Path], tmp_path: Path, crop: dict[str, Any], allowed: float
) -> None:
    path = changed(pair[1], tmp_path / "net.onnx", lambda model: None)
    manifest = Manifest(
        artefact=digest(path, "onnx"),
        inputs=SPEC,
        outputs=(TensorSpec("logits", "float32", ("batch", 10)),),
        crop=msgspec.convert({"layers": [LAYER], **crop}, Crop),
    )
    sidecar(path).write_text(manifest.to_json())
    found = compare_artefacts(pair[0], [path], ParityOptions(samples=8)).candidates[0]
    limits = [hop.tolerance.rel_rms for hop in found.verdict.hops if hop.candidate == CUT and hop.tolerance]
    assert (limits or [found.tolerance.rel_rms]) == pytest.approx([allowed] * max(1, len(limits)))
    assert found.tolerance == TOLERANCES["fp32"], "all else is compared with the network cut alike"
    assert bool(limits) == (crop["tolerance"] != "lossless")
    assert any("cropped" in text for text in found.verdict.notes) == (crop["tolerance"] != "lossless")
    assert found.verdict.yardstick


def test_a_cropped_reference_may_differ_too_and_the_same_crop_on_both_sides_may_not(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    def with_crop(name: str, crop: dict[str, Any]) -> Path:
        path = changed(pair[1], tmp_path / name, lambda model: None)
        outputs = (TensorSpec("logits", "float32", ("batch", 10)),)
        sidecar(path).write_text(
            Manifest(
                artefact=digest(path, "onnx"),
                inputs=SPEC,
                outputs=outputs,
                crop=msgspec.convert({"layers": [LAYER], **crop}, Crop),
            ).to_json()
        )
        return path

    crops = {"a.onnx": {"tolerance": 1e-3}, "b.onnx": {"tolerance": 1e-3}, "c.onnx": {"tolerance": 2e-3}}
    a, b, c = (with_crop(name, crop) for name, crop in crops.items())
    options = ParityOptions(samples=8)
    whole = changed(pair[1], tmp_path / "whole.onnx", grow_first_kernel)
    allowed = {
        (a, pair[1]): 0.0,  # without a manifest, and of the same kernels
        (a, whole): 1e-2,
        (a, b): 0.0,
        (a, c): 3e-2,
    }
    for (reference, candidate), cost in allowed.items():
        said = compare_artefacts(reference, [candidate], options)
        (found,) = said.candidates
        assert found.tolerance.rel_rms == pytest.approx(cost + 2e-5)
        assert any("cropped" in text for text in found.verdict.notes) == bool(cost)
        said.show(Console(file=(shown := io.StringIO()), width=200), tables=False)
        assert (f"{cost:.1e} allowed for the crop" in shown.getvalue()) == bool(cost)


def test_half_precision_inputs_are_compared_on_equal_terms(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The reference gets the candidate's rounded inputs, so that only the network's error is judged."""

    def halve(model: Any) -> None:
        graph = model.graph
        for node in graph.node:
            node.input[:] = ["wide" if n == "input" else n for n in node.input]
        graph.node.insert(0, onnx.helper.make_node("Cast", ["input"], ["wide"], to=1))
        graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16

    half = changed(pair[1], tmp_path / "half.onnx", halve)
    found = compare_artefacts(pair[0], [half], ParityOptions(samples=8)).candidates[0]
    assert found.passed
    assert found.verdict.hops[0].outputs[0].rel_rms < 2e-6


def test_precision_is_read_from_the_graph_where_there_is_no_manifest(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def halve(model: Any) -> None:
        tensor = model.graph.initializer[0]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), "half"))
        name = next(
            n
            for node in model.graph.node
            for n in node.input
            if n not in {t.name for t in model.graph.initializer} and n.startswith("conv1.w")
        )
        model.graph.node.insert(0, onnx.helper.make_node("Cast", ["half"], [name], to=1))

    half = changed(pair[1], tmp_path / "half.onnx", halve)
    found = compare_artefacts(pair[0], [half], ParityOptions(samples=8)).candidates[0]
    assert found.precision == "fp16"
    assert any("judged as fp16" in note for note in found.verdict.notes)


def test_calibrated_graphs_are_judged_on_data_when_there_is_some(digits_checkpoint: Path, digits_onnx: Path) -> None:
    found = compare_artefacts(digits_checkpoint, [digits_onnx], ParityOptions(precision="int8", samples=24)).candidates[
        0
    ]
    assert {case.inputs for case in found.verdict.hops} == {"digits"}
    assert [case.outputs[0].samples for case in found.verdict.hops] == [1, 2, 3, 17, 24]
    found = compare_artefacts(digits_checkpoint, [digits_onnx], ParityOptions(samples=24)).candidates[0]
    assert {case.inputs for case in found.verdict.hops} == {"noise", "digits"}


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_corners_of_a_profile() -> None:
    profile = {"input": ShapeRange((1, 3, 16, 16), (8, 3, 32, 32), (32, 3, 64, 64))}
    corners, main = corner_shapes((TensorSpec("input", "float32", ("batch", 3, "h", "w")),), (profile,), Facts())
    shapes = [corner["input"] for corner in corners]
    assert main == {"input": (8, 3, 32, 32)}
    assert {(n, 3, s, s) for n in (1, 8, 32) for s in (16, 32, 64)} <= set(shapes)
    assert any(shape[0] % 2 == 1 and 1 < shape[0] < 32 for shape in shapes)
    assert len(shapes) == len(set(shapes))


def test_every_profile_is_visited() -> None:
    profiles = tuple({"input": ShapeRange(*[(n, 3, 16, 16)] * 3)} for n in (1, 4))
    corners, _ = corner_shapes(SPEC, profiles, Facts())
    assert {corner["input"][0] for corner in corners} == {1, 4}


def test_a_fixed_batch_is_the_only_corner() -> None:
    corners, main = corner_shapes((TensorSpec("input", "float32", (4, 3, 16, 16)),), (), Facts())
    assert corners == [main] == [{"input": (4, 3, 16, 16)}]


def test_free_sides_are_tried_larger_and_not_square() -> None:
    spec = (TensorSpec("input", "float32", ("batch", 3, "h", "w")),)
    corners, main = corner_shapes(spec, (), Facts(input_shape=(3, 16, 16)))
    sides = {corner["input"][2:] for corner in corners}
    assert main == {"input": (8, 3, 16, 16)}
    assert len(sides) == 4
    assert any(h % 2 and w % 2 and h < 16 for h, w in sides), "smaller and odd"
    assert any(h != w for h, w in sides)
    with pytest.raises(RefusedError, match="nothing says which is usual"):
        corner_shapes(spec, (), Facts())


def test_free_sides_end_to_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gmconv.models.create("resnet20").eval()
    gmconv.save_checkpoint(tmp_path / "net.pt", model, arch="gmconv.models:resnet20", input_shape=(3, 16, 16))
    export(gmconv.bake(model), tmp_path / "net.onnx", (3, 16, 16), free_sides=True)
    report = compare_artefacts(tmp_path / "net.pt", [tmp_path / "net.onnx"], ParityOptions(samples=8))
    assert report.passed
    assert len({case.shape.split("x", 1)[1] for case in report.candidates[0].verdict.hops}) == 4


# --- inputs ---------------------------------------------------------------------------------------------------------


def test_inputs_from_a_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((11, 3, 16, 16), dtype=np.float32)
    np.savez(tmp_path / "x.npz", input=images)
    (case,) = compare_artefacts(pair[0], [pair[1]], ParityOptions(inputs=tmp_path / "x.npz")).candidates[0].verdict.hops
    assert case.outputs[0].samples == 11
    assert case.inputs == "x.npz"


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"input": np.zeros((2, 3, 16, 16), np.uint8)}, "uint8"),
        ({"input": np.zeros((2, 3, 16), np.float32)}, r"float32 \(2, 3, 16\)"),
        ({"input": np.zeros((0, 3, 16, 16), np.float32)}, "at least 1"),
        ({"a": np.zeros(2), "b": np.zeros(2)}, r"holds a float64 \(2,\), b float64 \(2,\), no 'input'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, arrays: dict[str, Any], words: str
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(RefusedError, match=words):
        compare_artefacts(pair[0], [pair[1]], ParityOptions(inputs=tmp_path / "x.npz"))


def test_another_networks_file_is_refused_or_fails(pair: tuple[Path, Path], tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = gmconv.models.create("resnet20").eval()
    export(gmconv.bake(other), tmp_path / "other.onnx", (3, 16, 16))
    assert not compare_artefacts(pair[0], [tmp_path / "other.onnx"], ParityOptions(samples=8)).passed
    wide = gmconv.models.create("resnet20", num_classes=12).eval()
    export(gmconv.bake(wide), tmp_path / "wide.onnx", (3, 16, 16))
    failed = compare_artefacts(pair[0], [tmp_path / "wide.onnx"], ParityOptions(samples=8)).candidates[0]
    assert "nothing is broadcast" in failed.failures()[0]


# --- command line ---------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    from click.testing import CliRunner

    from runtime.parity.__main__ import main

    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_table_ends_with_passed(pair: tuple[Path, Path]) -> None:
    done = run(*pair, "--samples", 8)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1].startswith("PASSED")
    assert "fp32 tolerance 2.0e-05" in done.stdout
    assert "float64 yardstick" in done.stdout


def test_json_is_one_document_and_progress_stays_off_stdout(pair: tuple[Path, Path]) -> None:
    done = run(*pair, "--json", "--samples", 8)
    found = json.loads(done.stdout)
    assert found["passed"] is True
    assert found["candidates"][0]["tolerance"]["source"] == TOLERANCES["fp32"].source
    assert found["candidates"][0]["hops"][0]["outputs"][0]["rel_rms"] < 1e-5


def test_an_overridden_tolerance_is_said(pair: tuple[Path, Path], tmp_path: Path) -> None:
    bad = changed(pair[1], tmp_path / "bad.onnx", scale_first_channel("layer1.0.conv1.weight"))
    done = run(pair[0], bad, "--samples", 8, "--tolerance", 0.999)
    assert "tolerance 0.999 was given; the table says 2e-05" in done.stdout
    assert run(pair[0], bad, "--tolerance", 2).exit_code == 2


def test_failure_is_exit_4_and_names_the_layer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    bad = changed(pair[1], tmp_path / "bad.onnx", scale_first_channel("layer2.1.conv1.weight"))
    done = run(pair[0], bad, "--samples", 8, "--bisect", "--quiet")
    assert done.exit_code == 4
    assert done.output.count("relative RMS error") == done.stdout.count("FAILED") == 1
    assert "first layer out of tolerance: layer2.1.conv1 (Conv, sigma 1.000)" in done.stdout


def test_the_report_is_one_file_with_the_verdict(pair: tuple[Path, Path], tmp_path: Path) -> None:
    bad = changed(pair[1], tmp_path / "bad.onnx", scale_first_channel("layer2.1.conv1.weight"))
    done = run(pair[0], pair[1], bad, "--samples", 8, "--bisect", "--quiet", "--report", tmp_path / "report.html")
    assert done.exit_code == 4
    text = (tmp_path / "report.html").read_text()
    assert "layer2.1.conv1" in text
    assert "bad.onnx" in text
    assert "relative RMS error" in text
    assert "http://" not in text.replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), 2),
        (("none.pt",), 2),
        (("none.pt", "none.onnx"), 3),
        (("none.pt", "none.onnx", "--precision", "int4"), 2),
        (("none.pt", "none.onnx", "--samples", "0"), 2),
        (("none.pt", "none.onnx", "--input-shape", "3x3"), 2),
        (("none.pt", "none.onnx", "--inputs", "a.npz", "--data", "digits"), 2),
    ],
)
def test_usage_and_missing_files(arguments: tuple[str, ...], code: int) -> None:
    assert run(*arguments).exit_code == code


@pytest.mark.parametrize("suffix", [".pt", ".onnx", ".plan", ".safetensors"])
def test_foreign_bytes_of_every_kind_are_refused(pair: tuple[Path, Path], tmp_path: Path, suffix: str) -> None:
    foreign = tmp_path / f"foreign{suffix}"
    foreign.write_bytes(b"not an artefact at all\n" * 20)
    with pytest.raises(click.ClickException) as refusal:
        compare_artefacts(pair[0], [foreign])
    assert refusal.value.exit_code in ((3, 6) if suffix == ".plan" else (3,))
    assert "\n" not in refusal.value.message


def test_the_module_runs_as_a_command(pair: tuple[Path, Path], cli: Cli) -> None:
    assert "PASSED" in cli("runtime.parity", str(pair[0]), str(pair[1]), "--samples", "8", "--quiet").stdout
    missing = cli("runtime.parity", str(pair[0]), "none.onnx", code=3)
    assert missing.stderr.strip().endswith("none.onnx: no such file")
