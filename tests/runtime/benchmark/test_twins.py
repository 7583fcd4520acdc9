"""--twin on a real checkpoint: a twin is the same export and the same build of the network without masks."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from export.onnx import export_onnx
from export.precision import convert_precision
from export.precision.plan import PrecisionPlan
from export.tensorrt import BuildOptions, build_engine
from export.tensorrt.profiles import batch_request
from gmconv.errors import RefusedError
from gmconv.foreign import Foreign
from runtime.benchmark import twins
from runtime.benchmark.measure import Artefact, Prepared
from runtime.benchmark.options import Options
from runtime.benchmark.twins import Twins, export_flags, precision_flags, refuse_another_graph, with_twins
from runtime.manifest import read_manifest
from runtime.records import Crop, Export
from runtime.runners import open_runner
from runtime.runners.torch import write_twin


def test_the_twin_has_the_weights_and_no_masks(small_checkpoint: Path, tmp_path: Path) -> None:
    import torch

    import gmconv

    twin, live, baked = with_twins([Artefact(small_checkpoint)], tmp_path)
    assert [c.reference for c in (twin, live, baked)] == [0, 0, 0]
    assert (live.artefact.options["form"], baked.artefact.options["form"]) == ("live", "baked")
    plain = gmconv.bake(gmconv.load_checkpoint(twin.artefact.path).model)
    trained = gmconv.load_checkpoint(small_checkpoint).model
    assert not any("sigma" in key for key in plain.state_dict())
    for key, value in plain.state_dict().items():
        own = trained.state_dict()[key]
        assert torch.equal(value.sign(), own.sign()) if value.ndim == 4 else torch.equal(value, own), key
    feeds = {"input": np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)}
    outputs = []
    for contender in (twin, live, baked):
        with open_runner(contender.artefact.path, **contender.artefact.options) as runner:
            outputs.append(runner.run(feeds)["logits"])
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3, "the masks matter here, so the twin answers otherwise"
    np.testing.assert_array_equal(outputs[1], outputs[2])


def test_of_two_sets_of_weights_the_twin_has_the_chosen_one(tmp_path: Path) -> None:
    import torch

    import gmconv

    raw, average = (gmconv.models.create("resnet8", num_classes=10) for _ in range(2))
    torch.save({"state_dict": raw.state_dict(), "ema": average.state_dict()}, tmp_path / "two.pt")
    foreign = Foreign(arch="resnet8", input_shape=(3, 16, 16), weights="ema")
    twin, live, _ = with_twins([Artefact(tmp_path / "two.pt")], tmp_path, foreign)
    kept = gmconv.load_checkpoint(twin.artefact.path).model.state_dict()
    assert torch.equal(kept["conv1.weight"].sign(), average.state_dict()["conv1.weight"].sign())
    for contender in (twin, live):
        with Prepared(contender.artefact, Options(foreign=foreign)) as opened:
            assert opened.feeds.keys() == {"input"}


def test_a_twin_needs_one_checkpoint(small_checkpoint: Path, tmp_path: Path) -> None:
    plan = tmp_path / "a.plan"
    plan.touch()
    for artefacts in ([plan], [small_checkpoint, small_checkpoint]):
        with pytest.raises(click.UsageError, match="--twin"):
            with_twins([Artefact(path) for path in artefacts], tmp_path)


def test_an_engine_without_a_manifest_has_no_twin(small_checkpoint: Path, tmp_path: Path) -> None:
    plan = tmp_path / "a.plan"
    plan.write_bytes(b"ftrt")
    alone = with_twins([Artefact(small_checkpoint), Artefact(plan)], tmp_path)[-1]
    assert (alone.artefact.path, alone.reference) == (plan, 3)
    assert alone.no_twin == "it has no manifest, which would say how it was exported"


def test_an_engine_has_a_twin_that_is_built_as_it_was(
    digits_checkpoint: Path, digits_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder = tmp_path / "own.plan", tmp_path / "twins"
    folder.mkdir()
    asked = BuildOptions(flavor="rtx", profiles=(batch_request(2, 4, 6),), tf32=True, optimization_level=2)
    built = build_engine(digits_onnx, plan, asked)
    commands: list[list[str]] = []
    real = twins._succeed

    def copy(command: list[str], what: str) -> None:  # the export itself has a test above
        commands.append(command)
        if what == "built":
            real(command, what)
        for suffix in ("", ".json") if what == "exported" else ():
            shutil.copyfile(f"{digits_onnx}{suffix}", f"{command[3]}{suffix}")

    monkeypatch.setattr(twins, "_succeed", copy)
    graphs = {"cuda_graph": False}
    contenders = with_twins([Artefact(digits_checkpoint), Artefact(plan, graphs)], folder)
    *_, twin, own = contenders
    assert [(c.artefact.name, c.reference, c.live) for c in contenders] == [
        ("torch twin (no masks)", 0, False),
        ("torch live", 0, True),
        ("torch baked", 0, False),
        ("twin of own.plan@cuda_graph=False", 3, False),
        ("own.plan@cuda_graph=False", 3, False),
    ]
    exported, *_ = commands
    assert (exported[0], Path(exported[1]).name) == ("export.onnx", "twin.pt")
    assert twin.artefact.options == own.artefact.options == graphs, "each pair in the mode that was asked for"
    other = read_manifest(twin.artefact.path)
    assert other.profiles == built.profiles
    assert other.build is not None
    assert built.build is not None
    spent = {"seconds": other.build.seconds, "peak_memory": other.build.peak_memory}
    assert other.build == replace(built.build, **spent)


@pytest.fixture(scope="module")
def artefacts(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One export with nothing as usual, and what conversions with flags of their own made of it."""
    folder = tmp_path_factory.mktemp("artefacts")
    whole, data = folder / "whole.onnx", folder / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(data, images=rng.normal(0.3, 2.0, (8, 3, 16, 16)).astype(np.float32))
    export_onnx(small_checkpoint, whole, batch=4, opset=18, input_names="img", fuse=True, external_data=True)
    layers = [layer["name"] for layer in (read_manifest(whole).certificate or {})["layers"]]
    plan = PrecisionPlan(precision="int8", keep={layers[0]: "fp32", layers[2]: "fp16"})
    asked: dict[str, dict[str, Any]] = {
        "cpu": {"to": "int8", "target": "cpu", "data": data},
        "kept": {"to": "int8", "target": "cpu", "data": data, "keep_fp32": ("layer2", "conv1")},
        "mixed": {"to": "int8", "data": data, "plan": plan},
        "fp16": {"to": "fp16", "io_dtype": "fp16", "keep_fp32": ("layer3.*",)},
        "bf16": {"to": "bf16", "keep_fp32": ("conv1",)},
    }
    for name, choices in asked.items():
        convert_precision(whole, folder / f"{name}.onnx", verify=False, **choices)
    return {name: folder / f"{name}.onnx" for name in ("whole", *asked)}


