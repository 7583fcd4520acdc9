"""The exported graph: a plain convolution network's, with nothing of a mask and nothing of this machine."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import gmconv
from export.graph import capture
from export.graph.kernels import require_stored_kernels
from gmconv.errors import RefusedError
from gmconv.surgery import masked_layers

ZOO = [("resnet20", 32), ("resnet18", 64), ("alexnet", 96)]
REST = [("mobilenet_v2", 64), ("vgg11_bn", 64), ("resnet50", 64), ("vgg16", 64), ("resnet56", 32)]


def exported(model: nn.Module, shape: tuple[int, ...], log: Path, opset: int = 20) -> capture.ir.Model:  # type: ignore[name-defined]
    return written(model, shape, log, opset).model


def written(model: nn.Module, shape: tuple[int, ...], log: Path, opset: int = 20) -> capture.Exported:
    return capture.to_onnx(
        model.eval(),
        {"input": torch.zeros(2, *shape)},
        output_names=["logits"],
        axes=capture.Axes(),
        opset=opset,
        log=log,
    )


@pytest.mark.parametrize(("name", "size"), [*ZOO, *(pytest.param(*entry, marks=pytest.mark.slow) for entry in REST)])
def test_a_baked_network_has_its_plain_twins_operators(name: str, size: int, tmp_path: Path) -> None:
    live = gmconv.models.create(name, num_classes=10)
    for layer in masked_layers(live).values():
        nn.init.uniform_(layer.sigma, 0.4, 5)
    network = gmconv.bake(live)
    result = written(network, (3, size, size), tmp_path / "log")
    baked = result.model
    twin = exported(gmconv.models.create(name, num_classes=10, gmconv=False), (3, size, size), tmp_path / "log")
    assert capture.operator_histogram(baked) == capture.operator_histogram(twin)
    require_stored_kernels(result.program)
    assert capture.unused_layers(result, network, masked_layers(live)) == []


class Unknown(nn.Module):
    """An operator that the exporter does not know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.qr(x.flatten(2))[0]


class Branching(nn.Module):
    """A branch by the input's values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("culprit", [Unknown, Branching])
def test_what_cannot_be_exported_is_one_sentence_with_the_layer(culprit: type[nn.Module], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), culprit()), nn.Flatten())
    with pytest.raises(RefusedError, match=r"cannot be exported at layer '1\.1' \(") as refused:
        exported(model, (3, 8, 8), tmp_path / "log")
    assert "\n" not in refused.value.message


class PerSample(nn.Module):
    """A kernel for each sample of the batch (CondConv), all of them in one grouped convolution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        kernels = x.mean((2, 3)).reshape(n * c, 1, 1, 1).expand(-1, c, 3, 3)
        y = nn.functional.conv2d(x.reshape(1, n * c, h, w), kernels, groups=n)
        return y.reshape(n, c, h - 2, w - 2)


class Dilated(nn.Module):
    """A dilation that follows the height."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, torch.ones(1, 3, 3, 3), dilation=x.shape[2] // 8)


class Pooled(nn.Module):
    """A window as large as the image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(x, x.shape[2:]).flatten(1)


@pytest.mark.parametrize(
    ("culprit", "hw", "said"),
    [
        (PerSample, False, "exported: the groups of its conv2d follow the batch, .*; give --batch N$"),
        (PerSample, True, "the batch, .*; give --batch N$"),
        (Dilated, True, "the dilation of its conv2d follows the height and width, .*; leave --dynamic-hw out$"),
        (Pooled, True, r"its forward fixes the height or width: leave --dynamic-hw out$"),
    ],
)
def test_a_number_in_the_graph_that_follows_a_free_axis(
    culprit: type[nn.Module], hw: bool, said: str, tmp_path: Path
) -> None:
    axes = capture.Axes(batch=True, hw=hw)
    given = {"input": torch.zeros(2, 3, 16, 16)}
    with pytest.raises(RefusedError, match=said):
        capture.to_onnx(culprit(), given, output_names=["logits"], axes=axes, opset=20, log=tmp_path / "log")


