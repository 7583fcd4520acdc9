"""Layers that use or keep a constant kernel in an unusual way."""

from __future__ import annotations

import types

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from tests.gmconv.constants.layers import Base, gauss


class InPlace(Base):
    """As many write PixelCNN: the parameter itself is masked."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        mask = torch.ones(5, 5)
        mask[2, 3:], mask[3:] = 0, 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return F.conv2d(x, self.weight, self.bias, padding=2)


class Cached(Base):
    """Made when it is first needed, kept in a plain attribute."""

    cache: Tensor | None = None

    def kernel(self) -> Tensor:
        if self.cache is None:
            self.cache = super().kernel().detach()
        return self.cache


class ByName(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(input=x, weight=self.kernel(), bias=self.bias, padding="same")


class Aten(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.conv2d.default(x, self.kernel(), self.bias, [1, 1], [2, 2])


class Convolution(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.convolution(x, self.kernel(), self.bias, [1, 1], [2, 2], [1, 1], False, [0, 0], 1)


class FunctionalCall(Base):
    """The layer's own forward, with another weight."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.conv = nn.Conv2d(i, o, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.conv, {"weight": self.conv.weight * gauss(5, self.sigma)}, (x,))


class SetsData(Base):
    """Writes the kernel into a child before calling it."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.conv = nn.Conv2d(i, o, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        self.conv.weight.data = self.kernel().data
        return self.conv(x)


class CopiesData(SetsData):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.conv.weight.copy_(self.kernel())
        return self.conv(x)


class Copied(Base):
    """A masked weight copied over a child's own, which has its size."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.raw, self.conv = nn.Parameter(torch.randn(o, i, 5, 5) / 10), nn.Conv2d(i, o, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.conv.weight.copy_(self.raw * gauss(5, self.sigma))
        return self.conv(x)


class ConjugateSpectra(Base):
    """Multiplies spectra, the kernel's conjugate."""

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(self.kernel(), s=x.shape[2:]).conj()
        return torch.fft.irfft2(torch.einsum("bihw,oihw->bohw", torch.fft.rfft2(x), spectrum), s=x.shape[2:])


class ReadsChild(nn.Module):
    """A parent that reads what a plain layer does not have."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.layer = Base(i, o)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (1 + 0 * self.layer.sigma)


class Block(Base):
    """Two convolutions and more in one forward."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.second, self.norm = nn.Conv2d(o, o, 3, padding=1), nn.BatchNorm2d(o)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel(), self.bias, padding=2))
        return x + F.relu(self.norm(F.conv2d(self.second(x), self.second.weight * gauss(3, self.sigma), padding=1)))


class ItemBlock(Base):
    """A branch on a trained number, and more than the convolution."""

    def kernel(self) -> Tensor:
        if float(self.sigma) > 1:
            return self.weight * gauss(self.k, float(self.sigma))
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Twice(Base):
    """One layer, called twice in a forward."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.again = Base(o, o)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(F.relu(self.again(super().forward(x))))


class Borrowed(Base):
    """Another layer's weight, turned around."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.first = nn.Conv2d(i, o, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + F.conv2d(x, self.first.weight.flip(-1), self.bias, padding=2)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, w: Tensor, sigma: Tensor) -> Tensor:
        return F.conv2d(x, w * gauss(5, sigma), padding=2)


class OwnFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        return _Straight.apply(x, self.weight, self.sigma) + self.bias.view(1, -1, 1, 1)


