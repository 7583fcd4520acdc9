"""The torch runner: live, baked, compiled, float64, and checkpoints it refuses."""

import sys
import types
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from torch import nn

import gmconv
from gmconv.errors import CheckpointError, RefusedError, UnavailableError
from gmconv.foreign import Foreign
from runtime.manifest import Manifest, digest, sidecar
from runtime.runners import open_runner
from runtime.runners.torch import TorchOptions, TorchRunner, receptive_fields

X = {"input": np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("torch") / "net.pt"
    model = gmconv.models.create("resnet20", sigma=1.5).eval()
    preprocessing = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.25] * 3}
    gmconv.save_checkpoint(
        path, model, arch="gmconv.models:resnet20", input_shape=(3, 32, 32), preprocessing=preprocessing
    )
    return path


def test_the_live_network_is_what_the_module_computes(checkpoint: Path) -> None:
    model = gmconv.load_checkpoint(checkpoint).model
    with torch.inference_mode():
        want = model(torch.from_numpy(X["input"])).numpy()
    with open_runner(checkpoint) as runner:
        np.testing.assert_array_equal(runner.run(X)["logits"], want)
        assert runner.inputs[0].shape == ("batch", 3, 32, 32)
        assert runner.outputs[0].shape == ("batch", 10)
        assert any(isinstance(m, gmconv.GMConv2d) for m in runner.model.modules())  # type: ignore[attr-defined]


def test_baked_is_bitwise_live_and_has_no_masks(checkpoint: Path) -> None:
    with open_runner(checkpoint) as live, TorchRunner(checkpoint, options=TorchOptions(form="baked")) as baked:
        np.testing.assert_array_equal(live.run(X)["logits"], baked.run(X)["logits"])
        assert not any(isinstance(m, gmconv.GMConv2d) for m in baked.model.modules())


def test_float64_takes_float32_and_is_close(checkpoint: Path) -> None:
    with open_runner(checkpoint) as single, open_runner(checkpoint, dtype="float64") as double:
        exact = double.run(X)["logits"]
        assert exact.dtype == np.float64
        assert double.inputs[0].dtype == "float32"
        error = np.abs(single.run(X)["logits"] - exact).max()
        assert 0 < error < 1e-4 * np.abs(exact).max()