def test_a_twin_is_the_same_export(small_checkpoint: Path, artefacts: dict[str, Path], tmp_path: Path) -> None:
    """Layout, layers kept, batch, opset, dtypes of the interface: noise calibrates what nobody has images for."""
    made = Twins(tmp_path / "twin.pt")
    write_twin(small_checkpoint, made.checkpoint)
    for name, file in artefacts.items():
        own, other = read_manifest(file), read_manifest(made.of(file, name))
        assert own.export is not None
        assert other.export == replace(own.export, notes=other.export.notes if other.export else ()), name
        assert (other.inputs, other.outputs, other.quantization) == (own.inputs, own.outputs, own.quantization), name
        assert (other.precision, other.precision_found) == (own.precision, own.precision_found), name
        assert twins._layers(other) == twins._layers(own), name
        assert bool(other.external) == bool(own.external), name
        assert twins._operators(made.checkpoint.with_name(other.artefact.file)) == twins._operators(file), name
    assert len(made.exported) == 1, "the six were one export"


def test_what_was_asked_of_an_export_is_asked_of_its_twins(artefacts: dict[str, Path]) -> None:
    manifest = read_manifest(artefacts["whole"])
    usual = ["--opset", "20", "--input-names", "img"]
    kernels = {"kernels": [{"kind": "kept"}]}
    for export, more, flags in [
        (Export(opset=20, operators={"Conv": 1}), {}, []),
        (Export(opset=20, operators={"Conv": 1}, batch=3, dynamic_hw=True), {}, ["--batch", "3", "--dynamic-hw"]),
        (Export(opset=20, operators={"Conv": 1}, simplify=True, fuse=True), {}, ["--simplify", "--fuse"]),
        (Export(opset=20, operators={"Conv": 1}), {"certificate": kernels}, ["--keep-dynamic"]),
    ]:
        assert export_flags(replace(manifest, external=(), export=export, **more)) == [*usual, *flags]
    for unsaid in (None, Export(opset=20)):
        with pytest.raises(RefusedError, match="does not say how it was exported"):
            export_flags(replace(manifest, export=unsaid))