class Padded(Base):
    """Padding of its own before the convolution; different on each side."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (3, 1, 2, 2)), self.kernel(), self.bias)


class Circular(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="circular"), self.kernel(), self.bias)


class Depthwise(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(i, 1, 7, 7) / 7)
        self.log_sigma = nn.Parameter(torch.linspace(-0.5, 0.5, i).view(i, 1, 1, 1))
        self.point = nn.Conv2d(i, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        mask = gauss(7, 1.0).log() / self.log_sigma.exp() ** 2
        return self.point(F.conv2d(x, self.weight * mask.exp(), None, padding=3, groups=x.shape[1]))


class Dilated(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(), self.bias, (1, 1), 4, dilation=2)


class Transposed(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight, self.sigma = nn.Parameter(torch.randn(i, o, 4, 4) / 20), nn.Parameter(torch.tensor(1.1))

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.conv_transpose2d(x, self.weight * gauss(4, self.sigma), stride=2, padding=1), 2)


class OneD(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight, self.sigma = nn.Parameter(torch.randn(o, i, 9) / 12), nn.Parameter(torch.tensor(1.7))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.exp(-((torch.arange(9) - 4.0) ** 2) / (2 * self.sigma**2))
        return F.conv1d(x.flatten(2), self.weight * mask, padding=4).unflatten(2, x.shape[2:])


class ThreeD(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight, self.sigma = nn.Parameter(torch.randn(o, i, 3, 3, 3) / 12), nn.Parameter(torch.tensor(1.2))

    def forward(self, x: Tensor) -> Tensor:
        a = torch.arange(3) - 1.0
        r2 = a[:, None, None] ** 2 + a[:, None] ** 2 + a**2
        mask = torch.exp(-r2 / (2 * self.sigma**2))
        return F.conv3d(x[:, :, None], self.weight * mask, padding=1)[:, :, 0]


class Lora(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.base = nn.Linear(i, o)
        self.a, self.b = nn.Parameter(torch.randn(o, 2) / 4), nn.Parameter(torch.randn(2, i) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, -1), self.base.weight + self.a @ self.b, self.base.bias).movedim(-1, 1)


class ScaledBias(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(), self.bias * self.sigma, padding=2)


class Autocast(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


class Blur(Base):
    """A fixed filter, repeated for each channel."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.register_buffer("filt", gauss(3, 0.8)[None, None] / 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.filt.repeat(x.shape[1], 1, 1, 1), padding=1, groups=x.shape[1])
        return super().forward(x)


class Slice(Base):
    def kernel(self) -> Tensor:
        return self.weight[:, :, 1:-1, 1:-1]

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(), self.bias, padding=1)


@torch.jit.script
def scripted_mask(w: Tensor, sigma: Tensor) -> Tensor:
    a = torch.arange(5) - 2.0
    return w * torch.exp(-(a[:, None] ** 2 + a[None] ** 2) / (2 * sigma**2))


class ScriptedMask(Base):
    def kernel(self) -> Tensor:
        return scripted_mask(self.weight, self.sigma)


class Detached(Base):
    """The kernel is made under no_grad, in double, and rounded."""

    @torch.no_grad()
    def kernel(self) -> Tensor:
        return (self.weight.double() * gauss(self.k, self.sigma.double())).float()


class Half(Base):
    """The mask is made in half precision."""

    def kernel(self) -> Tensor:
        return self.weight * gauss(self.k, self.sigma).half()


class Vmapped(Base):
    def kernel(self) -> Tensor:
        return torch.vmap(lambda w: w * gauss(self.k, self.sigma))(self.weight)


class Maker(nn.Module):
    """Makes a kernel; another module uses it."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.log_sigma, self.k = nn.Parameter(torch.tensor(0.1)), k

    def forward(self) -> Tensor:
        return gauss(self.k, self.log_sigma.exp())


class Made(Base):
    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.maker = Maker(5)

    def kernel(self) -> Tensor:
        return self.weight * self.maker()


class Unregistered(Base):
    """A layer in a plain list, which the module tree does not know."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.layers = [Base(i, o)]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


class InClosure(Base):
    """A layer that only a function knows: no copy of the network has one of its own."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        layer = Base(i, o)
        self.inner = lambda x: layer(x)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x))


class MasksChild(Base):
    """Masks its child's own weight in place before each call."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.conv = nn.Conv2d(i, o, 5, padding=2)
        self.register_buffer("keep", (torch.rand(o, i, 5, 5) > 0.3).float())

    def forward(self, x: Tensor) -> Tensor:
        self.conv.weight.data.mul_(self.keep)
        return F.relu(self.conv(x))