def test_a_missing_convolution_is_noticed(tmp_path: Path) -> None:
    model = exported(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), (3, 8, 8), tmp_path / "log")
    with pytest.raises(RuntimeError, match="runs 2 convolutions, the graph has 1"):
        capture.require_convolutions(model, {"a": torch.zeros(4, 3, 3, 3), "b": torch.ones(4, 3, 3, 3)})


def test_convolutions_that_the_exporter_merges_or_folds_are_not_missing(tmp_path: Path) -> None:
    class Merged(nn.Module):
        """One layer twice on one input, two equal layers on one input, one that reads only a constant."""

        def __init__(self) -> None:
            super().__init__()
            self.twice, self.one, self.other, self.position = (nn.Conv2d(3, 3, 1) for _ in range(4))
            self.other.load_state_dict(self.one.state_dict())
            self.register_buffer("grid", torch.rand(1, 3, 8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.twice(x).relu() - self.twice(x).sigmoid() + self.one(x) + self.other(x).tanh()
            out: torch.Tensor = y + self.position(self.grid)
            return out

    live = Merged()
    result = written(live, (3, 8, 8), tmp_path / "log")
    assert capture.operator_histogram(result.model)["Conv"] < 5
    assert capture.unused_layers(result, live, ["twice", "one", "other", "position"]) == []


def test_layers_that_no_output_needs_are_left_out_and_named(tmp_path: Path) -> None:
    class Heads(nn.Module):
        """An auxiliary head that only runs in training, one whose result is dropped, one that has two names."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.auxiliary, self.dropped = (nn.Conv2d(3, 3, 3) for _ in range(3))
            self.alias = self.body

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.alias(x)
            self.dropped(y)
            return self.auxiliary(y) if self.training else y

    live = Heads()
    result = written(live, (3, 8, 8), tmp_path / "log")
    assert capture.operator_histogram(result.model) == {"Conv": 1}
    assert capture.unused_layers(result, live, ["body", "auxiliary", "dropped"]) == ["auxiliary", "dropped"]


def test_a_network_that_fixes_its_batch_is_refused_with_the_flag_to_use(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, -1) if x.shape[0] == 2 else x

    with pytest.raises(RefusedError, match="--batch N"):
        exported(Fixed(), (3, 8, 8), tmp_path / "log")


def test_what_the_exporter_prints_goes_to_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with capture.captured(tmp_path / "log"):
        os.write(1, b"chatter\n")  # below Python's sys.stdout, as C++ code writes
    os.write(1, b"afterwards\n")
    assert (tmp_path / "log").read_text() == "chatter\n"
    assert capfd.readouterr().out == "afterwards\n"


def test_what_it_logs_into_a_notebook_goes_to_the_log(tmp_path: Path) -> None:
    cell = io.StringIO()  # a notebook's stderr is no file
    handler, logger = logging.StreamHandler(cell), logging.getLogger("exporter.of.a.notebook")
    logger.addHandler(handler)
    try:
        with capture.captured(tmp_path / "log"):
            logger.warning("torchvision is not installed")
        logger.warning("afterwards")
    finally:
        logger.removeHandler(handler)
    assert (tmp_path / "log").read_text() == "torchvision is not installed\n"
    assert cell.getvalue() == "afterwards\n"


class PadsBeforePooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x) - 2  # below zero almost everywhere, so that zeros win
        most = nn.functional.max_pool2d(nn.functional.pad(x, (1, 1, 1, 1)), 3, 2)
        mean = nn.functional.avg_pool2d(nn.functional.pad(x, (1, 1, 1, 1)), 3, 2)
        return torch.cat([most, mean], 1).mean((2, 3))


def test_onnx_runtime_merges_no_pad_into_a_pooling_that_pads_otherwise(tmp_path: Path) -> None:
    import onnx_ir
    import onnxruntime

    network = PadsBeforePooling().eval()
    model = exported(network, (3, 9, 9), tmp_path / "log")
    assert capture.operator_histogram(model)["Pad"] >= 1
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    image = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(session.run(None, {"input": image.numpy()})[0]), network(image))