def test_a_manifest_that_does_not_say_its_layers_precision_is_refused(
    artefacts: dict[str, Path], tmp_path: Path
) -> None:
    known = read_manifest(artefacts["cpu"])
    for changed in (replace(known, certificate=None), replace(known, quantization=None)):
        with pytest.raises(RefusedError, match="which of its layers are in which precision"):
            precision_flags(changed, tmp_path / "twin.onnx")
    assert not [*tmp_path.iterdir()]


def test_another_graph_is_no_twin(artefacts: dict[str, Path]) -> None:
    """Also where the manifest says nothing of what makes the difference: the files are compared."""
    own = read_manifest(artefacts["cpu"])
    refuse_another_graph(artefacts["cpu"], artefacts["cpu"], own)
    for other in ("kept", "mixed", "whole"):
        with pytest.raises(RefusedError, match="has other operators"):
            refuse_another_graph(artefacts[other], artefacts["cpu"], own)
        refuse_another_graph(artefacts[other], artefacts["cpu"], replace(own, crop=Crop()))
    with pytest.raises(RefusedError, match="has other operators"):
        refuse_another_graph(artefacts["cpu"], artefacts["kept"], own)


def test_what_has_no_twin_costs_no_other_its_own(
    small_checkpoint: Path, artefacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bare.onnx"
    shutil.copyfile(artefacts["fp16"], bare)
    monkeypatch.setattr(Twins, "export", lambda *_: artefacts["whole"])
    *_, alone, twin, own = with_twins([Artefact(p) for p in (small_checkpoint, bare, artefacts["whole"])], tmp_path)
    assert (alone.artefact.path, alone.no_twin[:18]) == (bare, "it has no manifest")
    assert (twin.artefact.name, own.reference) == ("twin of whole.onnx", 4)
    monkeypatch.undo()
    monkeypatch.setattr(twins, "export_flags", lambda _: ["--golden", str(tmp_path / "twin-3.onnx")])
    *_, failed = with_twins([Artefact(p) for p in (small_checkpoint, artefacts["whole"])], tmp_path)
    assert failed.no_twin.startswith("it could not be exported (exit 3): twin of whole.onnx: no such file")


def test_a_twin_is_called_as_in_the_table(artefacts: dict[str, Path]) -> None:
    """Nobody knows the file's own name."""
    mixed = Artefact(artefacts["mixed"], label="twin of mine", generated=True)
    with Prepared(mixed, Options()) as opened:
        assert opened.layout_warnings[0].startswith("twin of mine: an int8 graph in TensorRT's layout")
    with Prepared(replace(mixed, generated=False, label=""), Options()) as opened:
        assert opened.layout_warnings[0].startswith("mixed.onnx: ")
