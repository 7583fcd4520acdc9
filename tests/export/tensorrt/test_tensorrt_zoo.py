"""The zoo as TensorRT-RTX engines: a baked network becomes the engine of its plain twin, in fp32 and in fp16."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest

from export.precision.convert import convert_precision
from export.tensorrt.build import BuildOptions, build_engine
from gmconv.files import sha256_file
from runtime.manifest import Manifest

# What trains as GMConv exports as plain convolutions; the exports of both kinds run at the same time. The wide dense
# layers of AlexNet and VGG (nine tenths of their bytes, no convolution) give way to one linear layer.
EXPORT = """
import sys, tempfile
from pathlib import Path
import onnx_ir, torch
import gmconv.models
from export.graph import capture

name, kind, path, batch, size = sys.argv[1:]
torch.manual_seed(0)
model = gmconv.models.create(name, gmconv=kind == "baked", num_classes=10).eval()
if name in ("alexnet", "vgg11"):
    wide = next(layer for layer in model.classifier if isinstance(layer, torch.nn.Linear))
    model.classifier = torch.nn.Linear(wide.in_features, 10)
model = gmconv.bake(model, inplace=True) if kind == "baked" else model
axes = capture.Axes(batch=batch == "dynamic", hw=False)
example = torch.zeros(2, 3, int(size), int(size))
exported = capture.to_onnx(
    model, {"input": example}, output_names=["logits"], axes=axes, opset=20, log=Path(path + ".log")
)
onnx_ir.save(exported.model, path)
"""
CONVOLUTIONS = {"alexnet": 5, "resnet18": 20, "resnet50": 53, "mobilenet_v2": 52, "vgg11": 8}
RTX = BuildOptions(flavor="rtx", verify=False)


@dataclass(frozen=True)
class Pair:
    """One network of the zoo as ONNX, baked and plain."""

    name: str
    files: dict[str, Path]


def export(folder: Path, name: str, kinds: tuple[str, ...], batch: str = "dynamic") -> dict[str, Path]:
    files = {kind: folder / f"{name}-{kind}.onnx" for kind in kinds}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", EXPORT, name, kind, str(path), batch, "224" if name == "vgg11" else "64"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
        )
        for kind, path in files.items()
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    return files


FAST = ("resnet18",)
NETWORKS = [
    pytest.param(n, marks=[pytest.mark.xdist_group(n), *([] if n in FAST else [pytest.mark.slow])])
    for n in CONVOLUTIONS
]


@pytest.fixture(scope="module", params=NETWORKS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, export(tmp_path_factory.mktemp(request.param), request.param, ("baked", "twin")))


def count(path: Path, *kinds: str) -> int:
    return sum(node.op_type in kinds for node in onnx.load(path, load_external_data=False).graph.node)


def facts(manifest: Manifest) -> dict[str, Any]:
    return {key: getattr(manifest.build.layers, key) for key in ("total", "convolutions", "fused_epilogues")}


def test_a_baked_network_fuses_as_its_plain_twin_does(pair: Pair) -> None:
    for precision in ("fp32", "fp16"):
        same_fusions(pair, precision)


def same_fusions(pair: Pair, precision: str) -> None:
    engines = {}
    for kind, path in pair.files.items():
        assert count(path, "Conv") == CONVOLUTIONS[pair.name]
        source = path
        if precision == "fp16":
            source = path.with_suffix(".fp16.onnx")
            convert_precision(path, source, "fp16", verify=False)
        engines[kind] = build_engine(source, source.with_suffix(".plan"), RTX)
    baked, twin = engines["baked"], engines["twin"]
    assert facts(baked) == facts(twin)
    assert baked.precision_found == twin.precision_found
    assert baked.precision == precision
    assert set(baked.build.layers.convolution_precisions) == {precision}
    assert baked.build.layers.mask_multiplications == 0
    # A 1x1 convolution at the end may become a matrix product; nothing else may be missing.
    assert CONVOLUTIONS[pair.name] - 1 <= baked.build.layers.convolutions <= CONVOLUTIONS[pair.name]
    # Which epilogues fuse is TensorRT's choice (ResNet-50: 40 of 53 in fp16); that it is the twin's is asserted above.
    assert baked.build.layers.fused_epilogues > CONVOLUTIONS[pair.name] / 2


def test_a_fixed_batch_builds_too(tmp_path: Path) -> None:
    source = export(tmp_path, "resnet8", ("baked",), batch="fixed")["baked"]
    half = tmp_path / "half.onnx"
    convert_precision(source, half, "fp16", verify=False)
    for path, precision in ((source, "fp32"), (half, "fp16")):
        manifest = build_engine(path, path.with_suffix(".plan"), RTX)
        assert manifest.profiles == ()
        assert manifest.outputs[0].shape == (2, 10)
        assert set(manifest.build.layers.convolution_precisions) == {precision}


@pytest.mark.slow
def test_builds_of_a_large_network_repeat_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else differs: where the files lie, how long their paths and the environment are, who starts it."""
    source = export(tmp_path, "resnet50", ("baked",))["baked"]
    found = {build_engine(source, tmp_path / "m.plan", RTX).artefact.sha256}
    for number in (1, 2):
        monkeypatch.setenv("UNRELATED", "x" * 700 * number)
        folder = tmp_path / ("deep/" * 3 * number)
        folder.mkdir(parents=True, exist_ok=True)
        copy = folder / source.name
        copy.write_bytes(source.read_bytes())
        found.add(build_engine(copy, folder / "m.plan", RTX).artefact.sha256)
    command = [sys.executable, "-m", "export.tensorrt", source, "--flavor", "rtx", "--no-verify", "-o", "n.plan"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    found.add(sha256_file(tmp_path / "n.plan"))
    assert len(found) == 1
