"""`--bisect` on int8 and fp8 graphs, where every layer is off by design: the corrupted one is named, whatever it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import gmconv
from export.precision.convert import convert_precision
from export.precision.converter import PrecisionOptions
from gmconv.data import load_samples
from runtime.parity.bisect import bisect
from runtime.parity.bisect_quantized import allowed, judge_quantized
from runtime.parity.bisection import Bisection, LayerError
from runtime.parity.run import ParityOptions, compare_artefacts
from runtime.parity.tolerances import TOLERANCES, of_a_crop, widen
from runtime.runners import open_runner
from tests.runtime.parity.test_bisect import randomize_norms, save

pytestmark = pytest.mark.xdist_group("test_bisect_quantized")  # its networks are exported once

Change = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
KINDS = ("int8", "fp8")
OPTIONS = ParityOptions(bisect=True, yardstick=False, samples=8, images="digits")
LARGEST = {"int8": 127.0, "fp8": 448.0}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ResNet-20 on digits: checkpoint, int8, fp8, and int8 laid out for a CPU."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("quantized")
    model = randomize_norms(gmconv.models.create("resnet20", sigma=0.9))
    checkpoint, fp32 = save(model, folder, "gmconv.models:resnet20", (3, 16, 16))
    found = {"pt": checkpoint}
    for kind in KINDS:
        options = PrecisionOptions(calibration="digits", calibration_images=64)
        convert_precision(fp32, folder / f"{kind}.onnx", kind, options, verify=False)
        found[kind] = folder / f"{kind}.onnx"
    options = PrecisionOptions(calibration="digits", calibration_images=64, target="cpu")
    convert_precision(fp32, folder / "cpu.onnx", "int8", options, verify=False)
    return found | {"cpu": folder / "cpu.onnx", "fp32": fp32}


class Planted:
    """A quantized graph of which one initializer can be changed."""

    def __init__(self, path: Path, kind: str, folder: Path) -> None:
        self.model, self.kind, self.path = onnx.load(path), kind, folder / "bad.onnx"
        self.tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.producer = {name: node for node in self.model.graph.node for name in node.output}
        self.layers: dict[str, Any] = {}
        for node in self.model.graph.node:
            if node.op_type in ("Conv", "Gemm"):
                self.layers[self.producer[node.input[1]].input[0].rsplit(".weight", 1)[0]] = node

    def plant(self, layer: str, what: str, change: Change) -> Path:
        """Change the weight (in 8 bits), its scale, the bias, or the scale of the input of a layer."""
        node = self.layers[layer]
        name = {
            "weight": self.producer[node.input[1]].input[0],
            "weight scale": self.producer[node.input[1]].input[1],
            "bias": node.input[2],
            "input scale": self.producer[node.input[0]].input[1],
        }[what]
        tensor = self.tensors[name]
        assert sum(name in n.input for n in self.model.graph.node) <= 2, "of this layer alone"
        values = change(numpy_helper.to_array(tensor).astype(np.float32))
        if what == "weight":
            kind = TensorProto.INT8 if self.kind == "int8" else TensorProto.FLOAT8E4M3FN
            stored = np.clip(values, -LARGEST[self.kind], LARGEST[self.kind])
            raw = stored.round().astype(np.int8) if self.kind == "int8" else stored.astype(ml_dtypes.float8_e4m3fn)
            tensor.CopyFrom(helper.make_tensor(name, kind, stored.shape, raw.tobytes(), raw=True))
        else:
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))
        onnx.save(self.model, self.path)
        return self.path


def raised(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """All channels, as far as a wrong scale or offset would move them."""
    return values * 1.3 + 0.25 * np.abs(values).max()


def found_in(checkpoint: Path, bad: Path) -> Bisection:
    (candidate,) = compare_artefacts(checkpoint, [bad], OPTIONS).candidates
    assert not candidate.passed
    assert candidate.bisection is not None
    return candidate.bisection


def layer_by_layer(checkpoint: Path, path: Path, kind: str) -> Bisection:
    """What `--bisect` finds, whether or not parity fails."""
    samples = load_samples("digits", input_shape=(3, 16, 16), limit=8)
    feeds = {"input": np.concatenate([batch.images for batch in samples])}
    with open_runner(checkpoint) as reference:
        return bisect(reference, path, feeds, TOLERANCES[kind])


@pytest.mark.parametrize("graph", ["int8", "fp8", "cpu"])
def test_the_clean_graph_passes_and_blames_no_layer(network: dict[str, Path], graph: str) -> None:
    kind = "fp8" if graph == "fp8" else "int8"
    assert compare_artefacts(network["pt"], [network[graph]], OPTIONS).passed
    found = layer_by_layer(network["pt"], network[graph], kind)
    assert found.culprit is None
    weighted = [layer for layer in found.layers if layer.precision]
    assert {layer.precision for layer in weighted} == {kind}
    assert len(weighted) == 20
    assert all(0 < layer.own_weights < layer.own for layer in weighted)


@pytest.mark.parametrize("layer", ["conv1", "layer1.1.conv2", "layer2.0.conv1", "layer3.1.conv1", "linear"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupted_weight_is_found(network: dict[str, Path], tmp_path: Path, kind: str, layer: str) -> None:
    bad = Planted(network[kind], kind, tmp_path).plant(layer, "weight", raised)
    found = found_in(network["pt"], bad)
    assert found.culprit is not None
    assert found.culprit.name == layer
    assert "its weights, their scales or its bias" in found.sentence


@pytest.mark.parametrize(
    ("what", "change", "blamed"),
    [
        ("weight scale", lambda values: values * 4, "its weights"),
        ("bias", lambda values: values + 8 * np.abs(values).max(), "its weights"),
        ("input scale", lambda values: values / 50, "the scale of its input's Q/DQ"),
    ],
)
@pytest.mark.parametrize("layer", ["conv1", "linear"])  # no shortcut leads around them
@pytest.mark.parametrize("kind", KINDS)
def test_what_else_a_layer_has_is_found_too(
    network: dict[str, Path], tmp_path: Path, kind: str, layer: str, what: str, change: Change, blamed: str
) -> None:
    bad = Planted(network[kind], kind, tmp_path).plant(layer, what, change)
    found = found_in(network["pt"], bad)
    assert found.culprit is not None
    assert found.culprit.name == layer
    assert blamed in found.sentence


@pytest.mark.parametrize("graph", ["int8", "fp8", "cpu"])
def test_twenty_of_twenty(network: dict[str, Path], tmp_path: Path, graph: str) -> None:
    """By layer alone, for in some of them an error that parity lets pass."""
    kind = "fp8" if graph == "fp8" else "int8"
    names = list(Planted(network[graph], kind, tmp_path).layers)
    assert len(names) == 20
    named = {}
    for layer in names:
        found = layer_by_layer(
            network["pt"], Planted(network[graph], kind, tmp_path).plant(layer, "weight", raised), kind
        )
        named[layer] = found.culprit and found.culprit.name
    assert named == {name: name for name in named}


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_beyond_the_calibrated_range_do_not_hide_a_wrong_weight(
    network: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Noise of a hundred times the range saturates the first Q/DQ: conv1 is off, and yet not what is wrong."""
    bad = Planted(network[kind], kind, tmp_path).plant("layer2.1.conv2", "weight", raised)
    noise = 30 * np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "noise.npz", input=noise)
    options = ParityOptions(bisect=True, yardstick=False, inputs=tmp_path / "noise.npz")
    (candidate,) = compare_artefacts(network["pt"], [bad], options).candidates
    assert candidate.bisection is not None
    first = candidate.bisection.layers[0]
    assert (first.name, first.own > 0.3) == ("conv1", True)
    assert candidate.bisection.culprit is not None
    assert candidate.bisection.culprit.name == "layer2.1.conv2"


