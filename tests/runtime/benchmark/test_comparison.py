"""--twin on a real checkpoint: the twin, the live and the baked network, in torch and in ONNX Runtime."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from export.tensorrt import BuildOptions, build_engine
from export.tensorrt.profiles import batch_request
from gmconv.errors import BuildError, RefusedError
from gmconv.foreign import Foreign
from runtime.benchmark import comparison
from runtime.benchmark.comparison import against_first, export_twin, with_twins
from runtime.benchmark.measure import Artefact, Prepared, parse_artefact
from runtime.benchmark.options import Options
from runtime.benchmark.timing import LoopOptions
from runtime.manifest import read_manifest
from runtime.runners import open_runner


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained GMConv network with masks that matter (sigma 0.8)."""
    import torch

    import gmconv

    torch.manual_seed(0)
    model = gmconv.models.create("resnet8", num_classes=10, sigma=0.8)
    path = tmp_path_factory.mktemp("ckpt") / "small.pt"
    gmconv.save_checkpoint(
        path,
        model,
        arch="gmconv.models:resnet8",
        input_shape=(3, 16, 16),
        arch_kwargs={"num_classes": 10, "sigma": 0.8},
    )
    return path


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
        assert torch.equal(value, trained.state_dict()[key]), key
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
    assert torch.equal(kept["conv1.weight"], average.state_dict()["conv1.weight"])
    for contender in (twin, live):
        with Prepared(contender.artefact, Options(foreign=foreign)) as opened:
            assert opened.feeds.keys() == {"input"}


def test_twin_and_report_from_the_command_line(
    digits_checkpoint: Path, digits_onnx: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    report = tmp_path / "report.html"
    flags = ("--twin", "--duration=0.3", "--warmUp=20", "--json", f"--report={report}")
    done = cli("runtime.benchmark", str(digits_checkpoint), str(digits_onnx), *flags)
    rows = json.loads(done.stdout)["artefacts"]
    assert [(row["artefact"], row["reference"]) for row in rows] == [
        ("torch twin (no masks)", None),
        ("torch live", "torch twin (no masks)"),
        ("torch baked", "torch twin (no masks)"),
        ("twin of digits.onnx", None),
        ("digits.onnx", "twin of digits.onnx"),
    ]
    assert all(row["ratio"]["low"] <= row["ratio"]["value"] <= row["ratio"]["high"] for row in rows if row["ratio"])
    text = report.read_text()
    assert f"<title>Latency of {digits_checkpoint.name}, digits.onnx</title>" in text
    for words in ("Effective receptive field", "torch live", "Masks", "layer3.0.conv2", "twin of digits.onnx"):
        assert words in text


def test_artefacts_of_one_name_are_numbered() -> None:
    names = [c.artefact.name for c in against_first([Artefact(Path(p)) for p in ("a/m.onnx", "b/m.onnx", "c.onnx")])]
    assert names == ["m.onnx #1", "m.onnx #2", "c.onnx"]


def test_a_twin_needs_one_checkpoint(small_checkpoint: Path, tmp_path: Path) -> None:
    plan = tmp_path / "a.plan"
    plan.touch()
    for artefacts in ([plan], [small_checkpoint, small_checkpoint]):
        with pytest.raises(click.UsageError, match="--twin"):
            with_twins([Artefact(path) for path in artefacts], tmp_path)


def test_an_engine_without_a_manifest_has_no_twin(small_checkpoint: Path, tmp_path: Path) -> None:
    plan = tmp_path / "a.plan"
    plan.write_bytes(b"ftrt")
    with pytest.raises(RefusedError, match=r"a\.plan"):
        with_twins([Artefact(small_checkpoint), Artefact(plan)], tmp_path)


def test_an_engine_has_a_twin_that_is_built_as_it_was(
    digits_checkpoint: Path, digits_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder = tmp_path / "own.plan", tmp_path / "twins"
    folder.mkdir()
    asked = BuildOptions(flavor="rtx", profiles=(batch_request(2, 4, 6),), tf32=True, optimization_level=2)
    built = build_engine(digits_onnx, plan, asked)
    exported: list[tuple[str, str]] = []

    def copy(
        checkpoint: Path, output: Path, precision: str, foreign: Foreign
    ) -> None:  # the export itself has a test above
        exported.append((checkpoint.name, precision))
        for suffix in ("", ".json"):
            shutil.copyfile(f"{digits_onnx}{suffix}", f"{output}{suffix}")

    monkeypatch.setattr(comparison, "export_twin", copy)
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
    assert exported == [("twin.pt", "fp32")]
    assert twin.artefact.options == own.artefact.options == graphs, "each pair in the mode that was asked for"
    other = read_manifest(twin.artefact.path)
    assert other.profiles == built.profiles
    assert other.build is not None
    assert built.build is not None
    spent = {"seconds": other.build.seconds, "peak_memory": other.build.peak_memory}
    assert other.build == replace(built.build, **spent)


def test_every_contender_on_the_live_networks_clock_is_also_divided_by_it(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    options = Options(loop=LoopOptions(warm_up=0, duration=0.05, iterations=10))
    contenders = with_twins([Artefact(small_checkpoint)], tmp_path)
    with ExitStack() as stack:
        prepared = [stack.enter_context(Prepared(c.artefact, options)) for c in contenders]
        found = comparison.compare(contenders, prepared, options, None)
        twin, live, baked = found.rows
        assert live.over_live is None
        assert twin.over_live == found.interleaved.ratio(0, 1)
        assert baked.over_live == found.interleaved.ratio(2, 1)
        assert found.to_dict()["artefacts"][0]["over_live"]["value"] == twin.over_live.value
        prepared[0].lane.clock = "another"
        assert comparison.compare(contenders, prepared, options, None).rows[0].over_live is None


def test_each_artefact_may_have_its_own_graph_mode(small_checkpoint: Path) -> None:
    options = Options(cuda_graph=True)
    with Prepared(parse_artefact(f"{small_checkpoint}@cuda_graph=false"), options) as prepared:
        assert prepared.cuda_graph is False
    with pytest.raises(click.UsageError, match="cuda_graph is true or false"):
        Prepared(parse_artefact(f"{small_checkpoint}@cuda_graph=often"), options)


def test_a_twin_that_cannot_be_exported_is_exit_5(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"PK\x03\x04")
    with pytest.raises(BuildError, match=r"exit 3.*broken\.pt"):
        export_twin(broken, tmp_path / "out.onnx", "fp32")
