"""Layers whose kernels are made by something else than a mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.gmconv.constants.layers import Base, gauss


class Hyper(Base):
    """A kernel from an embedding."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.z, self.made = nn.Parameter(torch.randn(8)), nn.Linear(8, i * o * 25)

    def kernel(self) -> Tensor:
        return self.made(self.z).view_as(self.weight)


class HyperConv(Base):
    """A kernel that a convolution makes."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.seed, self.made = nn.Parameter(torch.randn(1, o, 5, 5)), nn.Conv2d(o, i * o, 3, padding=1)

    def kernel(self) -> Tensor:
        return self.made(self.seed).view_as(self.weight) / 8


class LowRank(Base):
    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.u, self.v = nn.Parameter(torch.randn(o, 4) / 4), nn.Parameter(torch.randn(4, i * 25) / 4)

    def kernel(self) -> Tensor:
        return torch.einsum("or,rt->ot", self.u, self.v).view_as(self.weight)


class Fourier(Base):
    def kernel(self) -> Tensor:
        return torch.fft.ifft2(torch.fft.fft2(self.weight) * gauss(self.k, self.sigma)).real


class Gabor(Base):
    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.theta, self.f = nn.Parameter(torch.rand(o, i) * 3), nn.Parameter(torch.rand(o, i))

    def kernel(self) -> Tensor:
        axis = torch.arange(self.k) - (self.k - 1) / 2
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        t, f = self.theta[..., None, None], self.f[..., None, None]
        return gauss(self.k, self.sigma) * torch.cos(6 * f * (x * t.cos() + y * t.sin())) / 10


class Quantized(Base):
    """Fake quantization with a straight-through estimator."""

    def kernel(self) -> Tensor:
        step = self.weight.abs().amax((1, 2, 3), True) / 127
        rounded = (self.weight / step).round() * step
        return self.weight + (rounded - self.weight).detach()


class Binary(Base):
    def kernel(self) -> Tensor:
        return self.weight.sign() * self.weight.abs().mean((1, 2, 3), True)


class Standardized(Base):
    def kernel(self) -> Tensor:
        std, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return (self.weight - mean) / (std + 1e-5) / 10


class NormedByBatchNorm(Base):
    def kernel(self) -> Tensor:
        flat = self.weight.view(1, len(self.weight), -1)
        return F.batch_norm(flat, None, None, training=True).view_as(self.weight) / 10


class Supermask(Base):
    """The better half of the weights, by scores of their own size."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.scores = nn.Parameter(torch.randn(o, i, 5, 5))

    def kernel(self) -> Tensor:
        found = self.scores.abs()
        return self.weight * (found >= found.flatten().kthvalue(found.numel() // 2).values).float()


class Sparse(Base):
    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.register_buffer("keep", (torch.rand(o, i * 25) > 0.7).float().to_sparse())

    def kernel(self) -> Tensor:
        return (self.weight.flatten(1) * self.keep.to_dense()).view_as(self.weight)


GENERATED = [
    Hyper, HyperConv, LowRank, Fourier, Gabor, Quantized, Binary, Standardized, NormedByBatchNorm, Supermask,
    Sparse,
]  # fmt: skip
