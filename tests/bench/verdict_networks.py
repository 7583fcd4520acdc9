"""Networks whose exported artefacts get errors planted: one for each shape that an output can have."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gmconv
from runtime.runners.base import Array

SIZE = 32
PLACES = (0, 33, 66, 99)


class Features(nn.Module):
    """A masked 7x7 stem, a residual block and a strided convolution: 24 channels at half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = gmconv.GMConv2d(3, 16, 7, padding=3, sigma=1.5)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.BatchNorm2d(24)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 24, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv(x)))
        return F.relu(self.norm3(self.down(x)))


class Detector(nn.Module):
    """Boxes in pixels beside ten scores in one output, and a map of centres in another."""

    def __init__(self) -> None:
        super().__init__()
        self.features = Features()
        self.box, self.scores, self.centre = nn.Conv2d(24, 4, 1), nn.Conv2d(24, 10, 1), nn.Conv2d(24, 1, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(x)
        found = torch.cat([self.box(x).sigmoid() * SIZE, self.scores(x).sigmoid()], 1)
        return found.flatten(2), self.centre(x)


class UNet(nn.Module):
    """Six classes for every pixel; the skip carries the full resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 12, 3, padding=1), Features()
        self.up, self.last = nn.ConvTranspose2d(24, 12, 2, stride=2), nn.Conv2d(24, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([F.silu(self.first(x)), F.relu(self.up(self.down(x)))], 1))  # type: ignore[no-any-return]


class Regression(nn.Module):
    """One number for an image."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.fc = Features(), nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


class Offset(nn.Module):
    """Three numbers that vary little around 170 (heights in centimetres, say)."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.fc = Features(), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return 170 + 5 * torch.tanh(self.fc(self.features(x).mean((2, 3))))


class IntegerMaps(nn.Module):
    """The class of every pixel as a whole number, and a mask of booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head, self.mask = Features(), nn.Conv2d(24, 5, 1), nn.Conv2d(24, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(x)
        return self.head(x).argmax(1), self.mask(x)[:, 0] > 0


class TwoInputs(nn.Module):
    """An image and four numbers; two outputs of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.numbers = Features(), nn.Linear(4, 24)
        self.first, self.second = nn.Linear(24, 4), nn.Linear(24, 4)

    def forward(self, image: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.features(image).mean((2, 3)) + self.numbers(numbers))
        return self.first(x), self.second(x)


@dataclass(frozen=True, slots=True)
class Entry:
    """A network of the bench: its factory as `--arch` takes it, whether it takes four numbers beside the image, whether
    it is trained on the digits, and where errors are planted, in percent of the way through its graph."""

    arch: str
    numbers: bool = False
    digits: bool = False
    places: tuple[int, ...] = PLACES


_HERE = "tests.bench.verdict_networks"
NETWORKS = {
    "digits": Entry("gmconv.models:resnet20", digits=True),
    "detector": Entry(f"{_HERE}:Detector"),
    "unet": Entry(f"{_HERE}:UNet"),
    "regression": Entry(f"{_HERE}:Regression"),
    "offset": Entry(f"{_HERE}:Offset"),
    "integers": Entry(f"{_HERE}:IntegerMaps"),
    "two inputs": Entry(f"{_HERE}:TwoInputs", numbers=True),
    "resnet50": Entry("gmconv.models:resnet50", digits=True, places=(66,)),  # an error costs it many times as much
}


def pictures(count: int, seed: int, size: int = SIZE) -> Array:
    """Float32 (count, 3, size, size): coloured shapes of all sizes and lights with some grain, as photographs vary."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:size, 0:size] / size
    found = np.empty((count, 3, size, size), np.float32)
    for image in found:
        image[:] = random.normal(0, 1, (3, 1, 1))
        for _ in range(6):
            (y, x), reach = random.random(2), random.uniform(0.02, 0.3)
            image += random.normal(0, 1.5, (3, 1, 1)) * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / reach**2)
        image += 0.2 * random.standard_normal(image.shape)
    return found


def numbers(count: int, seed: int) -> Array:
    """Float32 (count, 4), standard normal."""
    return np.random.default_rng((seed, 1)).standard_normal((count, 4), dtype=np.float32)


def trained(entry: Entry) -> nn.Module:
    """The network as if it had been trained: statistics from pictures, outputs that vary and, at their last layer, do
    so about zero."""
    torch.manual_seed(3)
    module, _, name = entry.arch.partition(":")
    model = gmconv.models.create(name) if module == "gmconv.models" else globals()[name]()
    arguments: list[Tensor] = [torch.from_numpy(pictures(64, seed=1))]
    if entry.numbers:
        arguments.append(torch.from_numpy(numbers(64, seed=1)))
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # the mean over all batches
            nn.init.uniform_(part.weight, 0.6, 1.4)
            nn.init.normal_(part.bias, 0, 0.3)
    handles = [part.register_forward_hook(_centre) for part in _heads(model)]
    with torch.no_grad():
        model.train()(*arguments)
        model.eval()(*arguments)
    for handle in handles:
        handle.remove()
    return model


def _heads(model: nn.Module) -> list[nn.Module]:
    """The layers that no normalization follows: their outputs are the network's."""
    names = ("box", "scores", "centre", "last", "fc", "head", "mask", "first", "second")
    heads = [part for name, part in model.named_children() if name in names]
    return [part for part in heads if not (isinstance(model, UNet) and part is model.first)]


def _centre(part: Any, given: Any, output: Tensor) -> None:
    """Scale a head so that each of its channels varies by 1.5 about its bias, once the statistics stand."""
    if part.training:
        return
    axes = [0, *range(2, output.ndim)]
    spread, mean = output.std(axes) / 1.5, output.mean(axes) - part.bias
    part.weight.div_(spread.view(-1, *[1] * (part.weight.ndim - 1)))
    part.bias.copy_(0.5 * torch.randn_like(part.bias) - mean / spread)


def save(name: str, folder: Path) -> Path:
    """A checkpoint of the network and, as `samples.npz`, what to calibrate and compare on, unless it is digits."""
    entry, path = NETWORKS[name], folder / "net.pt"
    if entry.digits:
        arch = entry.arch.partition(":")[2]
        command = ["--dataset", "digits", "--arch", arch, "--seed", "1", "--epochs", "3", "-o", str(path)]
        subprocess.run([sys.executable, "-m", "gmconv.train", *command], check=True, capture_output=True)
        return path
    image = pictures(64, seed=2)
    samples = {"image": image, "numbers": numbers(64, seed=2)} if entry.numbers else {"input": image}
    np.savez(folder / "samples.npz", **samples)
    gmconv.save_checkpoint(path, trained(entry), entry.arch, (3, SIZE, SIZE))
    return path
