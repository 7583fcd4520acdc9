"""The torch runner: live, baked, compiled, float64, and checkpoints it refuses."""

from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from torch import nn

import gmconv
from gmconv.errors import RefusedError, UnavailableError
from gmconv.foreign import Foreign
from runtime.runners import open_runner
from runtime.runners.torch import TorchRunner

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
    with open_runner(checkpoint) as live, TorchRunner(checkpoint, form="baked") as baked:
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


def test_names_follow_the_exported_file(checkpoint: Path) -> None:
    with TorchRunner(checkpoint, input_name="image", output_names=("scores",)) as runner:
        assert set(runner.run({"image": X["input"]})) == {"scores"}
    with pytest.raises(RefusedError, match="has 1 outputs, --output-names gives 2"):
        TorchRunner(checkpoint, output_names=("a", "b"))


def test_any_height_and_width_only_when_asked(checkpoint: Path) -> None:
    larger = {"input": np.zeros((1, 3, 40, 48), dtype=np.float32)}
    with TorchRunner(checkpoint) as runner, pytest.raises(RefusedError, match="has shape"):
        runner.run(larger)
    with TorchRunner(checkpoint, dynamic_hw=True) as runner:
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tpu"])
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


def test_several_outputs_are_named_by_their_keys(tmp_path: Path) -> None:
    import sys
    import types

    module = types.ModuleType("two_outputs")
    module.Two = Two  # type: ignore[attr-defined]
    sys.modules["two_outputs"] = module
    path = tmp_path / "two.pt"
    gmconv.save_checkpoint(path, Two(), arch="two_outputs:Two", input_shape=(3, 8, 8))
    with open_runner(path, foreign=Foreign(arch="two_outputs:Two")) as runner:
        assert [spec.name for spec in runner.outputs] == ["features", "pooled"]
        assert runner.outputs[0].shape == ("batch", 4, 6, 6)
