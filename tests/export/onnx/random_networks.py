"""Networks from a list of words: what a property test draws, and what a child process can make again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gmconv

WIDTH = 8
LAYERS = ("conv3", "conv5", "dilated", "circular", "depthwise", "masked7", "strided")
BETWEEN = ("relu", "silu", "hardtanh", "norm", "residual", "branches", "up", "maxpool", "maxpool_ceil", "avgpool")
HEADS = ("classes", "map", "both")


class Network(nn.Module):
    """`words` name the layers in order, the last one the head; 3 channels in, 8 between."""

    def __init__(self, words: list[str]) -> None:
        super().__init__()
        *self.words, self.head = words
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.layers = nn.ModuleList(_layer(word) for word in self.words)
        self.fc, self.out = nn.Linear(WIDTH, 5), nn.Conv2d(WIDTH, 2, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stem(x)
        for word, layer in zip(self.words, self.layers, strict=True):
            y = layer(x)
            x = x + y if word == "residual" else torch.cat([x[:, ::2], y[:, 1::2]], 1) if word == "branches" else y
        classes, values = self.fc(x.mean((2, 3))), self.out(x)
        return (classes, values) if self.head == "both" else classes if self.head == "classes" else values


def _layer(word: str) -> nn.Module:
    conv = {
        "conv3": {"kernel_size": 3, "padding": 1},
        "conv5": {"kernel_size": (5, 3), "padding": (2, 1)},
        "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
        "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        "depthwise": {"kernel_size": 3, "padding": 1, "groups": WIDTH},
        "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
        "residual": {"kernel_size": 3, "padding": 1},
        "branches": {"kernel_size": 1},
    }
    other = {
        "relu": nn.ReLU(),
        "silu": nn.SiLU(),
        "hardtanh": nn.Hardtanh(-2, 2),
        "norm": nn.BatchNorm2d(WIDTH),
        "up": Up(),
        "maxpool": nn.MaxPool2d(2),
        "maxpool_ceil": nn.MaxPool2d(3, 2, ceil_mode=True),
        "avgpool": nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
    }
    if word == "masked7":
        return gmconv.GMConv2d(WIDTH, WIDTH, 7, padding=3, sigma=0.8)
    return nn.Conv2d(WIDTH, WIDTH, **conv[word]) if word in conv else other[word]  # type: ignore[arg-type]


class Up(nn.Module):
    """Twice the height and width, bilinear."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def make(words: list[str]) -> Network:
    """The network of `words`, with statistics as if it had been trained."""
    torch.manual_seed(len(words))
    model = Network(words)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()