class AtScales(nn.Module):
    """One weight, at each call under another mask."""

    class Scaled(Base):
        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return F.conv2d(x, self.weight * gauss(5, sigma), self.bias, padding=2)

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.layer, self.out = AtScales.Scaled(i, i), nn.Conv2d(i, o, 1)
        self.sigmas = nn.Parameter(torch.tensor([0.8, 1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(sum(self.layer(x, sigma) for sigma in self.sigmas))


class LastKernel(Base):
    """Keeps the kernel of the last forward, with its history: copy.deepcopy refuses that."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.forward(torch.zeros(1, i, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.kernel()
        return F.conv2d(x, self.last, self.bias, padding=2)


class Conditional(Base):
    """A mask that torch.cond chooses by a trained number; torch compiles that where it runs."""

    def kernel(self) -> Tensor:
        wide = self.sigma.detach() > 1
        return self.weight * torch.cond(wide, lambda: gauss(5, 1.5), lambda: gauss(5, 0.8), ())


class Cayley(Base):
    """A kernel that LAPACK solves for: its bits follow the number of threads."""

    def kernel(self) -> Tensor:
        flat = self.weight.flatten(1)
        square = F.pad(flat, (0, 0, 0, flat.shape[1] - len(flat)))
        skew, one = square - square.T, torch.eye(flat.shape[1])
        return torch.linalg.solve(one + skew, one - skew)[: len(flat)].view_as(self.weight)


class Unfolded(Base):
    """The convolution as a product: patches in columns, the kernel's taps in a row."""

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(x, self.k, padding=self.k // 2)
        return (self.kernel().flatten(1) @ columns + self.bias[:, None]).view(len(x), -1, *x.shape[2:])


class UnfoldedRows(Base):
    """The same with patches in rows."""

    def forward(self, x: Tensor) -> Tensor:
        rows = F.unfold(x, self.k, padding=self.k // 2).movedim(1, 2).flatten(0, 1)
        made = torch.addmm(self.bias * self.sigma, rows, self.kernel().flatten(1).t())
        return made.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


class Einsum(Base):
    """Tap by tap over windows of the padded input."""

    def forward(self, x: Tensor) -> Tensor:
        windows = F.pad(x, (2, 2, 2, 2)).unfold(2, self.k, 1).unfold(3, self.k, 1)
        return torch.einsum("bihwyx,oiyx->bohw", windows, self.kernel()) + self.bias.view(1, -1, 1, 1)


class Tokens(Base):
    """Attention: keys and queries follow the input, queries the batch too; only the mixing matrix is a kernel."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.query, self.value = nn.Linear(o, o), nn.Parameter(torch.randn(1, 4, o))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        tokens = out.flatten(2).movedim(1, 2)
        asked = self.query(self.value.expand(len(x), -1, -1))
        found = (asked @ tokens.mT).softmax(-1) @ tokens
        return out + (found.mean(1) @ (self.query.weight * self.sigma))[:, :, None, None]


class PlainAttribute(Base):
    """A kernel that is no parameter at all."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.fixed = torch.randn(o, i, 5, 5, generator=torch.Generator().manual_seed(1)) / 20

    def kernel(self) -> Tensor:
        return self.fixed


def patched(i: int, o: int) -> nn.Module:
    """nn.Conv2d whose forward was replaced on the object."""
    conv = nn.Conv2d(i, o, 5, padding=2)

    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * gauss(5, 1.2), self.bias)

    conv.forward = types.MethodType(forward, conv)
    return conv


def hooked(i: int, o: int) -> nn.Module:
    """A pre-hook that makes the weight, as old weight norm does."""
    conv = nn.Conv2d(i, o, 5, padding=2)
    weight = conv.weight
    del conv._parameters["weight"]
    conv.register_parameter("raw", weight)
    conv.register_forward_pre_hook(lambda m, _: setattr(m, "weight", m.raw * gauss(5, 1.2)))
    return conv


class _Gauss(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * gauss(5, 0.9)


def stacked(i: int, o: int) -> nn.Module:
    """Two parametrizations, one on the other."""
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(i, o, 5, padding=2))
    parametrize.register_parametrization(conv, "weight", _Gauss())
    return conv


def grouped(i: int, o: int) -> nn.Module:
    conv = nn.Conv2d(i, o, 5, padding=2, groups=4, padding_mode="reflect")
    parametrize.register_parametrization(conv, "weight", _Gauss())
    return conv


def strided(i: int, o: int) -> nn.Module:
    conv = nn.Conv2d(i, o, 5, stride=2, padding=2)
    parametrize.register_parametrization(conv, "weight", _Gauss())
    return nn.Sequential(conv, nn.Upsample(scale_factor=2))


def normed(i: int, o: int) -> nn.Module:
    return nn.utils.weight_norm(nn.Conv2d(i, o, 5, padding=2))


def spectral(i: int, o: int) -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(i, o, 5, padding=2))


def pruned(i: int, o: int) -> nn.Module:
    return prune.l1_unstructured(nn.Conv2d(i, o, 5, padding=2), "weight", 0.5)


CALLS = [
    InPlace, Cached, ByName, Aten, Convolution, FunctionalCall, SetsData, CopiesData, ReadsChild, Block, ItemBlock,
    Twice, Borrowed, OwnFunction, Padded, Circular, Depthwise, Dilated, Transposed, OneD, ThreeD, Lora, ScaledBias,
    Autocast, Blur, Slice, ScriptedMask, Detached, Half, Vmapped, Made, Unregistered, InClosure, MasksChild, AtScales,
    LastKernel, Conditional, Cayley, Unfolded, UnfoldedRows, Einsum, Tokens,
    Copied, ConjugateSpectra, PlainAttribute, patched, hooked, stacked, grouped,
    strided, normed, spectral, pruned,
]  # fmt: skip
