"""MobileNetV2 as torchvision writes it (Sandler et al., arXiv 1801.04381): 3,504,872 parameters."""

from __future__ import annotations

from torch import Tensor, nn

from gmconv.models.registry import check_sizes, register

# Expansion, output channels, blocks, stride of the first block: the paper's table 2.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _conv_bn_relu6(
    channels_in: int, channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection; the shortcut where shapes allow it."""

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [_conv_bn_relu6(channels_in, hidden, 1)]
        layers += [
            _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) to (N, channels, H / stride, W / stride)."""
        out: Tensor = self.conv(x)
        return x + out if self.use_res_connect else out


class MobileNetV2(nn.Module):
    """Width 1.0: `features` (stem, 17 inverted residuals, 1x1 to 1280), average pool, `classifier`."""

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.2) -> None:
        super().__init__()
        check_sizes(num_classes, in_channels)
        features: list[nn.Module] = [_conv_bn_relu6(in_channels, 32, 3, stride=2)]
        channels_in = 32
        for expansion, channels, blocks, stride in _STAGES:
            for index in range(blocks):
                features.append(InvertedResidual(channels_in, channels, stride if index == 0 else 1, expansion))
                channels_in = channels
        features.append(_conv_bn_relu6(channels_in, 1280, 1))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(1280, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W)."""
        out: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return out


@register
def mobilenet_v2(num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.2) -> nn.Module:
    """MobileNetV2, width multiplier 1.0."""
    return MobileNetV2(num_classes, in_channels, dropout)
