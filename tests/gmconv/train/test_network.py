"""Which network is trained: of the zoo, of a package, or of the user's own factory, masked where it is plain."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gmconv
from gmconv.errors import CheckpointError
from gmconv.train.loop import train
from gmconv.train.network import make_network
from gmconv.train.options import TrainOptions

OPTIONS = TrainOptions(arch="own_nets_of_a_test:make", input_shape=(1, 8, 8), epochs=1, batch_size=256, sigma=2.0)


class Net(nn.Module):
    """A convolution of 3x3, one of 1x1, and a `view` that needs contiguous memory."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, width, 3, padding=1, stride=2)
        self.mix = nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width * 16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.mix(self.first(x))).view(len(x), -1))
        return found


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("own_nets_of_a_test")
    module.make = Net  # type: ignore[attr-defined]
    module.masked = lambda num_classes: gmconv.convert(Net(num_classes), sigma=3.0)  # type: ignore[attr-defined]
    module.own = lambda num_classes: Masked(num_classes)  # type: ignore[attr-defined]
    module.fixed = lambda: Net(7)  # type: ignore[attr-defined]
    module.two = lambda num_classes: Two(num_classes)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


class OwnMask(nn.Conv2d):
    """A mask that the user wrote."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * 0.5, self.bias)


class Masked(Net):
    """A network of such layers."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.first = OwnMask(1, 4, 3, padding=1, stride=2)


class Two(Net):
    """Two outputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x), x  # type: ignore[return-value]


def test_plain_convolutions_of_an_own_factory_are_masked_and_the_checkpoint_rebuilds_it(tmp_path: Path) -> None:
    result = train(OPTIONS, tmp_path / "c.pt")
    assert result.network.own
    assert result.network.note == (
        "1 of 2 nn.Conv2d became GMConv2d (--plain: none); 1 of 1x1 kernels, which need no mask"
    )
    assert result.network.kwargs == {"num_classes": 10, "in_channels": 1}
    with pytest.raises(CheckpointError, match="say --arch"):
        gmconv.load_checkpoint(tmp_path / "c.pt")
    loaded = gmconv.load_checkpoint(tmp_path / "c.pt", arch=OPTIONS.arch)
    assert loaded.masked == {"first": "layer"}
    assert isinstance(loaded.model.first, gmconv.GMConv2d)
    assert loaded.labels == tuple("0123456789")


def test_layers_with_masks_of_their_own_class_are_left_and_named() -> None:
    found = make_network(dataclasses.replace(OPTIONS, arch="own_nets_of_a_test:own"), 10)
    assert type(found.model.first) is OwnMask
    assert found.note == (
        "0 of 2 nn.Conv2d became GMConv2d (--plain: none); 1 of 1x1 kernels, which need no mask; "
        "1 with a forward of their own (OwnMask), left as their factory makes them"
    )


def test_plain_leaves_a_network_as_its_factory_makes_it_and_own_masks_stay() -> None:
    assert not any(
        isinstance(m, gmconv.GMConv2d)
        for m in make_network(dataclasses.replace(OPTIONS, gmconv=False), 10).model.modules()
    )
    found = make_network(dataclasses.replace(OPTIONS, arch="own_nets_of_a_test:masked"), 10)
    assert found.model.first.sigma.item() == 3.0
    assert found.note == "trained with the 1 GMConv2d layers that its factory makes"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("fixed", {}, r"gives shape \(2, 7\) for two images; training needs logits.*\(2, 10\)"),
        ("two", {}, "gives a tuple for two images"),
        ("mask", {}, "did you mean own_nets_of_a_test:masked"),
        ("make", {"input_shape": (1, 16, 16)}, "cannot train on 1x16x16 input .*the one it takes"),
        ("make", {"kernel_size": 5}, "leave --kernel-size out"),
        ("make", {"gmconv": False, "sigma_penalty": 1.0}, "drop --sigma-penalty"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(name: str, changes: dict[str, object], words: str) -> None:
    options = dataclasses.replace(OPTIONS, arch=f"own_nets_of_a_test:{name}", **changes)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=f"--arch own_nets_of_a_test:{name}: .*{words}"):
        make_network(options, 10)


@pytest.mark.parametrize(
    ("arch", "channels", "kwargs"),
    [
        ("timm:test_resnet.r160_in1k", 3, {"num_classes": 10}),
        ("timm:test_resnet.r160_in1k", 1, {"num_classes": 10, "in_chans": 1}),
        ("torchvision:squeezenet1_1", 3, {"num_classes": 10}),
    ],
)
def test_networks_of_packages_are_masked_too(arch: str, channels: int, kwargs: dict[str, object]) -> None:
    pytest.importorskip(arch.partition(":")[0])
    found = make_network(dataclasses.replace(OPTIONS, arch=arch, input_shape=(channels, 64, 64)), 10)
    assert found.kwargs == kwargs
    assert "became GMConv2d" in found.note
    assert not found.own
