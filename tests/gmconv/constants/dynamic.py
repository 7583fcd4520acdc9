"""Layers whose kernels are no constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.gmconv.constants.layers import Base, gauss


class CondConv(Base):
    """A mixture of experts, chosen by the input."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.experts, self.route = nn.Parameter(torch.randn(3, o, i, 5, 5) / 20), nn.Linear(i, 3)

    def forward(self, x: Tensor) -> Tensor:
        share = self.route(x.mean((0, 2, 3))).softmax(-1)
        return F.conv2d(x, torch.einsum("e,eoihw->oihw", share, self.experts), self.bias, padding=2)


class PerSample(CondConv):
    """One kernel per sample, through groups."""

    def forward(self, x: Tensor) -> Tensor:
        share = self.route(x.mean((2, 3))).softmax(-1)
        kernel = torch.einsum("ne,eoihw->noihw", share, self.experts).flatten(0, 1)
        out = F.conv2d(x.flatten(0, 1)[None], kernel, padding=2, groups=len(x))
        return out.view(len(x), -1, *x.shape[2:])


class Hard(CondConv):
    """An expert by index."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.experts[self.route(x.mean((0, 2, 3))).argmax()], self.bias, padding=2)


class LastTime(Base):
    """From the input of the run before."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out = F.conv2d(x, self.weight * gauss(5, 1 + self.mean.abs()), self.bias, padding=2)
        self.mean.mul_(0.9).add_(x.detach().mean(), alpha=0.1)
        return out


class LastTimePlain(LastTime):
    """The same, in a plain attribute that is replaced."""

    def forward(self, x: Tensor) -> Tensor:
        last = getattr(self, "last", torch.zeros(()))
        self.last = x.detach().mean() * 0.1
        return F.conv2d(x, self.weight * gauss(5, 1 + last.abs()), self.bias, padding=2)


class ThroughNumpy(Base):
    def forward(self, x: Tensor) -> Tensor:
        sigma = 1 + float(np.abs(x.detach().numpy()).mean() > 2)
        return F.conv2d(x, self.weight * gauss(5, sigma), self.bias, padding=2)


class ThroughList(Base):
    def forward(self, x: Tensor) -> Tensor:
        sigma = 1 + 0.1 * (max(x.flatten().tolist()) > 1e6)
        return F.conv2d(x, self.weight * gauss(5, sigma), self.bias, padding=2)


class Branch(Base):
    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight * gauss(5, self.sigma) if (x > 1e6).any() else self.weight * gauss(5, 2.0)
        return F.conv2d(x, kernel, self.bias, padding=2)


class Printed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * gauss(5, 1.0 + ("e+09" in str(x))), self.bias, padding=2)


class Applied(Base):
    """Python sees each value."""

    def forward(self, x: Tensor) -> Tensor:
        seen: list[float] = []
        x[:1, :1].clone().apply_(lambda value: seen.append(value) or value)
        return F.conv2d(x, self.weight * gauss(5, 1.0 + (max(seen) > 1e6)), self.bias, padding=2)


class Mapped(Base):
    def forward(self, x: Tensor) -> Tensor:
        seen, some = list[float](), x[:1, :1].clone()
        some.map_(some, lambda value, _: seen.append(value) or value)  # type: ignore[attr-defined]
        return F.conv2d(x, self.weight * gauss(5, 1.0 + (max(seen) > 1e6)), self.bias, padding=2)


class ItselfMasked(Tensor):
    """A tensor that is masked when something convolves with it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            masked = isinstance(value, ItselfMasked)
            return value.as_subclass(Tensor) * (gauss(5, 1.4) if func is F.conv2d else 1) if masked else value

        return func(*map(plain, args), **{name: plain(value) for name, value in (kwargs or {}).items()})


class OwnTensor(Base):
    """Constant, but nothing shows it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.as_subclass(ItselfMasked), self.bias, padding=2)


class Nonzero(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * gauss(5, 1.0 + len((x > 1e6).nonzero())), self.bias, padding=2)


class BatchSize(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * gauss(5, 1.0 + len(x)), self.bias, padding=2)


class Counter(Base):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return F.conv2d(x, self.weight * gauss(5, 1.0 + 0.01 * self.count), self.bias, padding=2)


class Decaying(Base):
    """In place, and more each time."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= gauss(5, 3.0)
        return F.conv2d(x, self.weight, self.bias, padding=2)


class Dropped(Base):
    def kernel(self) -> Tensor:
        return F.dropout(self.weight, 0.2, True)


class Noisy(Base):
    def kernel(self) -> Tensor:
        return self.weight + 1e-6 * torch.randn_like(self.weight)


class NumpyNoise(Base):
    def kernel(self) -> Tensor:
        return self.weight * float(1 + 1e-3 * np.random.rand())


class Modulated(Base):
    """As in StyleGAN: scaled by the input, demodulated."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight * (1 + x.mean((0, 2, 3)).view(1, -1, 1, 1))
        return F.conv2d(x, w * w.square().sum((1, 2, 3), True).rsqrt(), self.bias, padding=2)


class OutOfPlaceWhere(Base):
    def kernel(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, torch.where(x.amax() > 1e6, self.weight, self.weight * 0.5), self.bias, padding=2)


class ViaBuffer(Base):
    """Written into a buffer first."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.register_buffer("used", torch.zeros(o, i, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        self.used.copy_(self.weight).mul_(1 + x.mean().tanh())
        return F.conv2d(x, self.used, self.bias, padding=2)


class CorrelatesItself(Base):
    """The input's own centre is the kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.conv2d(x, x[:1, :, 6:9, 6:9] / 100, padding=1)


class Collected(Base):
    """Values of the input collected into a tensor, which reads them below the dispatcher."""

    def forward(self, x: Tensor) -> Tensor:
        sigma = torch.tensor([x.std()]).clamp(max=0.01) + 1
        return F.conv2d(x, self.weight * gauss(5, sigma), self.bias, padding=2)


class CollectedAnew(Base):
    def forward(self, x: Tensor) -> Tensor:
        sigma = self.weight.new_tensor(data=[x.std()]).clamp(max=0.01) + 1
        return F.conv2d(x, self.weight * gauss(5, sigma), self.bias, padding=2)


class SplitByValue(Base):
    def forward(self, x: Tensor) -> Tensor:
        at = (x.std() * 100).clamp(max=1).long().reshape(1)
        kept, _ = torch.tensor_split(torch.cat([self.weight, self.weight]), at * len(self.weight))
        return F.conv2d(x, kept, self.bias, padding=2)


class CountsNonzero(Base):
    def forward(self, x: Tensor) -> Tensor:
        share = x.to_sparse().values().shape[0] / x.numel()
        return F.conv2d(x, self.weight * (1.0 if share > 0.5 else 0.5), self.bias, padding=2)


class Excepted(Base):
    """A branch by an exception."""

    def forward(self, x: Tensor) -> Tensor:
        sigma = 2.0
        try:
            F.embedding((x.std() * 1e6).long().reshape(1), self.weight.flatten(1))
        except IndexError:
            sigma = 1.0
        return F.conv2d(x, self.weight * gauss(5, sigma), self.bias, padding=2)


DYNAMIC = [
    CondConv, PerSample, Hard, LastTime, LastTimePlain, ThroughNumpy, ThroughList, Printed, Applied, Mapped,
    OwnTensor, Branch, Nonzero, BatchSize, Counter, Decaying, Dropped, Noisy, NumpyNoise, Modulated,
    OutOfPlaceWhere, ViaBuffer, CorrelatesItself, Collected, CollectedAnew, SplitByValue, CountsNonzero, Excepted,
]  # fmt: skip
