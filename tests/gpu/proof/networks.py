"""The networks of the proof, with random weights and masks narrow enough to matter; and their forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gmconv
from gmconv.erf import without_masks

#: Share of a kernel's L1 norm that a crop may lose.
CROP_TOLERANCE = 1e-3


class LargeKernels(nn.Module):
    """A depthwise network of 31x31 kernels, as RepLKNet's stages (arXiv 2203.06717): where masks are dear."""

    def __init__(self, channels: int = 64, blocks: int = 4, kernel: int = 31) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 4, stride=4, bias=False)
        self.depthwise = nn.ModuleList(
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
            for _ in range(blocks)
        )
        self.pointwise = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(blocks))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 3, H, W)."""
        x = self.stem(x)
        for depthwise, pointwise, norm in zip(self.depthwise, self.pointwise, self.norms, strict=True):
            x = x + torch.relu(pointwise(norm(depthwise(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


@dataclass(frozen=True, slots=True)
class Network:
    """A name, a factory of the live network, and the (C, H, W) of its input."""

    name: str
    make: Callable[[], nn.Module]
    input_shape: tuple[int, int, int]

    def live(self) -> nn.Module:
        """In eval mode, on the CPU, float32; the same weights, statistics and sigmas every time.

        The statistics are those of noise: with others a deep residual network leaves the range of float16.
        """
        torch.manual_seed(0)
        model = self.make().train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 1.0
                elif isinstance(module, gmconv.GMConv2d):
                    module.sigma.uniform_(0.4, 1.2, generator=generator)
            model(self.images(4, seed=2))
        return model.eval()

    def forms(self) -> dict[str, nn.Module]:
        """live, baked, twin (the same weights, masks of exactly 1, no mask left) and cropped."""
        live = self.live()
        baked = gmconv.bake(live)
        twin = gmconv.bake(without_masks(live))
        return {"live": live, "baked": baked, "twin": twin, "cropped": gmconv.crop(baked, CROP_TOLERANCE)}

    def images(self, batch: int, seed: int = 0) -> Tensor:
        """Noise, float32 (batch, C, H, W), on the CPU."""
        return torch.randn((batch, *self.input_shape), generator=torch.Generator().manual_seed(seed))


def zoo(name: str, size: int, **options: object) -> Network:
    """A network of gmconv.models at `size` x `size`."""
    return Network(name, lambda: gmconv.models.create(name, **options), (3, size, size))


def large_kernels(size: int, **options: int) -> Network:
    """`LargeKernels` with masks on its depthwise layers."""

    def make() -> nn.Module:
        return gmconv.convert(LargeKernels(**options), where=lambda name, conv: conv.groups > 1, inplace=True)

    return Network("depthwise31", make, (3, size, size))