@pytest.mark.parametrize(("keep", "factor"), [("layer2.1.conv1", 1.02), ("layer2.*", 1.005)])
@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8", "fp8"])
def test_a_layer_kept_in_fp32_has_fp32s_tolerance(
    network: dict[str, Path], tmp_path: Path, kind: str, keep: str, factor: float
) -> None:
    images = {"calibration": "digits", "calibration_images": 8} if kind in KINDS else {}
    options, path = PrecisionOptions(keep_fp32=(keep,), **images), tmp_path / "kept.onnx"
    convert_precision(network["fp32"], path, kind, options, verify=False)
    clean = layer_by_layer(network["pt"], path, kind)
    assert clean.culprit is None
    assert "so none is named" in clean.sentence
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "layer2.1.conv1.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    onnx.save(model, path)
    found = layer_by_layer(network["pt"], path, kind)
    assert found.culprit is not None
    assert (found.culprit.name, found.culprit.precision) == ("layer2.1.conv1", "fp32")
    only = kind in KINDS and keep == "layer2.1.conv1"
    assert ("there is no other fp32 layer" in found.sentence) == only


def test_a_kept_layer_that_is_cropped_may_be_off_by_what_its_crop_costs() -> None:
    tolerance = widen(TOLERANCES["bf16"], 1e-2)
    layer = a_layer("kept", 5e-3, 5e-3, "fp32")
    assert allowed(layer, TOLERANCES["bf16"]).rel_rms < 5e-3 < allowed(layer, tolerance).rel_rms < 2e-2
    usual = [a_layer(f"q{i}", 0.007, 0.015) for i in range(5)]
    assert judge_quantized([*usual, layer]) is not None
    assert judge_quantized([*usual, layer], of_a_crop(tolerance)) is None


def a_layer(name: str, weights: float, own: float, precision: str = "int8") -> LayerError:
    return LayerError(
        name=name,
        ops="Conv",
        tensor=name,
        sigma=None,
        own=own,
        own_max=4 * own,
        accumulated=own,
        accumulated_max=4 * own,
        precision=precision,
        own_weights=weights,
    )


def test_a_layer_kept_higher_is_judged_by_its_own_type() -> None:
    """An error that is usual in fp8 is an error in fp16; a layer that reads quantized tensors may be off by them."""
    usual = [a_layer(f"q{i}", 0.025, 0.037, "fp8") for i in range(5)]
    kept = [a_layer(f"h{i}", 3e-4, 0.02, "fp16") for i in range(3)]
    assert judge_quantized([*usual, *kept]) is None
    found = judge_quantized([*usual, *kept, a_layer("bad", 0.02, 0.03, "fp16")])
    assert found is not None
    assert found.culprit is not None
    assert found.culprit.name == "bad"


def test_less_than_a_type_may_cost_and_yet_apart_from_the_others() -> None:
    found = judge_quantized([a_layer(f"q{i}", 1e-3, 2e-3) for i in range(5)] + [a_layer("bad", 0.02, 0.02)])
    assert found is not None
    assert found.culprit is not None
    assert found.culprit.name == "bad"


def test_infinity_is_out_of_line_and_what_cannot_be_measured_is_not() -> None:
    usual = [a_layer(f"q{i}", 7e-3, 0.015) for i in range(5)]
    assert judge_quantized([*usual, a_layer("unknown", math.nan, math.nan)]) is None
    found = judge_quantized([a_layer("bad", math.inf, math.inf), *usual])
    assert found is not None
    assert found.culprit is not None
    assert found.culprit.name == "bad"
