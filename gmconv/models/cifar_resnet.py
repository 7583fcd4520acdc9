"""The CIFAR ResNets (He et al., arXiv 1512.03385, section 4.2) with the parameter-free shortcut (option A)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gmconv.models.registry import check_sizes, register


class CifarBlock(nn.Module):
    """Two convolutions; where the shape changes, the shortcut keeps every second pixel and pads channels with zeros."""

    def __init__(self, channels_in: int, channels: int, stride: int, kernel_size: int) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv1 = nn.Conv2d(channels_in, channels, kernel_size, stride=stride, padding=padding, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size, padding=padding, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.extra_channels = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) to (N, channels, ceil(H / stride), ceil(W / stride))."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride != 1:
            # A 1x1 max pool is x[:, :, ::stride, ::stride] in one ONNX node, for any height and width.
            x = F.max_pool2d(x, kernel_size=1, stride=self.stride)
        if self.extra_channels:
            before = self.extra_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.extra_channels - before))
        return x


class CifarResNet(nn.Module):
    """Stem, three stages of 16, 32 and 64 channels, global average pool, `linear`. Height and width may be dynamic."""

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3, kernel_size: int = 3) -> None:
        super().__init__()
        check_sizes(num_classes, in_channels)
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be a positive odd integer, not {kernel_size!r}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1, kernel_size)
        self.layer2 = _stage(16, 32, blocks, 2, kernel_size)
        self.layer3 = _stage(32, 64, blocks, 2, kernel_size)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.linear(self.avgpool(x).flatten(1))
        return out


def _stage(channels_in: int, channels: int, blocks: int, stride: int, kernel_size: int) -> nn.Sequential:
    first = CifarBlock(channels_in, channels, stride, kernel_size)
    return nn.Sequential(first, *(CifarBlock(channels, channels, 1, kernel_size) for _ in range(blocks - 1)))


@register
def resnet8(num_classes: int = 10, in_channels: int = 3, kernel_size: int = 3) -> nn.Module:
    """CIFAR ResNet-8, for a first try: 75,290 parameters with 3x3 kernels. `kernel_size` (odd) replaces every 3x3."""
    return CifarResNet(8, num_classes, in_channels, kernel_size)


@register
def resnet20(num_classes: int = 10, in_channels: int = 3, kernel_size: int = 3) -> nn.Module:
    """CIFAR ResNet-20: 269,722 parameters with 3x3 kernels. `kernel_size` (odd) replaces every 3x3."""
    return CifarResNet(20, num_classes, in_channels, kernel_size)


@register
def resnet32(num_classes: int = 10, in_channels: int = 3, kernel_size: int = 3) -> nn.Module:
    """CIFAR ResNet-32: 464,154 parameters with 3x3 kernels. `kernel_size` (odd) replaces every 3x3."""
    return CifarResNet(32, num_classes, in_channels, kernel_size)


@register
def resnet56(num_classes: int = 10, in_channels: int = 3, kernel_size: int = 3) -> nn.Module:
    """CIFAR ResNet-56: 853,018 parameters with 3x3 kernels. `kernel_size` (odd) replaces every 3x3."""
    return CifarResNet(56, num_classes, in_channels, kernel_size)