def test_channels_last_and_bind_agree_with_run(checkpoint: Path) -> None:
    with open_runner(checkpoint, channels_last=True) as runner:
        bound: Any = runner.bind(X)
        np.testing.assert_allclose(bound().numpy(), runner.run(X)["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_agrees_with_eager(checkpoint: Path) -> None:
    with open_runner(checkpoint) as eager, open_runner(checkpoint, compiled=True) as compiled:
        want = eager.run(X)["logits"]
        np.testing.assert_allclose(compiled.run(X)["logits"], want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_any_height_and_width_only_when_asked(checkpoint: Path) -> None:
    larger = {"input": np.zeros((1, 3, 40, 48), dtype=np.float32)}
    with TorchRunner(checkpoint) as runner, pytest.raises(RefusedError, match="has shape"):
        runner.run(larger)
    with open_runner(checkpoint, dynamic_hw=True) as runner:
        assert runner.run(larger)["logits"].shape == (1, 10)


def test_preprocessing_comes_typed(checkpoint: Path) -> None:
    with TorchRunner(checkpoint) as runner:
        assert runner.artefact.facts.preprocessing is not None
        assert runner.artefact.facts.preprocessing.size == (32, 32)


@pytest.mark.parametrize(
    "feeds", [{}, {"x": X["input"]}, {"input": X["input"].astype(np.float64)}, {"input": X["input"][0]}]
)
def test_inputs_that_do_not_fit_are_refused(checkpoint: Path, feeds: dict[str, Any]) -> None:
    with open_runner(checkpoint) as runner, pytest.raises(RefusedError):
        runner.run(feeds)


@pytest.mark.parametrize("content", [b"", b"text\n", b"PK\x03\x04broken", b"\x80\x02cos\nsystem\n."])
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(content)
    with pytest.raises(click.ClickException) as refusal:
        open_runner(path)
    assert refusal.value.exit_code == 3


def test_a_truncated_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(checkpoint.read_bytes()[:-1000])
    with pytest.raises(click.ClickException) as refusal:
        open_runner(path)
    assert refusal.value.exit_code == 3


def test_a_foreign_state_dict_opens_when_its_architecture_is_given(tmp_path: Path) -> None:
    path = tmp_path / "bare.pt"
    torch.save(gmconv.models.create("resnet20").state_dict(), path)
    with open_runner(path, foreign=Foreign(arch="gmconv.models:resnet20", input_shape=(3, 32, 32))) as runner:
        assert runner.run(X)["logits"].shape == (3, 10)


def test_the_receptive_field_of_masks_that_are_not_ours_is_not_told(tmp_path: Path) -> None:
    torch.save(gmconv.models.create("resnet8", gmconv=False).state_dict(), tmp_path / "net.pth")
    with pytest.raises(RefusedError, match="no GMConv2d whose mask could be taken off"):
        receptive_fields(tmp_path / "net.pth", 1, Foreign(arch="gmconv.models:resnet8", input_shape=(3, 32, 32)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_missing_gpu_is_said(checkpoint: Path, device: str) -> None:
    with pytest.raises(UnavailableError):
        open_runner(checkpoint, device=device)
    with pytest.raises(UnavailableError, match="CUDA graph"):
        open_runner(checkpoint, cuda_graph=True)


def test_options_of_another_runner_are_refused(checkpoint: Path) -> None:
    with pytest.raises(click.UsageError, match="is a checkpoint: optimization does not apply"):
        open_runner(checkpoint, optimization="all")


class Two(nn.Module):
    """A network of two outputs, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.conv(x)
        return {"features": features, "pooled": features.mean((2, 3))}


class Several(nn.Module):
    """An image, a mask, a second number; a constant that follows no dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table, self.plain = nn.Conv2d(3, 4, 3, padding=1), nn.Embedding(2, 4), torch.ones(4)

    def forward(self, image: torch.Tensor, mask: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = (self.conv(image) * mask).mean((2, 3)).float()
        return torch.addmm(features, self.table(kind[:, 0]) @ torch.eye(4), torch.diag(self.plain))


@pytest.fixture
def own_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("own_networks")
    module.Two, module.Several = Two, Several  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_networks", module)


@pytest.mark.usefixtures("own_networks")
def test_several_outputs_are_named_by_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "two.pt"
    gmconv.save_checkpoint(path, Two(), arch="own_networks:Two", input_shape=(3, 8, 8))
    with open_runner(path, foreign=Foreign(arch="own_networks:Two")) as runner:
        assert [spec.name for spec in runner.outputs] == ["features", "pooled"]
        assert runner.outputs[0].shape == ("batch", 4, 6, 6)


@pytest.mark.usefixtures("own_networks")
def test_several_inputs_go_to_the_forward_by_name(tmp_path: Path) -> None:
    path, network = tmp_path / "several.pt", Several()
    torch.save(network.state_dict(), path)
    inputs = (("kind", (1,), "int64"), ("image", (3, 8, 8), "float32"), ("mask", (1, 8, 8), "float32"))
    foreign = Foreign(arch="own_networks:Several", inputs=inputs)
    generator = np.random.default_rng(0)
    feeds: dict[str, Any] = {n: generator.standard_normal((3, *s), dtype=np.float32) for n, s, _ in inputs[1:]}
    feeds["kind"] = np.array([[0], [1], [1]])
    with torch.inference_mode():
        want = network(*(torch.from_numpy(feeds[name]) for name in ("image", "mask", "kind"))).numpy()
    with open_runner(path, foreign=foreign) as runner, open_runner(path, foreign=foreign, dtype="float64") as wide:
        assert [(spec.name, spec.dtype) for spec in runner.inputs] == [
            ("image", "float32"), ("mask", "float32"), ("kind", "int64")
        ]  # fmt: skip
        assert [spec.shape for spec in runner.inputs] == [("batch", 3, 8, 8), ("batch", 1, 8, 8), ("batch", 1)]
        np.testing.assert_array_equal(runner.run(feeds)["logits"], want)
        bound: Any = runner.bind(feeds)
        np.testing.assert_array_equal(bound().numpy(), want)
        exact = wide.run(feeds)["logits"]
        assert exact.dtype == np.float64
        assert 0 < np.abs(exact - want).max() < 1e-5
        with pytest.raises(RefusedError, match="inputs given"):
            runner.run({"image": feeds["image"]})
        with pytest.raises(RefusedError, match="does not run on this input: index out of range"):
            runner.run({**feeds, "kind": np.array([[0], [1], [7]])})
    with open_runner(path, foreign=foreign, dynamic_hw=True) as runner:
        assert runner.inputs[1].shape == ("batch", 1, "mask_height", "mask_width")


def test_weights_alone_are_refused_with_the_architecture_of_a_file_exported_from_them(tmp_path: Path) -> None:
    torch.save(torch.nn.Conv2d(3, 4, 3).state_dict(), tmp_path / "net.pth")
    (tmp_path / "net.onnx").write_bytes(b"a graph")
    checkpoint, own = digest(tmp_path / "net.pth", "checkpoint"), digest(tmp_path / "net.onnx", "onnx")
    manifest = Manifest(artefact=own, inputs=(), outputs=(), chain=(checkpoint,), arch="my.nets:make")
    sidecar(tmp_path / "net.onnx").write_text(manifest.to_json())
    with pytest.raises(CheckpointError, match="give --arch NAME .*; net.onnx was exported from it with --arch my.nets"):
        open_runner(tmp_path / "net.pth")
    torch.save(torch.nn.Conv2d(3, 4, 1).state_dict(), tmp_path / "net.pth")  # another file of that name
    with pytest.raises(CheckpointError, match=r"give --arch NAME [^;]*$"):
        open_runner(tmp_path / "net.pth")
