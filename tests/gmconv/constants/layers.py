"""A network around a layer that computes its kernel, and layers whose kernel is a mask times a weight."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def gauss(k: int, sigma: Tensor | float) -> Tensor:
    axis = torch.arange(k) - (k - 1) / 2
    return torch.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * sigma**2))


class Base(nn.Module):
    """Weight, bias, and a number to make the kernel with."""

    def __init__(self, i: int, o: int, k: int = 5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(o, i, k, k) / math.sqrt(i * k * k))
        self.bias = nn.Parameter(torch.randn(o) * 0.1)
        self.sigma = nn.Parameter(torch.tensor(1.3))
        self.k = k

    def kernel(self) -> Tensor:
        return self.weight * gauss(self.k, self.sigma)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(), self.bias, padding=self.k // 2)


class Softplus(Base):
    def kernel(self) -> Tensor:
        return self.weight * gauss(self.k, F.softplus(self.sigma))


class Rotated(Base):
    """A Gaussian of any covariance and centre."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o, 9)
        self.root = nn.Parameter(torch.tensor([[0.7, 0.0], [0.3, 0.5]]))
        self.centre = nn.Parameter(torch.tensor([0.8, -0.6]))

    def kernel(self) -> Tensor:
        axis = torch.arange(self.k) - (self.k - 1) / 2
        place = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1) - self.centre
        return self.weight * torch.exp(-0.5 * (place @ self.root).square().sum(-1))


class PerInput(Base):
    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.sigmas = nn.Parameter(torch.linspace(0.6, 2.0, i))

    def kernel(self) -> Tensor:
        return self.weight * torch.stack([gauss(self.k, s) for s in self.sigmas])


class PerPair(Base):
    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.sigmas = nn.Parameter(torch.linspace(0.6, 2.0, i * o).view(o, i, 1, 1))

    def kernel(self) -> Tensor:
        axis = torch.arange(self.k) - (self.k - 1) / 2
        return self.weight * torch.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * self.sigmas**2))


class Narrow(Base):
    def kernel(self) -> Tensor:
        return self.weight * gauss(self.k, 0.05 * self.sigma)


class OneAxis(Base):
    """Flat along the width."""

    def kernel(self) -> Tensor:
        axis = torch.arange(self.k) - (self.k - 1) / 2
        return self.weight * torch.exp(-(axis[:, None] ** 2) / (2 * self.sigma**2))


class ItemSigma(Base):
    """The sigma as a Python number."""

    def kernel(self) -> Tensor:
        return self.weight * gauss(self.k, max(float(self.sigma), 0.1))


class NumpyKernel(Base):
    def kernel(self) -> Tensor:
        a = np.arange(self.k) - self.k // 2
        mask = np.exp(-(a[:, None] ** 2 + a[None] ** 2) / (2 * self.sigma.item() ** 2))
        return torch.from_numpy(self.weight.detach().numpy() * mask.astype("float32"))


MASKS = [Base, Softplus, Rotated, PerInput, PerPair, Narrow, OneAxis, ItemSigma, NumpyKernel]


class Net(nn.Module):
    """Two of the layers among others."""

    def __init__(self, layer: Callable[[int, int], nn.Module], width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.a, self.bn_a = layer(width, 2 * width), nn.BatchNorm2d(2 * width)
        self.b, self.bn_b = layer(2 * width, 2 * width), nn.BatchNorm2d(2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_a(self.a(self.stem(x))))
        return self.head(F.relu(self.bn_b(self.b(x))).mean((2, 3)))


def net(layer: Callable[[int, int], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = Net(layer)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 1.5)
    return model.eval()
